"""Write tests/golden/schema-N: an artifact of the current schema, and results computed from it by the current code.

    python -m tests.support.stored        fails if the folder exists, because stored artifacts never change

The model is a Llama of two small layers with random weights, calibrated on random bytes. All seeds are 0. expected.json holds the
ranks and bytes of each size, expected.safetensors the logits [sizes, T, vocabulary] of `tokens`. From schema 5 on, `coded_bytes` are
the stored bytes of three models with coded layers, and `coded_logits` their logits.
tests/acip/artifact/test_stored_schemas.py reads both.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from acip.artifact.artifact import Artifact
from acip.artifact.manifest import SCHEMA
from acip.base import load_base
from acip.calibration.loop import calibrate
from acip.calibration.parametrize import parametrize
from acip.coding.coded_model import code_model
from acip.coding.statistics import layer_statistics
from acip.data import TokenBatches
from acip.evaluate import CurveSetup, trade_off
from acip.layers.targets import find_linears
from acip.recipe import Recipe
from acip.sizing.budget import Budget
from tests.conftest import GOLDEN, byte_tokenizer
from tests.support.coded import load_bytes

SIZES = (1.0, 0.8, 0.6, 0.4)
RATES = (2.0, 4.0, 7.0)
RECIPE = Recipe(
    sample_windows=8, adapter_rank=2, adapter_alpha=4.0, dtype="float32", batch_size=4, seq_len=16, lr=1e-2, post_tune_steps=8, code="both",
)  # fmt: skip


def main() -> None:
    folder = GOLDEN.parent / f"schema-{SCHEMA}"
    if folder.exists():
        sys.exit(f"{folder} already exists. A new schema needs a new number; see acip/ARTIFACT.md.")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=32, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tokens = torch.randint(0, 256, (48, 16))
    with tempfile.TemporaryDirectory() as source:
        LlamaForCausalLM(config).save_pretrained(source)
        byte_tokenizer().save_pretrained(source)
        base = load_base(source, RECIPE.dtype)
        base.source = "stored"  # instead of the path of a temporary folder
        base.model.requires_grad_(False)
        linears = find_linears(base.model)
        codes = code_model(linears, layer_statistics(base.model, linears, tokens[:8]), RATES)
        parametrize(base.model, RECIPE, tokens)
        calibration = calibrate(base.model, TokenBatches(tokens, RECIPE.batch_size), RECIPE)
    artifact = Artifact.save(folder / "artifact", base, calibration, {"seed": 0}, codes)
    artifact = artifact.record_curve(list(trade_off(artifact.load(), SIZES, CurveSetup(tokens[:8], "random bytes", RECIPE.stop_ratio))))
    record(folder, artifact, tokens[0, :8])


def record(folder: Path, artifact: Artifact, tokens: torch.Tensor) -> None:
    """Write the results that the current code computes from the artifact."""
    any_size, table = artifact.load(), artifact.table()
    expected, logits = [], []
    for size in SIZES:
        cut = table.cut(Budget(ratio=size))
        any_size.resize(Budget(ratio=size))
        with torch.no_grad():
            logits.append(any_size.model(input_ids=tokens[None]).logits[0])
        expected.append({"size": size, "got": cut.got, "params": cut.params, "bytes": cut.bytes, "ranks": cut.ranks})
    (folder / "expected.json").write_text(json.dumps(expected, indent=1))
    coded = table.byte_sizes
    assert coded is not None
    coded_bytes = [coded.bytes(steps) for steps in (0, coded.all_coded // 2, coded.all_coded)]
    coded_logits = [load_bytes(artifact, limit)[0](input_ids=tokens[None]).logits[0] for limit in coded_bytes]
    results = {"logits": logits, "coded_logits": coded_logits, "coded_bytes": [torch.tensor(limit) for limit in coded_bytes]}
    save_file({name: torch.stack(each) for name, each in results.items()} | {"tokens": tokens.clone()}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
