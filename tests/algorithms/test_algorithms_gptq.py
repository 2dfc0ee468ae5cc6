"""GPTQ and the scale search, against textbook forms written out here."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq import numerics
from onnxq.algorithms.descent import descend
from onnxq.algorithms.gptq import Sweep
from onnxq.algorithms.hessian import damped, inverse_factor, output_error, output_errors
from onnxq.algorithms.search import search_ranges, search_scales
from onnxq.formats import PerBlock, PerChannel, QuantScheme, quant_format

INT4 = QuantScheme(quant_format("int4"), PerBlock(0, 32), "float16")
INT8 = QuantScheme(quant_format("int8"), PerChannel(1), "float32")
FP8 = QuantScheme(quant_format("fp8"), PerChannel(1), "float32")
NVFP4 = QuantScheme(quant_format("nvfp4"), PerBlock(0, 16), "float8_e4m3fn", 2.0**-5)


def _weight(k: int, n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((k, n)).astype(np.float32)


def _ar1(k: int, rho: float) -> np.ndarray:
    """Covariance of an AR(1) process: rho^|i - j|."""
    return rho ** np.abs(np.subtract.outer(np.arange(k), np.arange(k)))


def _steps(W: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    scale = numerics.scales_for(numerics.peaks(W, scheme.granularity), scheme)
    return np.broadcast_to(numerics.steps(scale, scheme, W.shape), W.shape)


def _nearest(W: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    step = _steps(W, scheme)
    return numerics.nearest(W / step, scheme.format) * step


def _swept(W: np.ndarray, H: np.ndarray, scheme: QuantScheme, **options: float) -> np.ndarray:
    step = _steps(W, scheme)
    return Sweep(H, **options).round(W, step, scheme.format) * step


def _error(Q: np.ndarray, W: np.ndarray, H: np.ndarray) -> float:
    E = (Q - W).astype(np.float64)
    return float(np.trace(E.T @ H @ E))


@pytest.mark.parametrize(("rho", "bar"), [(0.9, 0.3), (0.99, 0.1)])
def test_on_correlated_inputs_it_beats_rounding_by_far(rho: float, bar: float) -> None:
    """The no-op that sweeps with the column of the factor has a ratio of exactly 1."""
    H, W = _ar1(256, rho), _weight(256, 64, 0)
    assert _error(_swept(W, H, INT4), W, H) <= bar * _error(_nearest(W, INT4), W, H)


@pytest.mark.parametrize("scheme", [INT4, INT8, FP8, NVFP4], ids=lambda s: s.format.name)
def test_on_uncorrelated_inputs_it_is_rounding(scheme: QuantScheme) -> None:
    W = _weight(160, 24, 1)
    H = np.diag(np.random.default_rng(2).uniform(0.1, 9.0, 160))
    np.testing.assert_array_equal(_swept(W, H, scheme), _nearest(W, scheme))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("size", [40, 200])
def test_it_is_the_algorithm_as_it_is_written(size: int, act_order: bool) -> None:
    """Against one input at a time, each followed by the best correction of all that are left.

    After inputs S are fixed with total error E_S, the least-squares correction of the others F is
    -(H_FF)^-1 H_FS E_S: no Cholesky factor, no lazy blocks. The sweep's float32 moves a weight by
    1e-6 of it, which changes a code only next to a tie: 1 in 1,000 may differ.
    """
    rng = np.random.default_rng(3)
    X = rng.standard_normal((4 * size, size)) @ rng.standard_normal((size, size))
    H, W = X.T @ X / len(X), _weight(size, 8, 4)
    step = _steps(W, INT4)
    found = Sweep(H, damp=0.01, act_order=act_order).round(W, step, INT4.format)

    Hd = damped(H, 0.01)
    order = np.argsort(-np.diag(H), kind="stable") if act_order else np.arange(size)
    expected = np.zeros_like(W)
    current = W.astype(np.float64)
    for i, k in enumerate(order):
        expected[k] = np.clip(np.rint(current[k] / step[k]), -8, 7)
        fixed, free = order[: i + 1], order[i + 1 :]
        if len(free):
            E = expected[fixed] * step[fixed] - W[fixed]
            correction = np.linalg.solve(Hd[np.ix_(free, free)], Hd[np.ix_(free, fixed)] @ E)
            current[free] = W[free] - correction
    assert np.mean(found != expected) <= 1e-3


def test_the_factor_is_that_of_the_inverse() -> None:
    X = np.random.default_rng(5).standard_normal((300, 50))
    H = X.T @ X
    U = inverse_factor(H)
    assert np.array_equal(U, np.triu(U))
    np.testing.assert_allclose(U.T @ U, np.linalg.inv(H), rtol=1e-9, atol=1e-12)


def test_inputs_that_are_always_zero_are_rounded_to_nearest() -> None:
    W, H = _weight(64, 8, 6), _ar1(64, 0.9)
    dead = [3, 40]
    H[dead] = 0
    H[:, dead] = 0
    Q = _swept(W, H, INT4)
    np.testing.assert_array_equal(Q[dead], _nearest(W, INT4)[dead])
    assert np.isfinite(Sweep(np.zeros((8, 8))).U).all()


def test_output_errors_are_those_of_the_outputs() -> None:
    rng = np.random.default_rng(7)
    X, E = rng.standard_normal((500, 20)), rng.standard_normal((20, 5))
    expected = np.mean((X @ E) ** 2, axis=0)
    np.testing.assert_allclose(output_errors(E, X.T @ X / len(X)), expected, rtol=1e-12)
    assert output_error(E, X.T @ X / len(X)) == pytest.approx(expected.sum(), rel=1e-12)


@pytest.mark.parametrize("scheme", [INT4, INT8, FP8, NVFP4], ids=lambda s: s.format.name)
def test_searched_scales_are_never_worse_and_mostly_better(scheme: QuantScheme) -> None:
    W = _weight(128, 48, 8)
    W[5] *= 20  # an outlier that amax follows
    h = np.ones(128, np.float32)
    h[5] = 1e-4  # and that hardly matters
    peak = numerics.peaks(W, scheme.granularity)
    plain = numerics.scales_for(peak, scheme)
    found = search_scales(W, h, peak, scheme)
    assert found.dtype == plain.dtype
    assert found.shape == plain.shape

    def error(scale: np.ndarray) -> np.ndarray:
        step = numerics.steps(scale, scheme, W.shape)
        return h[:, None] * (numerics.nearest(W / step, scheme.format) * step - W) ** 2

    # Under each scale by itself: columns, or columns of a block.
    size = scheme.granularity.size if isinstance(scheme.granularity, PerBlock) else 128
    by_scale = [error(s).reshape(-1, size, 48).sum(1) for s in (found, plain)]
    assert (by_scale[0] <= by_scale[1] * (1 + 1e-6)).all()
    assert by_scale[0].sum() < 0.9 * by_scale[1].sum()


def test_scales_stay_within_their_type() -> None:
    """A multiple of the largest scale that FP16 holds is no candidate; smaller ones still are."""
    scheme = QuantScheme(quant_format("int4"), PerBlock(0, 16), "float16")
    W = np.full((32, 2), 65504.0 * 7, np.float32)
    W[16:] = np.random.default_rng(9).standard_normal((16, 2))
    scale = search_scales(W, np.ones(32), numerics.peaks(W, scheme.granularity), scheme)
    assert np.isfinite(scale.astype(np.float32)).all()
    assert (scale[0] == 65504).all()


UINT4 = QuantScheme(quant_format("uint4"), PerBlock(0, 16), "float16")


def _uneven(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight whose blocks lie off zero, what a code of each element is worth, and its zero."""
    W = _weight(64, 24, seed) + np.repeat(_weight(4, 24, seed + 1), 16, axis=0)
    low, high = numerics.extremes(W, UINT4.granularity)
    scale, zero = numerics.scales_and_zeros(low, high, UINT4)
    return W, numerics.steps(scale, UINT4, W.shape), numerics.zeros(zero, UINT4, W.shape)


