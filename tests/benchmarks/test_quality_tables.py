"""Our default against the paper's recipe, at equal stored parameters, steps and tokens: the benchmark's quick mode, guarded."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

from tests.benchmarks.quality import FINE, SIZES
from tests.support.waiting import JOB_S

ROOT = Path(__file__).parents[2]


def test_the_excess_loss_is_a_fraction_of_the_papers(tmp_path: Path) -> None:
    """Measured on 2026-11-22: 0.046, 0.019, 0.017, 0.017, 0.017 and 0.041 of the paper's at these sizes."""
    command = [
        sys.executable,
        str(ROOT / "tests" / "benchmarks" / "quality.py"),
        "--quick",
        "--json",
        str(tmp_path / "runs.json"),
    ]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=JOB_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    paper, ours = (
        {float(size): loss for size, loss in run["excess"]["austen"].items()} for run in json.loads((tmp_path / "runs.json").read_text())
    )
    for size in SIZES:  # the benchmark's own goals are means over seeds; one of them is 0.05, too near to what one seed gives
        assert ours[size] < 0.1 * paper[size], f"at {size}"
    assert ours[1.0] == paper[1.0] == 0.0
    for larger, smaller in pairwise(FINE):
        assert ours[smaller] > ours[larger] - 2e-3, f"{smaller} is better than {larger}"
    assert ours[0.9] < 0.002
    assert ours[0.6] < 0.01
    assert ours[0.4] < 0.05, "nats per token above the base model"
