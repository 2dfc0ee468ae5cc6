"""Ranges by the error of what layers make of their input, each row by its own output."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.algorithms.clip import range_errors, rounded, shares
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
    each = shares(np.array([1.0, 3.0]), np.array([[3.0, 4.0], [30.0, 40.0]]))
    np.testing.assert_allclose(each, [1 / 4 / 25, 3 / 4 / 2500])


def test_a_row_of_nothing_does_not_decide() -> None:
    each = shares(np.ones(2), np.array([[0.0], [2.0]]))
    assert each[0] == pytest.approx(1 / 2 / (1e-3 * 2))


def test_one_giant_row_is_clipped_for_all_the_others() -> None:
    """Summed squares would keep the giant's range, and round the others to nothing."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 32)).astype(np.float32)
    X[0] *= 500
    W = rng.standard_normal((32, 16)).astype(np.float32)
    tried = [(0, float(np.abs(X).max())), (0, float(np.abs(X[1:]).max()))]
    whole, usual = range_errors(X, np.ones(400), W, W, tried, INT8)
    assert usual < whole / 50
    summed = [float(((rounded(X, *r, INT8) @ W - X @ W) ** 2).sum()) for r in tried]
    assert summed[0] < summed[1]
