"""Ranges by the error of what layers make of their input, each row by its own output."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.algorithms.clip import powers, range_errors, rounded, row_error
from onnxq.formats import quant_format

INT8 = quant_format("int8")


def test_rounded_is_what_a_zero_point_would_give() -> None:
    x = np.linspace(-1, 9, 300).astype(np.float32)[:, None]
    step, offset = 10 / 254, 101
    codes = np.clip(np.rint(x / step) - offset, -127, 127)
    np.testing.assert_allclose(
        rounded(x, offset, 127 * step, INT8), (codes + offset) * step, atol=1e-5
    )
    np.testing.assert_allclose(rounded(x, 0, 1.0, INT8).max(), 1.0)


def test_a_row_counts_by_its_own_output() -> None:
    counts, Y = np.array([1.0, 3.0]), np.array([[3.0, 4.0], [30.0, 40.0]])
    power = powers(counts, Y)
    np.testing.assert_allclose(power, [25, 2500])
    found = row_error(np.array([[5.0, 0.0], [0.0, 5.0]]), power, counts)
    assert found == pytest.approx(np.sqrt((1**2 + 3 * 0.01**2) / 4))


def test_a_row_of_nothing_does_not_decide() -> None:
    np.testing.assert_allclose(powers(np.ones(2), np.array([[0.0], [2.0]])), [2e-3, 4])


def _tried(loudness: float, share: float) -> tuple[list[float], list[float]]:
    """Errors, by `range_errors` and in summed squares, of the whole range and of the usual one."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((1000, 32)).astype(np.float32)
    loud = int(share * 1000)
    X[:loud] *= loudness
    W = rng.standard_normal((32, 16)).astype(np.float32)
    tried = [(0, float(np.abs(X).max())), (0, float(np.abs(X[loud:]).max()))]
    summed = [float(((rounded(X, *r, INT8) @ W - X @ W) ** 2).sum()) for r in tried]
    return range_errors(X, np.ones(1000), W, W, tried, INT8), summed


def test_few_giant_rows_are_clipped_where_all_others_would_be_lost() -> None:
    """Summed squares would keep the giants' range, and round the others to nothing."""
    (whole, usual), summed = _tried(1000, 0.002)
    assert usual < whole / 10
    assert summed[0] < summed[1]


def test_no_row_is_lost_for_a_little_gain_of_the_others() -> None:
    (whole, usual), _ = _tried(10, 0.01)
    assert whole < usual / 3
