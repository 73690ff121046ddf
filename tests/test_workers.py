"""`num_workers: 2` in a fleet file: two Ray Train workers share one base model, with the outcome of one worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from acip_platform.fleet import Fleet, FleetError, share
from acip_platform.settings import Settings
from acip_platform.tracking import Registry

from acip.artifact import Artifact

ROOT = Path(__file__).parents[1]
FLEET = """\
name: workers
defaults:
  data: package:wikipedia
  eval_context: 64
  eval_windows: 8
  sizes: [1.0, 0.5]
  cpus: 1
  set: {sample_windows: 16, adapter_rank: 4, adapter_alpha: 4.0, adapter_dropout: 0.0, dtype: float32, batch_size: 4, seq_len: 64,
        lr: 1.0e-3, post_tune_steps: 40}
models:
  - {name: one, base: BASE}
  - {name: two, base: BASE, num_workers: 2}
"""


def test_two_workers_calibrate_one_model(tmp_path: Path, small_base: str) -> None:
    fleet = tmp_path / "fleet.yaml"
    fleet.write_text(FLEET.replace("BASE", small_base))
    env = {**os.environ, "ACIP_HOME": str(tmp_path / "home"), "ACIP_CHECKPOINT_S": "0.5", "RAY_ADDRESS": "local"}
    command = [sys.executable, str(ROOT / "jobs" / "calibrate_all.py"), "--fleet", str(fleet)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    settings = Settings.from_env(env)
    one, two = (Artifact.open(Registry(settings).resolve(name).uri) for name in ("one", "two"))
    assert list(Path(settings.runs).glob("two-*/step_*")), "its checkpoints count"
    scores = []
    for artifact in (one, two):
        with artifact._tensors("order") as tensors:
            scores.append(torch.argsort(torch.argsort(tensors.get_tensor("score"))).double())
    assert float(torch.corrcoef(torch.stack(scores))[0, 1]) > 0.999
    for ours, theirs in zip(two.curve, one.curve, strict=True):
        assert ours["params"] == theirs["params"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.01)


def test_a_number_of_workers_that_cannot_be(tmp_path: Path, small_base: str) -> None:
    fleet = tmp_path / "fleet.yaml"
    for number in (0, 3):
        fleet.write_text(FLEET.replace("BASE", small_base).replace("num_workers: 2", f"num_workers: {number}"))
        with pytest.raises(FleetError, match=r"line 12: num_workers is .; it must be at least 1 and divide batch_size, which is 4"):
            Fleet.load(fleet)
    fleet.write_text(FLEET.replace("BASE", small_base).replace("dtype: float32", "dtype: float32, quantise: nf4"))
    with pytest.raises(FleetError, match="either sharded or in 4 bit"):
        Fleet.load(fleet)
    fleet.write_text(FLEET.replace("BASE", small_base))
    _, two = Fleet.load(fleet).jobs
    assert share(two, {"CPU": 4.0}).at_once == 2
    with pytest.raises(FleetError, match="asks for 2 workers with 0 GPUs and 1 CPUs; the cluster has 0 and 1"):
        share(two, {"CPU": 1.0})
