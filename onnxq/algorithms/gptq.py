"""GPTQ: round one input after another, and let the inputs still to come make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv:2210.17323, algorithm 1, for y = x W with W [K, N] (the paper's W is its transpose): with U
the upper Cholesky factor of H^-1, for each input k in turn

    e = (w_k - q_k) / U_kk;   W_j -= U_kj e   for the inputs j > k

that is row k of U. (Column k is zero below the diagonal: who takes that rounds to nearest.) Scales
are fixed before the sweep, and belong to the inputs in their stored order, so any order of the
sweep keeps the blocks as they are stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import numerics
from onnxq.algorithms.hessian import damped, inverse_factor
from onnxq.formats import QuantFormat

Matrix = NDArray[Any]

DAMP = 0.01
"""The paper's percdamp: added to the diagonal of H, as a share of its mean."""

_LAZY = 128  # inputs whose effect on all later ones is applied in one matrix product
_CLOSE = 16  # and on the rest of those: smaller, so that rows stay in the cache


class Sweep:
    """What depends on the input alone: made once for all layers that read it.

    Args:
        H: X^T X of the input, any multiple of it [K, K].
        damp: see `DAMP`.
        act_order: sweep the inputs by falling H_kk, the heavy ones while nothing has moved yet.

    Raises:
        LinAlgError: H is not finite, or not positive definite when damped.
    """

    def __init__(self, H: Matrix, damp: float = DAMP, act_order: bool = True) -> None:
        diagonal = np.diag(H)
        self.order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
        self.U = inverse_factor(damped(H[np.ix_(self.order, self.order)], damp)).astype(np.float32)

    def round(self, W: Matrix, step: Matrix, fmt: QuantFormat) -> NDArray[np.float32]:
        """The format's values, in units of a step, that W is rounded to.

        Args:
            W: [K, N] float32.
            step: what a code is worth: [K, N], or [1, N], or a scalar.
        """
        K = W.shape[0]
        rest = W[self.order].astype(np.float32)
        wide = np.broadcast_to(step, W.shape)
        by_row = wide.strides[0] != 0
        grid = np.empty_like(rest)
        for low in range(0, K, _LAZY):
            high = min(low + _LAZY, K)
            errors = np.empty((high - low, W.shape[1]), np.float32)
            for near in range(low, high, _CLOSE):
                far = min(near + _CLOSE, high)
                for k in range(near, far):
                    each = wide[self.order[k] if by_row else 0]
                    grid[k] = numerics.nearest(rest[k] / each, fmt)
                    error = (rest[k] - grid[k] * each) / self.U[k, k]
                    errors[k - low] = error
                    if k + 1 < far:
                        rest[k + 1 : far] -= np.outer(self.U[k, k + 1 : far], error)
                if far < high:
                    rest[far:high] -= self.U[near:far, far:high].T @ errors[near - low : far - low]
            if high < K:
                rest[high:] -= self.U[low:high, high:].T @ errors
        result = np.empty_like(grid)
        result[self.order] = grid
        return result
