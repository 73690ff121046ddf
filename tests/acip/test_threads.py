"""Threads that compute in turn, and memory that is returned to the operating system."""

import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch

from acip.utils.threads import each_in_turn
from tests.support.waiting import PATIENCE_S

FREES = """
import psutil, torch
from acip.utils.malloc import return_freed_memory
if {returned}:
    return_freed_memory()
kept, before = [], psutil.Process().memory_info().rss
for i in range(40):
    tensor = torch.ones(1_000_000)  # 4 MB
    kept.append(torch.ones(1000))  # lies behind it, so that the heap cannot shrink
    del tensor
    big = [torch.ones(1_000_000) for _ in range(i)]
    kept.append(torch.ones(1000))
    del big
print((psutil.Process().memory_info().rss - before) / 1e6)
"""


def test_results_are_in_the_order_of_the_items() -> None:
    threads = torch.get_num_threads()
    later = threading.Event()

    def square(number: int) -> int:
        if number == 0 and threads > 1:
            assert later.wait(PATIENCE_S), "the next item is computed at the same time"
        if number == 1:
            later.set()
        return number**2

    assert list(each_in_turn(square, range(20))) == [number**2 for number in range(20)]
    assert torch.get_num_threads() == threads


def test_an_error_is_raised_where_its_result_is_due() -> None:
    def inverse(number: int) -> float:
        return 1 / number

    results = each_in_turn(inverse, [2, 1, 0, 4])
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert torch.get_num_threads() > 0


def test_items_are_computed_a_few_ahead_only() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for i in range(100):
            taken.append(i)
            yield i

    results = each_in_turn(lambda number: number, items())
    next(results)
    assert len(taken) <= torch.get_num_threads() + 1
    results.close()  # type: ignore[attr-defined]


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_freed_memory_is_returned() -> None:
    run = subprocess.run([sys.executable, "-c", FREES.format(returned=True)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 40
