"""Work in threads gives what it gives in one."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from onnxq import threads
from onnxq.threads import in_order, spread


def _workers(items: Sequence[int]) -> tuple[str, list[int]]:
    return threading.current_thread().name, list(items)


@pytest.mark.parametrize(("cores", "items", "shares"), [(1, 40, 1), (4, 40, 4), (4, 11, 2)])
def test_every_item_is_in_one_share(
    cores: int, items: int, shares: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads, "cores", lambda: cores)
    found = spread(_workers, range(items), 5)
    assert len(found) == shares
    assert all(len(share) >= 5 for _, share in found)
    assert sorted(i for _, share in found for i in share) == list(range(items))


def test_work_that_was_given_to_threads_is_not_shared_out_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each would start threads of its own for every tensor."""
    monkeypatch.setattr(threads, "cores", lambda: 3)

    def inner(item: int) -> list[tuple[str, list[int]]]:
        return spread(_workers, range(item, item + 30), 1)

    for item, found in enumerate(in_order(inner, range(8))):
        ((name, share),) = found
        assert name != threading.current_thread().name
        assert share == list(range(item, item + 30))
    assert len(spread(_workers, range(30), 1)) == 3  # nor is this thread one of them afterwards
    assert len(next(in_order(inner, [0], workers=1))) == 3


def test_an_error_in_a_share_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "cores", lambda: 2)

    def fails(items: Sequence[int]) -> None:
        if 3 in items:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        spread(fails, range(8), 1)
