"""The range of a layer's input by the error of what the layer makes of it.

Histograms count values; what reaches the outputs is their product with the weights, token by
token. And a norm behind it gives every token the same size: an error of a tenth of its output is as
bad for a quiet token as for the loudest. So each row's error is taken over its own output's power.
Of these shares the root mean square is wanted small, not the mean: a few tokens of a hundred times
the others' size hold a language model together (attention sinks), and none of them may be lost so
that the many gain a little.
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


def powers(counts: Matrix, Y: Matrix) -> NDArray[np.float64]:
    """What the squared error of each row is to be taken over [R].

    Args:
        counts: how many rows each stands for [R].
        Y: the layers' outputs [R, N].
    """
    power = np.einsum("rn,rn->r", Y, Y, dtype=np.float64)
    mean = float(np.average(power, weights=counts)) or 1.0
    return np.asarray(np.maximum(power, _LEAST_POWER * mean))


def row_error(E: Matrix, power: Matrix, counts: Matrix) -> float:
    """The root mean square of the rows' shares |E_r|^2 / power_r."""
    each = np.einsum("rn,rn->r", E, E, dtype=np.float64) / power
    return float(np.sqrt(np.average(each**2, weights=counts)))


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
    power = powers(counts, exact)
    return [row_error(rounded(X, *found, fmt) @ V - exact, power, counts) for found in ranges]
