"""AWQ's search, against running the layer."""

from __future__ import annotations

import numpy as np
import pytest

from onnxq import numerics
from onnxq.algorithms import awq
from onnxq.algorithms.awq import ALPHAS, search_channel_scales
from onnxq.formats import PerBlock, QuantScheme, quant_format

INT4 = QuantScheme(quant_format("int4"), PerBlock(0, 32), "float16")


def _layer(seed: int, sizes: tuple[int, ...] = (16, 24)) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((600, 64)).astype(np.float32)
    X[:, ::9] *= 30  # a few loud channels
    return X, [rng.standard_normal((64, n)).astype(np.float32) for n in sizes]


def _run(X: np.ndarray, W: np.ndarray, s: np.ndarray) -> float:
    """Squared output error of the layer with x / s and the rounded s W."""
    scaled = W * s[:, None]
    scale = numerics.scales_for(numerics.peaks(scaled, INT4.granularity), INT4)
    codes = numerics.quantize(scaled, scale, INT4)
    return float(np.sum(((X / s) @ numerics.dequantize(codes, scale, INT4) - X @ W) ** 2))


@pytest.mark.parametrize("seed", [0, 1])  # the best is one of the first tried; a neighbour
def test_it_finds_the_best_alpha_of_its_grid(seed: int) -> None:
    X, weights = _layer(seed)
    s, alpha = search_channel_scales([(W, INT4) for W in weights], X.T @ X / len(X))
    loud = np.sqrt(np.mean(X**2, axis=0))
    tried = {}
    for each in ALPHAS:
        t = loud**each / np.sqrt((loud**each).max() * (loud**each).min())
        tried[float(each)] = sum(_run(X, W, t.astype(np.float32)) for W in weights)
    best = min(tried, key=lambda a: tried[a])
    assert alpha == best > 0
    error = sum(_run(X, W, s) for W in weights)
    assert error < 0.5 * sum(_run(X, W, np.ones(64, np.float32)) for W in weights)
    np.testing.assert_allclose(error, tried[best], rtol=1e-3)


def test_of_a_wide_layer_most_alphas_are_tried_on_some_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is found is as good as the best of the grid on all, to a hundredth."""
    X, weights = _layer(4, (1200, 900))
    widths: list[int] = []
    plain = awq.output_error

    def seen(E: np.ndarray, H: np.ndarray) -> float:
        widths.append(E.shape[1])
        return plain(E, H)

    monkeypatch.setattr(awq, "output_error", seen)
    s, _ = search_channel_scales([(W, INT4) for W in weights], X.T @ X / len(X))
    loud = np.sqrt(np.mean(X**2, axis=0))
    least = min(
        sum(_run(X, W, (t / np.sqrt(t.max() * t.min())).astype(np.float32)) for W in weights)
        for t in (loud**alpha for alpha in ALPHAS)
    )
    assert sum(_run(X, W, s) for W in weights) < 1.01 * least
    assert sum(widths) < 6 * 2100


def test_channels_that_are_tied_get_one_scale() -> None:
    X, weights = _layer(1)
    ties = [np.arange(0, 32), np.arange(32, 64)]
    s, _ = search_channel_scales([(W, INT4) for W in weights], X.T @ X / len(X), ties)
    assert len({float(v) for v in s[:32]}) == 1
    assert len({float(v) for v in s[32:]}) == 1


def test_where_nothing_is_gained_nothing_is_scaled() -> None:
    """Weights that are on the grid already lose nothing as they are."""
    rng = np.random.default_rng(2)
    W = rng.integers(-7, 8, (64, 8)).astype(np.float32)
    W[::32] = 7
    H = np.diag(rng.uniform(0.1, 10, 64))
    s, alpha = search_channel_scales([(W, INT4)], H)
    assert alpha == 0.0
    assert (s == 1).all()


def test_dead_channels_do_no_harm() -> None:
    X, weights = _layer(3)
    X[:, 4] = 0
    s, _ = search_channel_scales([(W, INT4) for W in weights], X.T @ X / len(X))
    assert np.isfinite(s).all()
    assert (s > 0).all()
