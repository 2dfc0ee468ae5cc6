"""SparseGPT: zeros chosen in GPTQ's sweep, made up for by the weights that stay.

Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
arXiv:2301.00774, algorithm 1, for y = x W with W [K, N] and U the upper Cholesky factor of H^-1: as
the sweep reaches a group of inputs, the weights stay whose loss w^2 / U_kk^2 would cost most; the
others become zero, and what each takes away the inputs still to come make up for.

With a format (section 3.5, "joint"), the weights that stay are rounded in the same sweep, and count
for what keeping them saves: (w^2 - (w - q)^2) / U_kk^2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import numerics
from onnxq.algorithms.gptq import Sweep
from onnxq.formats import QuantFormat
from onnxq.sparsity import Mask, Pattern

Matrix = NDArray[Any]

_SHARE_GROUP = 128
"""Inputs within which a share of each output's weights is chosen (the paper's B_s)."""


def sparsegpt(sweep: Sweep, W: Matrix, pattern: Pattern) -> tuple[NDArray[np.float32], Mask]:
    """The weight [K, N] with zeros, the others moved; and which may be other than zero.

    Args:
        sweep: its groups those of the pattern; of a share in the stored order, or the heavy inputs
            would lose as many weights as the light ones.
    """
    values = np.empty(W.shape, np.float32)
    keep = np.empty(W.shape, bool)

    def begin(k: int, rows: Matrix) -> None:
        inputs = sweep.order[k : k + len(rows)]
        keep[inputs] = _kept(sweep, k, np.abs(rows), pattern)

    def settle(k: int, row: Matrix) -> Matrix:
        values[k] = np.where(keep[k], row, 0)
        return np.asarray(values[k])

    sweep.run(W, settle, begin, pattern.group or _SHARE_GROUP)
    return values, keep


def sparsegpt_rounded(
    sweep: Sweep, W: Matrix, pattern: Pattern, step: Matrix, fmt: QuantFormat
) -> tuple[NDArray[np.float32], Mask]:
    """Pruned and rounded in one sweep: the format's values [K, N] in units of a step, and the mask.

    Args:
        step: what a code is worth: [K, N], or [1, N], or a scalar.
    """
    wide = np.broadcast_to(step, W.shape)
    grid = np.empty(W.shape, np.float32)
    keep = np.empty(W.shape, bool)

    def begin(k: int, rows: Matrix) -> None:
        inputs = sweep.order[k : k + len(rows)]
        rounded = numerics.nearest(rows / wide[inputs], fmt) * wide[inputs]
        saved = np.maximum(rows**2 - (rows - rounded) ** 2, 0)
        keep[inputs] = _kept(sweep, k, np.sqrt(saved), pattern)

    def settle(k: int, row: Matrix) -> Matrix:
        grid[k] = np.where(keep[k], numerics.nearest(row / wide[k], fmt), 0)
        return np.asarray(grid[k] * wide[k])

    sweep.run(W, settle, begin, pattern.group or _SHARE_GROUP)
    return grid, keep


def _kept(sweep: Sweep, k: int, sizes: Matrix, pattern: Pattern) -> Mask:
    """Of the group that begins at the k-th input: the largest sizes, each over its U_kk."""
    diagonal = np.diag(sweep.U)[k : k + len(sizes), None]
    return pattern.mask(sizes / diagonal)
