"""With `num_workers: 2` in a fleet file, two Ray Train workers share one base model and give the result of one worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from acip_platform.scheduling.fleet import Fleet, FleetError
from acip_platform.scheduling.job_queue import resources_of
from acip_platform.settings import Settings
from acip_platform.tracking.registry import Registry

from acip.artifact.artifact import Artifact
from tests.conftest import write_fleet
from tests.support.waiting import JOB_S

ROOT = Path(__file__).parents[3]


def fleet(path: Path, base: str, more: str = "", workers: int = 2) -> Path:
    return write_fleet(
        path, f"lr: 1.0e-3, post_tune_steps: 12{more}", f"name: one, base: {base}", f"name: two, base: {base}, num_workers: {workers}"
    )


@pytest.mark.slow
def test_two_workers_calibrate_one_model(tmp_path: Path, small_base: str) -> None:
    file = fleet(tmp_path / "fleet.yaml", small_base)
    env = {**os.environ, "ACIP_HOME": str(tmp_path / "home"), "ACIP_CHECKPOINT_S": "0.5", "RAY_ADDRESS": "local"}
    command = [sys.executable, str(ROOT / "jobs" / "calibrate_all.py"), "--fleet", str(file)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=JOB_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    settings = Settings.from_env(env)
    one, two = (Artifact.open(Registry(settings).resolve(name).uri) for name in ("one", "two"))
    assert list(Path(settings.runs).glob("two-*/step_*")), "the two workers saved no checkpoint"
    scores = []
    for artifact in (one, two):
        scores.append(torch.argsort(torch.argsort(artifact.tensors("order").read(["score"])["score"])).double())
    assert float(torch.corrcoef(torch.stack(scores))[0, 1]) > 0.999
    for row, expected in zip(two.curve, one.curve, strict=True):
        assert row["params"] == expected["params"]
        assert row["loss"] == pytest.approx(expected["loss"], abs=0.01)


def test_an_impossible_number_of_workers_is_refused(tmp_path: Path, small_base: str) -> None:
    file = tmp_path / "fleet.yaml"
    for number in (0, 3):
        with pytest.raises(FleetError, match=r"line \d+: num_workers is .; it must be at least 1 and divide batch_size, which is 4"):
            Fleet.load(fleet(file, small_base, workers=number))
    with pytest.raises(FleetError, match="4-bit weights can't be sharded"):
        Fleet.load(fleet(file, small_base, ", quantize: nf4"))
    _, two = Fleet.load(fleet(file, small_base)).jobs
    assert resources_of(two, [{"CPU": 4.0}]).workers == 2
    with pytest.raises(FleetError, match="needs 2 workers with 0 GPUs and 1 CPUs; the cluster has 0 and 1"):
        resources_of(two, [{"CPU": 1.0}])
