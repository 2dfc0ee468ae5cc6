"""SmoothQuant on one input: the factors of the paper, and the search for alpha."""

from __future__ import annotations

import time

import numpy as np
import pytest

from onnxq import threads
from onnxq.algorithms.smoothquant import Trial, factors, halved, search
from onnxq.formats import PerChannel, QuantScheme, quant_format

INT8 = QuantScheme(quant_format("int8"), PerChannel(1), "float32")


def _case() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X with one channel 50 times as loud as the others, and two weights."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((200, 32)).astype(np.float32)
    X[:, 5] *= 50
    return X, rng.standard_normal((32, 24)), rng.standard_normal((32, 16))


def _int8(X: np.ndarray, s: np.ndarray) -> np.ndarray:
    step = np.abs(X).max() / 127
    return np.rint(X / step) * step


def test_the_factors_are_the_papers() -> None:
    X, V, W = _case()
    a, w = np.abs(X).max(0), np.abs(np.hstack([V, W])).max(1)
    for alpha in (0.0, 0.5, 1.0):
        wanted = a**alpha / w ** (1 - alpha)
        s = factors(a, w, alpha)
        np.testing.assert_allclose(s / s[0], wanted / wanted[0], rtol=1e-6)
        assert s.max() * s.min() == pytest.approx(1)


def test_channels_that_are_silent_do_not_run_away() -> None:
    s = factors(np.array([0.0, 1.0, 2.0]), np.array([1.0, 0.0, 1.0]), 0.5)
    assert np.isfinite(s).all() and s.min() > 0


def test_tied_channels_share_the_largest() -> None:
    X, V, _ = _case()
    loudest = np.abs(V).max(1)
    alone = factors(np.abs(X).max(0), loudest, 0.8)
    tied = factors(np.abs(X).max(0), loudest, 0.8, [np.array([4, 5, 6])])
    assert tied[4] == tied[5] == tied[6]
    assert tied[5] / tied[0] == pytest.approx(alone[5] / alone[0])


def _read(trial: Trial, s: np.ndarray) -> list[np.ndarray]:
    """In two ways, of which the second is of no use."""
    return [_int8(trial.X / s, s), 0 * trial.X]


def _whole(X: np.ndarray, counts: np.ndarray) -> list[Trial]:
    """Rows that are judged by themselves."""
    return [Trial(X, counts, np.abs(X).max(0), X, counts)]


def test_a_loud_channel_is_smoothed_and_the_error_is_as_told() -> None:
    X, V, W = _case()
    loudest = np.abs(np.hstack([V, W])).max(1)
    candidates = {str(a): factors(np.abs(X).max(0), loudest, a) for a in (0.3, 0.5, 0.7)}
    made = {name: (lambda trial, s=s: s) for name, s in candidates.items()}
    found = search(_whole(X, np.ones(200)), [(V, INT8), (W, INT8)], made, _read)

    def error(s: np.ndarray) -> float:
        exact = X.astype(np.float64) @ np.hstack([V, W])
        scaled = np.hstack([V, W]) * s[:, None]
        step = np.abs(scaled).max(0) / 127
        made = _int8(X / s, s) @ (np.rint(scaled / step) * step)
        each = ((made - exact) ** 2).sum(1) / (exact**2).sum(1)
        return float(np.sqrt((each**2).mean()))

    assert found.before == pytest.approx(error(np.ones(32)), rel=1e-2)
    errors = {alpha: error(s) for alpha, s in candidates.items()}
    assert found.alpha == min(errors, key=lambda a: errors[a])
    assert found.after == pytest.approx(min(errors.values()), rel=1e-2)
    assert found.after < found.before / 10


def test_rows_count_as_often_as_they_stand_for() -> None:
    X, V, _ = _case()
    twice = search(_whole(np.vstack([X, X[:50]]), np.ones(250)), [(V, INT8)], {}, _read)
    counts = np.where(np.arange(200) < 50, 2.0, 1.0)
    counted = search(_whole(X, counts), [(V, INT8)], {}, _read)
    assert counted.before == pytest.approx(twice.before, rel=1e-6)


def test_nothing_is_done_where_nothing_helps() -> None:
    """Inputs and weights that are even already, and factors that would make them uneven."""
    X, V = np.sign(_case()[0]), np.sign(_case()[1])
    uneven = np.where(np.arange(32) % 2, 30.0, 1.0)
    trials = _whole(X, np.ones(200))
    found = search(trials, [(V, INT8)], {"0.5": lambda trial: uneven}, _read)
    assert found.alpha is None and found.before == found.after


def test_halves_are_judged_by_each_other() -> None:
    """The error of two halves is that of both together, each read as the other shows."""
    X, V, _ = _case()
    X = np.where(np.arange(200)[:, None] % 3 == 0, 4 * X, X)
    sides, counts = np.arange(200) % 3 == 0, np.arange(200) % 5 + 1.0
    peaks = np.array([np.abs(X[sides == side]).max(0) for side in (False, True)])
    trials = halved(X, counts, sides, peaks)

    def clipped(trial: Trial, s: np.ndarray) -> list[np.ndarray]:
        assert (np.abs(trial.seen).max(0) <= trial.peaks).all()
        step = (trial.peaks / s).max() / 127
        return [np.clip(np.rint(trial.X / s / step), -127, 127) * step]

    found = search(trials, [(V, INT8)], {}, clipped)
    step = np.where(sides, *peaks.max(1))[:, None] / 127
    read = np.clip(np.rint(X / step), -127, 127) * step
    exact, each = X @ V, np.abs(V).max(0) / 127
    share = (((read @ (np.rint(V / each) * each)) - exact) ** 2).sum(1) / (exact**2).sum(1)
    assert found.before == pytest.approx(np.sqrt(np.average(share**2, weights=counts)), rel=1e-3)
    (alone,) = halved(X, counts, np.zeros(200, bool), peaks)
    assert (alone.peaks == np.abs(X).max(0)).all() and len(alone.X) == 200


def test_of_equal_errors_the_first_wins_whatever_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """The later candidates may be done sooner."""
    X, V, W = _case()
    loudest = np.abs(np.hstack([V, W])).max(1)
    best = factors(np.abs(X).max(0), loudest, 0.5)
    found = []
    for cores in (1, 4):
        monkeypatch.setattr(threads, "cores", lambda cores=cores: cores)
        made = {}
        for delay, name in ((0.02, "first"), (0.0, "second"), (0.0, "third")):

            def slow(trial: Trial, delay: float = delay) -> np.ndarray:
                time.sleep(delay)
                return best

            made[name] = slow
        trials = _whole(X, np.ones(200))
        found.append(search(trials, [(V, INT8), (W, INT8)], made, _read))
    assert found[0] == found[1] and found[0].alpha == "first"
