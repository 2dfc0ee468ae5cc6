"""Coordinate descent: to a point that no single code improves."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq import numerics
from onnxq.algorithms.descent import descend
from onnxq.algorithms.gptq import Sweep
from onnxq.formats import PerBlock, PerChannel, QuantScheme, quant_format

SCHEMES = [
    QuantScheme(quant_format("int4"), PerBlock(0, 32), "float16"),
    QuantScheme(quant_format("fp8"), PerChannel(1), "float32"),
]


def _problem(scheme: QuantScheme, k: int = 96) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    W = rng.standard_normal((k, 16)).astype(np.float32)
    # No chain: on an AR(1) process, where one neighbour tells all, GPTQ leaves nothing to gain.
    X = rng.standard_normal((300, k // 2)) @ rng.standard_normal((k // 2, k))
    H = (X.T @ X + np.eye(k)) / 300
    scale = numerics.scales_for(numerics.peaks(W, scheme.granularity), scheme)
    return W, H, numerics.steps(scale, scheme, W.shape)


def _error(values: np.ndarray, W: np.ndarray, H: np.ndarray) -> float:
    E = (values - W).astype(np.float64)
    return float(np.trace(E.T @ H @ E))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.format.name)
def test_it_improves_on_rounding_and_on_gptq(scheme: QuantScheme) -> None:
    W, H, step = _problem(scheme)
    rounded = numerics.nearest(W / step, scheme.format)
    swept = Sweep(H).round(W, step, scheme.format)
    for start, bar in ((rounded, 0.75), (swept, 0.99)):
        found = descend(start, W, step, H, scheme.format)
        assert _error(found * step, W, H) < bar * _error(start * step, W, H)
        assert np.array_equal(numerics.nearest(found, scheme.format), found)


def test_it_ends_where_no_single_code_can_be_changed_for_the_better() -> None:
    W, H, step = _problem(SCHEMES[0])
    found = descend(np.zeros_like(W), W, step, H, SCHEMES[0].format, passes=50)
    least = _error(found * step, W, H)
    rng = np.random.default_rng(1)
    for k, n in zip(rng.integers(0, 96, 200), rng.integers(0, 16, 200), strict=True):
        for change in (-1, 1):
            other = found.copy()
            other[k, n] = np.clip(other[k, n] + change, -8, 7)
            assert _error(other * step, W, H) >= least * (1 - 1e-6)


def test_inputs_that_are_always_zero_stay() -> None:
    W, H, step = _problem(SCHEMES[0])
    H[5], H[:, 5] = 0, 0
    start = numerics.nearest(W / step, SCHEMES[0].format)
    found = descend(start, W, step, H, SCHEMES[0].format)
    np.testing.assert_array_equal(found[5], start[5])
    assert np.isfinite(found).all()
