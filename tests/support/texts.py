"""A reader of calibration text for tests."""

from typing import Any

from acip_platform.settings import Settings
from acip_platform.training.calibration_text import TextReader


def text_reader(tokenizer: Any, seq_len: int) -> TextReader:
    """Return a reader of all sources but `self`."""
    return TextReader("", tokenizer, seq_len, 0, Settings.from_env({"ACIP_HOME": "/nowhere"}), lambda kind, **facts: None, _no_model)


def _no_model() -> Any:
    raise AssertionError("no text is sampled")
