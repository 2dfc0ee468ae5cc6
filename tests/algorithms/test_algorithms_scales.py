"""Scales fitted to codes: to where no single one can be changed for the better."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq import numerics
from onnxq.algorithms.gptq import Sweep
from onnxq.algorithms.scales import fit_scales
from onnxq.formats import PerBlock, PerChannel, PerTensor, QuantScheme, quant_format

INT4 = QuantScheme(quant_format("int4"), PerBlock(0, 32), "float32")
SCHEMES = {
    "int4": INT4,
    "int4 with a shorter last block": QuantScheme(quant_format("int4"), PerBlock(0, 40), "float16"),
    "fp8": QuantScheme(quant_format("fp8"), PerChannel(1), "float32"),
    "nvfp4": QuantScheme(quant_format("nvfp4"), PerBlock(0, 16), "float8_e4m3fn"),
}


def _problem(scheme: QuantScheme, k: int = 96) -> tuple[np.ndarray, ...]:
    """W, H, codes by GPTQ and the scales they were rounded under."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((k, 12)).astype(np.float32)
    X = rng.standard_normal((300, k // 2)) @ rng.standard_normal((k // 2, k))
    H = (X.T @ X + np.eye(k)) / 300
    scale = numerics.scales_for(numerics.peaks(W, scheme.granularity), scheme)
    return W, H, Sweep(H).round(W, numerics.steps(scale, scheme, W.shape), scheme.format), scale


def _values(grid: np.ndarray, scale: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    """Code times scale, written out: the last block may be shorter."""
    wide = scale.astype(np.float64) * scheme.unit
    if isinstance(scheme.granularity, PerBlock):
        wide = np.stack([wide[k // scheme.granularity.size] for k in range(len(grid))])
    return grid * wide


def _error(values: np.ndarray, W: np.ndarray, H: np.ndarray) -> float:
    E = values - W
    return float(np.trace(E.T @ H @ E))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_output_error_falls(name: str) -> None:
    scheme = SCHEMES[name]
    if scheme.format.two_level:
        scheme = scheme.with_unit(2.0**-6)
    W, H, grid, scale = _problem(scheme)
    found = fit_scales(grid, W, scale, H, scheme)
    assert found.dtype == scale.dtype and found.shape == scale.shape and (found > 0).all()
    before = _error(_values(grid, scale, scheme), W, H)
    assert _error(_values(grid, found, scheme), W, H) < 0.995 * before


def test_it_ends_at_the_least_squares_solution() -> None:
    """Against the solution of each column's normal equations, where no bound is met."""
    W, H, grid, scale = _problem(INT4)
    found = fit_scales(grid, W, scale, H, INT4, sweeps=200)
    for n in range(W.shape[1]):
        basis = np.zeros((96, 3))
        for block in range(3):
            basis[32 * block : 32 * block + 32, block] = grid[32 * block : 32 * block + 32, n]
        best = np.linalg.solve(basis.T @ H @ basis, basis.T @ H @ W[:, n])
        np.testing.assert_allclose(found[:, n], best, rtol=2e-3)


def test_codes_that_are_exact_keep_their_scales() -> None:
    _, H, grid, scale = _problem(INT4)
    exact = _values(grid, scale, INT4).astype(np.float32)
    np.testing.assert_allclose(fit_scales(grid, exact, scale, H, INT4), scale, rtol=1e-4)


def test_blocks_of_zeros_and_inputs_that_are_zero_stay() -> None:
    W, H, grid, scale = _problem(INT4)
    grid[:32, 3] = 0
    H[32:64], H[:, 32:64] = 0, 0
    found = fit_scales(grid, W, scale, H, INT4)
    assert found[0, 3] == scale[0, 3]
    np.testing.assert_array_equal(found[1], scale[1])


def test_one_scale_of_the_whole_weight_stays() -> None:
    W, H, grid, _ = _problem(INT4)
    scheme = QuantScheme(quant_format("fp8"), PerTensor(), "float32")
    assert fit_scales(grid, W, np.float32(0.5), H, scheme) == np.float32(0.5)
