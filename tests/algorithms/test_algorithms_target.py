"""The corrected target, against least squares on the rows themselves."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq.algorithms.target import corrected_target


def _rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.standard_normal((400, 24)) @ rng.standard_normal((24, 24))
    Y = X + rng.standard_normal((400, 24))  # what rounded layers make of it
    return X, Y, rng.standard_normal((24, 7)).astype(np.float32)


def test_it_is_ridge_regression_drawn_to_the_weight() -> None:
    X, Y, W = _rows()
    damp, n = 0.3, len(X)
    found = corrected_target(W, Y.T @ Y / n, Y.T @ X / n, damp)
    pull = np.sqrt(damp * np.mean(np.sum(Y**2, axis=0)) * np.eye(24))
    rows, wanted = np.concatenate([Y, pull]), np.concatenate([X @ W, pull @ W])
    expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)  # it is float32


def test_its_output_is_nearer_on_other_rows_too() -> None:
    """Of inputs that are mixed as well as noisy; the mixing can be undone."""
    X, Y, W = _rows()
    Y = Y @ (np.eye(24) + 0.1 * np.random.default_rng(1).standard_normal((24, 24)))
    seen, n = slice(0, 300), 300
    T = corrected_target(W, Y[seen].T @ Y[seen] / n, Y[seen].T @ X[seen] / n)
    error = [np.sum((X[300:] @ W - Y[300:] @ V) ** 2) for V in (W, T)]
    assert error[1] < 0.8 * error[0]


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_where_nothing_was_rounded_it_is_the_weight(scale: float) -> None:
    X, _, W = _rows()
    H = scale * X.T @ X / len(X)
    np.testing.assert_allclose(corrected_target(W, H, H), W, rtol=1e-4, atol=1e-5)
