"""On the small Llama, our choice of llama.cpp's types loses less than llama.cpp's own mixes of the same bytes."""

from pathlib import Path

import pytest

from acip.coding.coded_model import code_model
from acip.export.gguf import weight_statistics
from tests.benchmarks import llama_cpp_types
from tests.benchmarks.bytes import small
from tests.support.small import byte_tokenizer


@pytest.mark.slow
def test_our_choice_of_types_loses_less_than_the_mixes_of_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed (pip install llama-cpp-python compiles it)")
    subject = small(True)
    statistics = weight_statistics(subject.model, subject.train)
    coded = code_model(subject.linears, {name: statistics[f"{name}.weight"] for name in subject.linears})
    files = llama_cpp_types.Files(subject, byte_tokenizer(), tmp_path)
    stored, facts = llama_cpp_types.every_type(files.tensors, statistics)
    squares = llama_cpp_types.mean_squares(subject)
    rows = llama_cpp_types.rows(subject, files, stored, facts, squares, coded, ("Q6_K", "Q4_K_M", "Q2_K"), budgets=())
    done = llama_cpp_types.written(rows, files, tmp_path / "rows.json")
    assert len(done) == 3
    for row in done:
        assert row["types"]["bytes"] <= row["mix"]["bytes"]
        assert row["types"]["kl"] < 0.7 * row["mix"]["kl"]
        assert row["codes"]["bytes"] <= row["mix"]["bytes"]
        assert row["codes"]["kl"] < 0.7 * row["mix"]["kl"]
