"""The range of a layer's input by the error of what the layer makes of it.

Histograms count values; what reaches the outputs is their product with the weights, token by
token. And a norm behind it gives every token the same size: an error of a tenth of its output is as
bad for a quiet token as for the loudest. So each row's error counts by that row's own output: a few
tokens of a hundred times the others' size (attention sinks of language models) then get a clip if
all the others gain by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import numerics
from onnxq.formats import QuantFormat

Matrix = NDArray[Any]

_LEAST_POWER = 1e-3  # of the mean row's: what a row's power counts at least


def shares(counts: Matrix, Y: Matrix) -> NDArray[np.float64]:
    """What the squared error of each row counts [R]: as often as the row, over its power.

    Args:
        counts: how many rows each stands for [R].
        Y: the layers' outputs [R, N].
    """
    power = np.einsum("rn,rn->r", Y, Y, dtype=np.float64)
    mean = float(np.average(power, weights=counts)) or 1.0
    return np.asarray(counts / counts.sum() / np.maximum(power, _LEAST_POWER * mean))


def weighted(E: Matrix, each: Matrix) -> float:
    """sum_r each_r |E_r|^2."""
    return float(np.einsum("rn,rn,r->", E, E, each, dtype=np.float64, optimize=True))


def rounded(X: Matrix, offset: int, reach: float, fmt: QuantFormat) -> Matrix:
    """X quantized and back under a range of `reach` around `offset` steps."""
    step = np.float32(reach / fmt.qmax) or np.float32(1)
    middle = np.float32(offset * step)
    return np.asarray(numerics.nearest((X - middle) / step, fmt) * step + middle)


def range_errors(
    X: Matrix,
    counts: Matrix,
    W: Matrix,
    V: Matrix,
    ranges: Sequence[tuple[int, float]],
    fmt: QuantFormat,
) -> list[float]:
    """The error of Q(X) V against X W under each range (offset, reach).

    Args:
        X: rows of the input [R, K]; counts: how many rows each stands for [R].
        W: the weights of all layers that read it [K, N]; V: the same rounded.
    """
    exact = X @ W
    each = shares(counts, exact)
    return [weighted(rounded(X, *found, fmt) @ V - exact, each) for found in ranges]
