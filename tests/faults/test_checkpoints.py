"""Damaged, truncated, and unwritable checkpoints: the calibration resumes from the previous one and reaches the same result."""

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from acip_platform.scheduling.fleet import Job
from acip_platform.settings import Settings
from acip_platform.storage.checkpoints import KEPT, Checkpoints
from acip_platform.tracking.runs import Tracking
from acip_platform.training.worker import Observer
from ray.train.v2.api.preemption import PreemptionInfo

from acip.base import load_base
from acip.calibration.loop import Calibration, calibrate
from acip.calibration.parametrize import parametrize
from acip.calibration.state import FILES, SUMS, CalibrationState, StepReport, damage
from acip.data import TokenBatches
from acip.errors import CalibrationError
from acip.recipe import Recipe
from tests.support.faulty import proxy

ATTEMPT = "small-0123"


@pytest.fixture(params=["disk", pytest.param("s3", marks=pytest.mark.slow)])
def settings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    runs = str(tmp_path / "runs")
    if request.param == "s3":
        runs = f"s3://models/{tmp_path.name}"
        for name, value in request.getfixturevalue("s3_server").items():
            monkeypatch.setenv(name, value)
    return Settings.from_env({"ACIP_HOME": str(tmp_path / "home"), "ACIP_CHECKPOINT_URI": runs})


class KilledError(Exception):
    pass


class CalibrationHarness:
    """The small model, with calibrations that stop at a given step and resume from a checkpoint."""

    def __init__(self, base: str, recipe: Recipe, tokens: torch.Tensor) -> None:
        self.base, self.recipe, self.tokens = base, recipe, tokens

    def run(self, checkpoints: Checkpoints, every: int, kill_at: int = -1) -> Calibration:
        def observe(reports: list[StepReport], state: CalibrationState) -> None:
            if state.step % every == 0:
                checkpoints.write(state)
            if state.step == kill_at:
                raise KilledError

        with checkpoints.newest() as folder:
            return self.calibrate(folder, observe)

    def calibrate(self, folder: Path | None, observe: Any = lambda reports, state: None) -> Calibration:
        base = load_base(self.base, self.recipe.dtype)
        parametrize(base.model, self.recipe, self.tokens)
        return calibrate(base.model, TokenBatches(self.tokens, self.recipe.batch_size), self.recipe, folder, observe)


@pytest.fixture
def harness(small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor) -> CalibrationHarness:
    return CalibrationHarness(small_base, quick_recipe, golden_tokens)


def damage_file(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])


