"""Scales by least squares under the codes they have: what a code is worth, looked at again.

For y = x W, the values V = s G of codes G under the scales s minimise f = tr((V - W)^T H (V - W)).
With all but the scale s_b of one block of a column fixed, f is a parabola in it, least at

    s_b - (G_b^T H_b (V - W)) / (G_b^T H_bb G_b)

One sweep does that for every block in turn, so f never rises (COMQ, arXiv:2403.07134, has codes and
scales take turns likewise). Behind it the codes are worth another look: `descent`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import numerics
from onnxq.algorithms.search import within
from onnxq.formats import PerBlock, PerTensor, QuantScheme

Matrix = NDArray[Any]

SWEEPS = 3
"""Blocks answer to each other but weakly."""


def fit_scales(
    grid: Matrix, W: Matrix, scale: Matrix, H: Matrix, scheme: QuantScheme, sweeps: int = SWEEPS
) -> Matrix:
    """Scales in the scheme's type and shape, of no larger f than `scale`.

    Args:
        grid: the format's values in units of a step [K, N].
        W: [K, N].
        scale: of blocks along axis 0, or of columns; one of the whole weight stays as it is.
        H: [K, K].
    """
    if isinstance(scheme.granularity, PerTensor) or scale.ndim == 0:
        return scale
    K, N = W.shape
    size = scheme.granularity.size if isinstance(scheme.granularity, PerBlock) else K
    H = H.astype(np.float32)
    stored = np.array(scale).reshape(-1, N)
    gradient = H @ (grid * numerics.steps(scale, scheme, W.shape) - W)
    for _ in range(sweeps):
        for block, low in enumerate(range(0, K, size)):
            high = min(low + size, K)
            G = grid[low:high]
            slope = np.einsum("kn,kn->n", G, gradient[low:high], dtype=np.float64)
            curve = np.einsum("kn,kn->n", G, H[low:high, low:high] @ G, dtype=np.float64)
            before = stored[block].astype(np.float64) * scheme.unit
            change = np.divide(-slope, curve, out=np.zeros(N), where=curve > 0)
            after = _storable(before + change, before, scheme)
            change = after.astype(np.float64) * scheme.unit - before
            better = slope * change + curve * change**2 / 2 < 0
            change = np.where(better, change, 0)
            if better.any():
                stored[block] = np.where(better, after, stored[block])
                gradient += H[:, low:high] @ (G * change.astype(np.float32))
    return stored.reshape(np.shape(scale))


def _storable(wanted: Matrix, before: Matrix, scheme: QuantScheme) -> Matrix:
    """What comes nearest in the type of scales; what is far from before stays as it was."""
    fair = (wanted > before / 2) & (wanted < before * 2)
    peak = np.where(fair, wanted, before) * scheme.format.qmax
    return numerics.scales_for(within(peak, scheme), scheme)
