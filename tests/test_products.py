"""Products and largest magnitudes by blocks: numpy's own in float64, whole, are the oracle."""

from __future__ import annotations

from functools import reduce
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from onnxq import products, threads

RNG = np.random.default_rng(0)
TYPES: list[Any] = [np.float16, ml_dtypes.bfloat16, np.float32, np.float64]
each_type = pytest.mark.parametrize("dtype", TYPES, ids=lambda t: np.dtype(t).name)
Known = dict[tuple[bool, ...], np.ndarray]


def factors(*shapes: tuple[int, ...]) -> Known:
    """Factors whose products have more digits than FP32 holds."""
    made = [RNG.lognormal(0, 1, shape) for shape in shapes]
    return {tuple(n > 1 for n in f.shape): f for f in made}


def whole(values: np.ndarray, by: Known) -> np.ndarray:
    """values x factors in float64, at once."""
    each = [by[axes] for axes in sorted(by)]
    return np.asarray(reduce(np.multiply, each, values.astype(np.float64)))


def blocks(monkeypatch: pytest.MonkeyPatch, size: int, cores: int) -> None:
    monkeypatch.setattr(products, "_BLOCK", size)
    monkeypatch.setattr(products, "_BLOCKS_EACH", 1)
    monkeypatch.setattr(threads, "cores", lambda: cores)


@each_type
@pytest.mark.parametrize("size", [1, 7, 40, 100, 1 << 20])
def test_products_are_rounded_once_whatever_the_blocks(
    dtype: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = RNG.standard_normal((9, 8, 5)).astype(dtype)
    by = factors((9, 1, 1), (1, 8, 5), (1, 1, 1))
    for cores in (1, 3):
        blocks(monkeypatch, size, cores)
        made = products.multiplied(values, by, np.float32)
        assert made.dtype == np.float32
        np.testing.assert_array_equal(made, whole(values, by).astype(np.float32))


@each_type
@pytest.mark.parametrize("kept", list(product([False, True], repeat=3)))
def test_the_largest_are_those_along_the_other_axes(
    dtype: Any, kept: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = RNG.standard_normal((9, 8, 5)).astype(dtype)
    axes = tuple(i for i, keep in enumerate(kept) if not keep)
    for by in ({}, factors((9, 1, 1), (1, 1, 5))):
        wanted = np.abs(whole(values, by)).max(axis=axes, keepdims=True)
        for size, cores in ((1 << 20, 1), (1, 3), (7, 1), (45, 4)):
            blocks(monkeypatch, size, cores)
            found = products.largest(values, by, kept)
            assert found.dtype == np.float64
            np.testing.assert_array_equal(found, wanted)


@each_type
def test_every_16_bits_are_worth_what_they_are(dtype: Any) -> None:
    """Subnormal numbers, infinity and NaN too, among finite values or alone."""
    if np.dtype(dtype).itemsize > 2:
        values = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, -3e38], dtype)
    else:
        values = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    one = {(True,): np.ones(values.size)}
    with np.errstate(invalid="ignore", over="ignore"):
        wanted = values.astype(np.float32)
        np.testing.assert_array_equal(products.multiplied(values, one, np.float32), wanted)
        for by in ({}, one):
            found = products.largest(values, by, (True,))
            np.testing.assert_array_equal(found, np.abs(values.astype(np.float64)))
    finite = values[np.isfinite(wanted)]
    np.testing.assert_array_equal(products.multiplied(finite, {}, np.float64), finite)


@pytest.mark.parametrize("dtype", TYPES[:3], ids=lambda t: np.dtype(t).name)
@pytest.mark.parametrize("by", [{}, factors((6, 1))], ids=["alone", "scaled"])
def test_what_is_not_finite_is_not_overlooked(dtype: Any, by: Known) -> None:
    values = np.ones((6, 4), dtype)
    values[2, 1], values[3, 2], values[4, 2] = -np.inf, np.nan, np.inf
    found = products.largest(values, by, (False, True))[0]
    assert np.isfinite(found).tolist() == [True, False, False, True]
    assert np.isinf(found).tolist() == [False, True, False, False]
    assert np.isnan(products.largest(values, by, (False, False))).all()


def test_no_values_have_no_magnitude() -> None:
    empty = np.empty((0, 4), np.float16)
    assert products.multiplied(empty, {}, np.float32).shape == (0, 4)
    np.testing.assert_array_equal(products.largest(empty, {}, (False, True)), np.zeros((1, 4)))
    one = np.array(-3.0, np.float16)
    assert products.multiplied(one, {(): np.array(2.0)}, np.float32) == -6
    assert products.largest(one, {(): np.array(2.0)}, ()) == 6


def test_values_laid_out_otherwise_are_the_same() -> None:
    """Behind a Transpose, and repeated."""
    stored = RNG.standard_normal((5, 8)).astype(np.float16)
    for values in (stored.T, np.broadcast_to(stored[:, None], (5, 3, 8))):
        by = factors((1,) * (values.ndim - 1) + values.shape[-1:])
        made = products.multiplied(values, by, np.float32)
        np.testing.assert_array_equal(made, whole(values, by).astype(np.float32))
        kept = (True,) + (False,) * (values.ndim - 1)
        np.testing.assert_array_equal(
            products.largest(values, {}, kept).ravel(),
            np.abs(values.astype(np.float64)).reshape(len(values), -1).max(axis=1),
        )