@pytest.fixture(scope="module")
def killed_home(small_base: str, quick_recipe: Recipe, golden_tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the home folder of a calibration that was killed after its second checkpoint."""
    home = tmp_path_factory.mktemp("left")
    with pytest.raises(KilledError):
        CalibrationHarness(small_base, quick_recipe, golden_tokens).run(
            Checkpoints(Settings.from_env({"ACIP_HOME": str(home)}), ATTEMPT), 5, kill_at=11
        )
    return home


@pytest.mark.parametrize("how", ["gone", "cut", "flipped"])
@pytest.mark.parametrize("file", [*FILES, SUMS])
def test_damage_is_detected_and_the_previous_checkpoint_is_used(
    killed_home: Path, tmp_path: Path, harness: CalibrationHarness, file: str, how: str
) -> None:
    messages: list[str] = []
    settings = Settings.from_env({"ACIP_HOME": str(copytree(killed_home, tmp_path / "home"))})
    checkpoints = Checkpoints(settings, ATTEMPT, lambda kind, **facts: messages.append(facts["text"]))
    last, before = checkpoints.names()
    assert (last[:11], before[:11]) == ("step_000010", "step_000005")
    folder = Path(settings.runs) / ATTEMPT / last
    assert damage(folder) is None
    damage_file(folder / file, how)
    assert damage(folder) is not None
    with checkpoints.newest() as checkpoint:
        assert checkpoint is not None and checkpoint.name == before
    if (file, how) == (SUMS, "gone"):  # a folder without checksums is still being written
        assert not messages
    else:
        assert len(messages) == 1 and last in messages[0] and "using the previous one" in messages[0]
    if (file, how) == (FILES[1], "flipped"):
        with pytest.raises(CalibrationError, match=r"is damaged: state.safetensors does not match its checksum"):
            harness.calibrate(folder)


def test_calibration_restarts_if_all_checkpoints_are_damaged(killed_home: Path, tmp_path: Path) -> None:
    messages: list[str] = []
    settings = Settings.from_env({"ACIP_HOME": str(copytree(killed_home, tmp_path / "home"))})
    checkpoints = Checkpoints(settings, ATTEMPT, lambda kind, **facts: messages.append(facts["text"]))
    for name in checkpoints.names():
        checkpoints.store.write(f"{ATTEMPT}/{name}/state.json", b"{}")
    with checkpoints.newest() as folder:
        assert folder is None
    assert len(messages) == KEPT


def test_resuming_from_the_previous_checkpoint_gives_the_same_result(
    settings: Settings, harness: CalibrationHarness, calibrated: Any
) -> None:
    """After a kill, damage to the last checkpoint, and a second kill, the result equals the undisturbed one bit for bit."""
    checkpoints = Checkpoints(settings, ATTEMPT)
    with pytest.raises(KilledError):
        harness.run(checkpoints, 5, kill_at=16)
    last = checkpoints.names()[0]
    files = checkpoints.store.small(f"{ATTEMPT}/{last}")
    checkpoints.store.write(f"{ATTEMPT}/{last}/state.safetensors", files["state.safetensors"][:1000])
    with pytest.raises(KilledError):
        harness.run(checkpoints, 5, kill_at=21)
    assert [name[:11] for name in checkpoints.names()] == ["step_000020", "step_000015"] and last not in checkpoints.names()
    resumed, (_, straight) = harness.run(checkpoints, 40), calibrated
    assert resumed.history == straight.history
    assert torch.equal(resumed.scores.score, straight.scores.score)
    assert len(checkpoints.names()) == KEPT


def test_an_s3_outage_only_skips_checkpoints(
    s3_server: dict[str, str], harness: CalibrationHarness, calibrated: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    with proxy(s3_server["AWS_ENDPOINT_URL"]) as server:
        for name, value in {**s3_server, "AWS_ENDPOINT_URL": server.url}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01)
        settings = Settings.from_env({"ACIP_HOME": str(tmp_path / "home"), "ACIP_CHECKPOINT_URI": f"s3://models/{tmp_path.name}"})
        checkpoints = Checkpoints(settings, ATTEMPT, lambda kind, **facts: messages.append(facts["text"]))
        server.choose = lambda method, path, before: "503" if "step_000010" in path else ("cut" if before == 0 else "")
        with pytest.raises(KilledError):
            harness.run(checkpoints, 5, kill_at=17)
        assert len(messages) == 1 and "could not write the checkpoint of step 10: " in messages[0] and "SlowDown" in messages[0]
        assert [name[:11] for name in checkpoints.names()] == ["step_000015", "step_000005"]
        resumed = harness.run(checkpoints, 1000)
    assert torch.equal(resumed.scores.score, calibrated[1].scores.score)


def test_a_preemption_notice_triggers_a_checkpoint(tmp_path: Path, harness: CalibrationHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preemption notice causes one checkpoint, as soon as it can be written. test_fleet.py drains a real node."""
    monkeypatch.setattr("acip_platform.training.worker.LOOK_S", 0.0)
    settings = Settings.from_env({"ACIP_HOME": str(tmp_path), "ACIP_CHECKPOINT_S": "1e6"})
    messages: list[str] = []
    checkpoints = Checkpoints(settings, ATTEMPT, lambda kind, **facts: messages.append(facts["text"]))
    run = Tracking(settings, "fleet").start("small", "notice", {})
    observer = Observer(Job("small", "base", harness.recipe), run, lambda kind, **facts: None, torch.device("cpu"), checkpoints)
    notice: list[PreemptionInfo] = []
    monkeypatch.setattr("ray.train.get_preemption_info", lambda: notice[0] if notice else None)

    def observe(reports: list[StepReport], state: CalibrationState) -> None:
        if state.step == 4:
            notice.append(PreemptionInfo(None, {"node": [0]}))
            (tmp_path / "runs").write_text("in the way")
        if state.step == 6:
            (tmp_path / "runs").unlink()
        observer(reports, state)
        if state.step == 9:
            raise KilledError

    with pytest.raises(KilledError):
        harness.calibrate(None, observe)
    assert [name[:11] for name in checkpoints.names()] == ["step_000006"]
    assert [text.partition(":")[0] for text in messages] == [f"could not write the checkpoint of step {step}" for step in (4, 5)]
