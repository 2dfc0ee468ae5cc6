"""AWQ: make the weights that meet large activations large before rounding, and undo it outside.

Lin et al., "AWQ: Activation-aware Weight Quantization", arXiv:2306.00978, section 3.2: x W =
(x / s)(s W); inputs with a large s keep more of their weights' digits. s = magnitude(x)^alpha, with
alpha searched. The paper scores an alpha by running the layer; here the error is tr(E^T H E), which
is the same number for the calibration data without running anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import numerics
from onnxq.algorithms.hessian import output_error
from onnxq.formats import QuantScheme
from onnxq.threads import in_order

Matrix = NDArray[Any]

ALPHAS = np.linspace(0.0, 1.0, 21)
"""Every other is tried, and then the best and its neighbours: what is gained is flat around it."""

_ENOUGH = 256  # output channels that tell the alphas apart, of which the first are tried

Weights = Sequence[tuple[Matrix, QuantScheme]]


def search_channel_scales(
    weights: Weights,
    H: Matrix,
    ties: Sequence[NDArray[np.int64]] = (),
) -> tuple[NDArray[np.float32], float]:
    """The channel scales s [K] of one input, and alpha; ones and 0.0 where nothing is gained.

    Args:
        weights: W [K, N] and how it is stored, of every layer that reads the input.
        H: X^T X / n [K, K]; its diagonal's root is the magnitude (the paper takes mean |x|).
        ties: channels that must share a scale (heads that read one key/value head).
    """
    magnitude = np.sqrt(np.maximum(np.diag(H).astype(np.float64), 0.0))
    magnitude = np.maximum(magnitude, magnitude.max() * 1e-4 or 1.0)
    for tied in ties:
        magnitude[tied] = np.exp(np.log(magnitude[tied]).mean())

    def scales(alpha: float) -> NDArray[np.float32]:
        s = magnitude**alpha
        return np.asarray(s / np.sqrt(s.max() * s.min()), np.float32)

    def errors(weights: Weights, alphas: NDArray[np.float64]) -> NDArray[np.float64]:
        def error(alpha: float) -> float:
            s = scales(alpha)
            return sum(output_error(_error(W, s, scheme), H) for W, scheme in weights)

        return np.array(list(in_order(error, alphas)))

    every = max(1, sum(W.shape[1] for W, _ in weights) // _ENOUGH)
    first = errors([(W[:, ::every], scheme) for W, scheme in weights], ALPHAS[::2])
    near = 2 * int(first.argmin())
    tried = ALPHAS[max(near - 1, 0) : near + 2]
    if every > 1 and near > 1 and first.min() > 0.9 * first[0]:
        tried = np.array([0.0, *tried])  # what gains little on some columns may gain nothing on all
    alpha = float(tried[errors(weights, tried).argmin()])
    return scales(alpha), alpha


def _error(W: Matrix, s: NDArray[np.float32], scheme: QuantScheme) -> Matrix:
    """Q(s W) / s - W."""
    scaled = W * s[:, None]
    scale = numerics.scales_for(numerics.peaks(scaled, scheme.granularity), scheme)
    step = numerics.steps(scale, scheme, W.shape)
    error = numerics.nearest(scaled / step, scheme.format)
    error *= step
    error /= s[:, None]
    error -= W
    return error
