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

from collections.abc import Callable
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


Settle = Callable[[int, Matrix], Matrix]
"""(input, its weights as errors before it left them [N]) -> what they become."""

Begin = Callable[[int, Matrix], None]
"""(first input of a group in the order of the sweep, the group's weights as they stand now)."""


class Sweep:
    """What depends on the input alone: made once for all layers that read it.

    Attributes:
        order: input taken k-th.
        U: upper Cholesky factor of H^-1 in that order.

    Args:
        H: X^T X of the input, any multiple of it [K, K].
        damp: see `DAMP`.
        act_order: sweep the inputs by falling H_kk, the heavy ones while nothing has moved yet.
        group: neighbours that stay together, and in their order.

    Raises:
        LinAlgError: H is not finite, or not positive definite when damped.
    """

    def __init__(
        self, H: Matrix, damp: float = DAMP, act_order: bool = True, group: int = 1
    ) -> None:
        diagonal = np.diag(H)
        self.order = np.arange(len(diagonal))
        if act_order:
            heads = np.argsort(-diagonal.reshape(-1, group).sum(axis=1), kind="stable") * group
            self.order = (heads[:, None] + np.arange(group)).reshape(-1)
        self.U = inverse_factor(damped(H[np.ix_(self.order, self.order)], damp)).astype(np.float32)

    def round(
        self,
        W: Matrix,
        step: Matrix,
        fmt: QuantFormat,
        keep: Matrix | None = None,
        zero: Matrix | None = None,
    ) -> NDArray[np.float32]:
        """The format's values, in units of a step, that W is rounded to.

        Args:
            W: [K, N] float32.
            step: what a code is worth: [K, N], or [1, N], or a scalar.
            keep: the weights that may be other than zero [K, N]; None: all.
            zero: zero points of asymmetric formats, shaped like `step`.
        """
        wide = np.broadcast_to(step, W.shape)
        middle = None if zero is None else np.broadcast_to(zero, W.shape)
        grid = np.empty(W.shape, np.float32)

        def settle(k: int, row: Matrix) -> Matrix:
            grid[k] = numerics.nearest(row / wide[k], fmt, None if middle is None else middle[k])
            if keep is not None:
                grid[k] = np.where(keep[k], grid[k], 0)  # not -0
            return np.asarray(grid[k] * wide[k])

        self.run(W, settle)
        return grid

    def run(self, W: Matrix, settle: Settle, begin: Begin | None = None, group: int = 1) -> None:
        """Settle all inputs one after another, and move those still to come.

        Args:
            begin: is called as each group of inputs is reached.
            group: inputs of a group, in the order of the sweep.
        """
        K = W.shape[0]
        close, lazy = _multiple(_CLOSE, group), _multiple(_LAZY, _multiple(_CLOSE, group))
        rest = W[self.order].astype(np.float32)
        for low in range(0, K, lazy):
            high = min(low + lazy, K)
            errors = np.empty((high - low, W.shape[1]), np.float32)
            for near in range(low, high, close):
                far = min(near + close, high)
                for k in range(near, far):
                    if begin is not None and k % group == 0:
                        begin(k, rest[k : k + group])
                    error = (rest[k] - settle(int(self.order[k]), rest[k])) / self.U[k, k]
                    errors[k - low] = error
                    if k + 1 < far:
                        rest[k + 1 : far] -= np.outer(self.U[k, k + 1 : far], error)
                if far < high:
                    rest[far:high] -= self.U[near:far, far:high].T @ errors[near - low : far - low]
            if high < K:
                rest[high:] -= self.U[low:high, high:].T @ errors


def _multiple(size: int, of: int) -> int:
    """The least multiple of `of` that is `size` or more."""
    return -(-size // of) * of