def test_zero_points_on_a_diagonal_h_are_rounded_to_nearest() -> None:
    """By hand: round(w / s) + z within 0 and 15, less z."""
    W, step, zero = _uneven(11)
    H = np.diag(np.arange(1.0, 65.0))
    expected = np.clip(np.rint(W / step) + zero, 0, 15) - zero
    for found in (
        Sweep(H, damp=0.0).round(W, step, UINT4.format, zero=zero),
        descend(expected, W, step, H, UINT4.format, zero=zero),
    ):
        np.testing.assert_array_equal(found, expected)


def test_zero_points_gain_from_a_correlated_h() -> None:
    W, step, zero = _uneven(12)
    H = _ar1(64, 0.9)
    near = np.clip(np.rint(W / step) + zero, 0, 15) - zero
    swept = Sweep(H).round(W, step, UINT4.format, zero=zero)
    again = descend(swept, W, step, H, UINT4.format, zero=zero)
    for grid in (swept, again):
        assert set(np.unique(grid + zero)) <= set(range(16))
    errors = [output_errors(grid * step - W, H).sum() for grid in (near, swept, again)]
    assert errors[1] < 0.4 * errors[0] and errors[2] <= errors[1]


def test_searched_ranges_are_never_worse_and_mostly_better() -> None:
    W, _, _ = _uneven(13)
    W[5] *= 20
    h = np.ones(64)
    h[5] = 1e-4
    low, high = numerics.extremes(W, UINT4.granularity)

    def errors(scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        wide, middle = np.repeat(scale.astype(np.float32), 16, 0), np.repeat(zero, 16, 0)
        middle = middle.astype(np.float32)
        codes = np.clip(np.rint(W / wide) + middle, 0, 15)
        error = h[:, None] * ((codes - middle) * wide - W) ** 2
        return error.reshape(4, 16, -1).sum(1)

    plain = errors(*numerics.scales_and_zeros(low, high, UINT4))
    found = errors(*search_ranges(W, h, low, high, UINT4))
    assert (found <= plain * (1 + 1e-6)).all()
    assert found.sum() < 0.9 * plain.sum()
