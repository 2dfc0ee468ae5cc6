"""Ranges of values that lie mostly to one side of 0: behind GELU, Hardswish and ReLU, or where a
channel has its outliers.

Around 0, half of the codes would stand for nothing. `centered` gives a range around another middle,
from the least value to a clip that the calibrator chooses. TensorRT takes no zero points, but a
middle that is subtracted before QuantizeLinear and given back with the bias (`onnxq.centers`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.bins import MagnitudeBins
from onnxq.calibrate.ranges import LEAST, choose, levels, mse_clips, mse_errors, parse
from onnxq.calibrate.statistics import Amax, Histogram
from onnxq.formats import quant_format

Floats = NDArray[np.float64]

_ONE_SIDED = 0.75  # of the longer side: what the shorter is at most where a range gets a middle


def centered(found: Amax, method: str, format_name: str = "int8") -> tuple[int, float] | None:
    """(offset, reach) of a range that lies to one side of 0; None where 0 is as good a middle.

    The range goes from the least value seen on the shorter side to the clip of `method` on the
    longer. Its middle is `offset` steps from 0, a whole number, so that 0 keeps a code of its own:
    where an outlier makes steps of 12 and most values are below 1 (SmolLM2's layer 11), a grid
    that misses 0 by half a step takes the perplexity from 22 to 32.

    Magnitudes say nothing of signs: up to the shorter side's end both sides' values are taken for
    the longer one's, which moves no clip that lies beyond.

    Args:
        found: a Histogram, unless the method is max.
        format_name: of integers: a float format's codes are dense around 0 and nowhere else.

    Raises:
        OnnxqError: an unknown method, or a number that it does not take.
    """
    kind, number = parse(method)
    low, high = min(found.low, 0.0), max(found.high, 0.0)
    longer, shorter = max(high, -low), min(high, -low)
    fmt = quant_format(format_name)
    if fmt.is_float or found.amax < LEAST or shorter > _ONE_SIDED * longer:
        return None
    top: float | None = longer
    if kind == "mse":
        assert isinstance(found, Histogram)
        top = _one_sided_mse(found.bins, longer, shorter, levels(format_name), number)
    elif kind != "max":
        assert isinstance(found, Histogram)
        top = max(choose(found, method, format_name), shorter)
    if top is None:
        return None
    offset, reach = (float(v) for v in _grid(np.float64(top), shorter, fmt.qmax))
    return int(offset if high >= -low else -offset), reach


def around(low: float, high: float, tops: Floats, last: float) -> list[tuple[int, float]]:
    """(offset, reach) of the ranges from the shorter side's end to each of `tops` on the longer.

    Empty where 0 is as good a middle; see `centered`.
    """
    longer, shorter = max(high, -low, 0.0), max(min(high, -low), 0.0)
    if shorter > _ONE_SIDED * longer:
        return []
    offsets, reaches = _grid(tops[tops >= shorter], shorter, last)
    sign = 1 if high >= -low else -1
    return [(sign * int(o), float(r)) for o, r in zip(offsets, reaches, strict=True)]


def _grid(top: Any, shorter: float, last: float) -> tuple[Any, Any]:
    """(offset, reach) of the finest codes from -last to last over [-shorter, top], 0 among them."""
    fewer = np.floor(last * (top - shorter) / (top + shorter))
    more = np.minimum(fewer + 1, last)
    steps = [
        np.maximum(top / (last + offset), shorter / np.maximum(last - offset, 1e-9))
        for offset in (fewer, more)
    ]
    take = steps[1] < steps[0]
    return np.where(take, more, fewer), last * np.where(take, steps[1], steps[0])


def _one_sided_mse(
    bins: MagnitudeBins, longer: float, shorter: float, grid: Floats, clipped: float
) -> float | None:
    """The upper end of least squared error; None where a range around 0 has less."""
    clips = mse_clips()
    around = mse_errors(bins, longer, clips[:, None] * grid, clipped).min()
    tops = clips[clips * longer >= shorter]
    last = grid.size - 1
    offset, reach = _grid(tops, shorter / longer, last)
    codes = np.arange(-last, last + 1)
    errors = mse_errors(bins, longer, (reach / last)[:, None] * (offset[:, None] + codes), clipped)
    best = int(np.argmin(errors))
    return float(tops[best] * longer) if errors[best] < around else None
