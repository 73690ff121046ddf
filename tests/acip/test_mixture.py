"""A mixture splits windows over its sources by their weights, and interleaves them."""

import json

import pytest
import torch

from acip.errors import DataError
from acip.mixture import Mixture, interleaved


@pytest.mark.parametrize(
    ("weights", "windows", "expected"),
    [
        ((1.0, 1.0), 7, [4, 3]),
        ((3.0, 1.0), 8, [6, 2]),
        ((0.2, 0.3, 0.5), 9, [2, 3, 4]),  # quotas 1.8, 2.7, 4.5
        ((1.0, 1.0, 1.0), 100, [34, 33, 33]),
    ],
)
def test_windows_are_split_by_the_largest_remainder(weights: tuple[float, ...], windows: int, expected: list[int]) -> None:
    mixture = Mixture(tuple(zip("abc", weights, strict=False)))
    assert list(mixture.counts(windows).values()) == expected
    assert sum(mixture.shares) == pytest.approx(1.0)


def test_a_source_without_a_window_is_refused() -> None:
    with pytest.raises(DataError, match=r"the weight 0\.01 of b is less than one of 8 windows"):
        Mixture((("a", 1.0), ("b", 0.01))).counts(8)


@pytest.mark.parametrize("counts", [(5,), (50, 50), (12, 84), (10, 30, 57), (7, 13, 29, 43)])
def test_every_prefix_holds_the_shares(counts: tuple[int, ...]) -> None:
    sources = [torch.stack([torch.full((n,), i), torch.arange(n)], 1) for i, n in enumerate(counts)]
    mixed = interleaved(sources)
    for i, windows in enumerate(sources):
        assert torch.equal(mixed[mixed[:, 0] == i], windows), "the windows of a source keep their order, and each is there once"
        in_prefix = (mixed[:, 0] == i).cumsum(0)
        expected = torch.arange(1, len(mixed) + 1) * (len(windows) / len(mixed))
        assert (in_prefix - expected).abs().max() <= len(counts) / 2


def test_one_source_is_its_name() -> None:
    assert Mixture.of("c4").data == Mixture((("c4", 3.0),)).data == Mixture.of("c4").to_json() == str(Mixture.of("c4")) == "c4"


def test_a_mixture_survives_json() -> None:
    mixture = Mixture((("package:wikipedia", 3.0), ("self", 1.0)))
    assert Mixture.of(json.loads(json.dumps(mixture.to_json()))) == mixture == mixture.data
    assert str(mixture) == "package:wikipedia (75 %), self (25 %)"
