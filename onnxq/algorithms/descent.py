"""Coordinate descent: every rounded weight is looked at again, given all the others.

For y = x W, the codes minimise f(V) = tr((V - W)^T H (V - W)). With all but input k fixed, f is
least at v_k = v_k - (H (V - W))_k / H_kk, rounded: one pass does that for every input in turn, so f
never rises (CDQuant, arXiv:2406.17542, is this with other orders). It starts where GPTQ ended.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import numerics
from onnxq.formats import QuantFormat

Matrix = NDArray[Any]

_LAZY = 64  # inputs whose changes reach all others in one matrix product


def descend(
    grid: Matrix,
    W: Matrix,
    step: Matrix,
    H: Matrix,
    fmt: QuantFormat,
    passes: int = 2,
    keep: Matrix | None = None,
    zero: Matrix | None = None,
) -> NDArray[np.float32]:
    """Values of the format, in units of a step, of no larger f than `grid`: [K, N].

    Args:
        grid: where to start [K, N].
        step: what a code is worth: [K, N], or [1, N], or a scalar.
        H: [K, K]; inputs whose H_kk is 0 are left as they are.
        keep: the weights that may be other than zero [K, N]; None: all.
        zero: zero points of asymmetric formats, shaped like `step`.
    """
    K, grid = W.shape[0], np.array(grid, np.float32)
    wide = np.broadcast_to(step, W.shape)
    middle = None if zero is None else np.broadcast_to(zero, W.shape)
    gradient = H.astype(np.float32) @ (grid * wide - W)
    diagonal = np.diag(H).astype(np.float32)
    for _ in range(passes):
        for low in range(0, K, _LAZY):
            high = min(low + _LAZY, K)
            near = H[low:high, low:high].astype(np.float32)
            own = gradient[low:high].copy()
            moved = np.zeros_like(own)
            for k in range(low, high):
                if diagonal[k] <= 0:
                    continue
                wanted = grid[k] - own[k - low] / (diagonal[k] * wide[k])
                found = numerics.nearest(wanted, fmt, None if middle is None else middle[k])
                if keep is not None:
                    found = np.where(keep[k], found, 0)
                moved[k - low] = (found - grid[k]) * wide[k]
                grid[k] = found
                own += np.outer(near[:, k - low], moved[k - low])
            gradient += H[:, low:high].astype(np.float32) @ moved
    return grid
