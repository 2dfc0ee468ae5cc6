"""Work on several cores, with results that do not depend on how many there are.

numpy lets other threads run while it computes. Each piece of work is computed as it would be alone,
and the results are given in the order of the pieces.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, local
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


_thread = local()


def _join_others() -> None:
    _thread.has_others = True


def cores() -> int:
    """The cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def few() -> int:
    """Threads for work of which each holds a weight in memory: one a core, but four at most."""
    return min(cores(), 4)


def in_order(work: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """The results of `work`, in the order of the items; one more is under way than `workers`.

    With it no thread waits for whoever takes the results, or for a slow item before its own.

    Args:
        workers: threads; None: one per core.
    """
    workers = cores() if workers is None else workers
    if workers < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers, initializer=_join_others) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def spread(work: Callable[[Sequence[T]], R], items: Sequence[T], least: int) -> list[R]:
    """The results of `work` on shares of the items, one a core and each of `least` or more.

    Who gets which items depends on the cores: what comes of it all must not. Work that `in_order`
    has given to several threads is not shared out again.
    """
    workers = min(cores(), len(items) // least)
    if workers < 2 or getattr(_thread, "has_others", False):
        return [work(items)]
    shares = [items[i::workers] for i in range(workers)]
    with ThreadPoolExecutor(workers - 1) as pool:
        others = pool.map(work, shares[1:])
        return [work(shares[0]), *others]


class Once(Generic[T]):
    """A value that is made by the thread that asks first; the others wait for it."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make, self._lock = make, Lock()
        self._made: list[T] = []

    def __call__(self) -> T:
        with self._lock:
            if not self._made:
                self._made.append(self._make())
        return self._made[0]
