"""Compute many independent tasks in threads, or by another function of the same form."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


class Spread(Protocol):
    """A function that computes `function(item)` of each item and yields the results in the order of the items.

    Items are tuples of tensors. At most `threads` items are computed at a time in this process; 0 = as many as torch has threads.
    """

    def __call__(self, function: Callable[[T], R], items: Iterable[T], threads: int = 0) -> Iterator[R]: ...


@contextmanager
def one_thread_each(threads: int = 0) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool of `threads` threads (0 = as many as torch uses), each of which runs torch on a single thread.

    torch's thread count is a global setting; it is restored at the end.
    """
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads or before, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def each_in_turn(function: Callable[[T], R], items: Iterable[T], threads: int = 0) -> Iterator[R]:
    """Compute items in threads of this process (`one_thread_each`), a few items ahead. See `Spread`."""
    with one_thread_each(threads) as pool:
        ahead: deque[Future[R]] = deque()
        for item in items:
            ahead.append(pool.submit(function, item))
            if len(ahead) > (threads or torch.get_num_threads()):
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
