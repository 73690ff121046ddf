"""The quick mode of the quality benchmark: our default recipe against the paper's, at equal stored parameters, steps and tokens."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from tests.benchmarks.quality import ALL_SIZES, SIZES
from tests.support.waiting import JOB_S

ROOT = Path(__file__).parents[2]


def test_excess_loss_is_less_than_a_tenth_of_the_papers(tmp_path: Path) -> None:
    """The ratios measured on 2026-11-29 were 0.024, 0.009, 0.007, 0.011, 0.011 and 0.035 at these sizes."""
    command = [
        sys.executable,
        str(ROOT / "tests" / "benchmarks" / "quality.py"),
        "--quick",
        "--json",
        str(tmp_path / "runs.json"),
    ]
    result = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=JOB_S, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    runs = {run["label"]: run["excess"]["austen"] for run in json.loads((tmp_path / "runs.json").read_text()).values()}
    paper, ours = ({float(size): loss for size, loss in runs[label].items()} for label in ("paper", "ours"))
    for size in SIZES:  # the benchmark's own goals are means over seeds; one of them, 0.05, is too close to the result of a single seed
        assert ours[size] < 0.1 * paper[size], f"at size {size}"
    assert ours[1.0] == paper[1.0] == 0.0
    for larger, smaller in pairwise(ALL_SIZES):
        assert ours[smaller] > ours[larger] - 2e-3, f"size {smaller} has a lower loss than size {larger}"
    assert ours[0.9] < 0.002
    assert ours[0.6] < 0.01
    assert ours[0.4] < 0.05, "nats per token above the base model"
