"""The progress line: what is left is told by what went by since the step was first heard of."""

from __future__ import annotations

import io

import pytest

from onnxq import progress


def drawn(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[float, int]], total: int) -> list[str]:
    """The plain lines of a step that is called at these seconds with so much done."""
    stream = io.StringIO()
    line = progress.ProgressLine(stream, live=False, quiet=False)
    for second, done in calls:
        monkeypatch.setattr(progress.time, "monotonic", lambda now=second: 1000.0 + now)
        line("work", done, total)
    return stream.getvalue().splitlines()


def test_what_was_done_before_the_first_call_took_nobody_knows_how_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twenty seconds each: behind the third of eight, five are left."""
    calls = [(20.0 * i, i + 1) for i in range(4)]
    assert drawn(monkeypatch, calls, 8)[:2] == [
        "work: 2 of 8, 120 s left",
        "work: 3 of 8, 100 s left",
    ]
    from_zero = [(20.0 * i, i) for i in range(4)]
    assert drawn(monkeypatch, from_zero, 8)[0] == "work: 1 of 8, 140 s left"


def test_without_a_total_the_time_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, [(0.0, 1), (20.0, 2)], 0) == ["work: 20 s"]
