"""The calibrator `output`: a range for each tensor by the error of the layers that read it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxq.algorithms.clip import range_errors
from onnxq.algorithms.smoothquant import rounded_weight
from onnxq.calibrate.one_sided import around
from onnxq.calibrate.ranges import Range
from onnxq.calibrate.table import CalibrationTable
from onnxq.formats import QuantFormat
from onnxq.recipe import Recipe
from onnxq.rounding import weight_matrix
from onnxq.sites import Site

_STEPS = 2.0 ** (-np.arange(17) / 2)
"""Clips over the largest magnitude: eight octaves down."""


def output_range(
    sites: Sequence[Site], recipe: Recipe, table: CalibrationTable, center: bool
) -> Range:
    """The range of the tensor that linear layers share.

    Args:
        center: look for another middle than 0 too.
    """
    name, fmt = sites[0].node.inputs[0].name, recipe.activation_format
    assert fmt is not None  # a static recipe
    rows, counts = table.rows(name)
    low, high = table.extremes(name)
    tried = candidates(low, high, fmt, center)
    if not tried:
        return table.covered(name, "max", recipe.activations)
    weights = [weight_matrix(site, recipe) for site in sites]
    exact = np.hstack([W for W, _ in weights])
    stored = np.hstack([rounded_weight(W, scheme) for W, scheme in weights])
    errors = range_errors(rows, counts, exact, stored, tried, fmt)
    best = int(np.argmin(errors))
    plain = min((i for i, (offset, _) in enumerate(tried) if not offset), key=errors.__getitem__)
    found = Range(tried[plain][1], *(tried[best] if tried[best][0] else ()))
    return table.told(name, found, recipe.activations)


def candidates(low: float, high: float, fmt: QuantFormat, center: bool) -> list[tuple[int, float]]:
    """(offset, reach) of the ranges that are tried for values between low and high."""
    longer = max(high, -low, 0.0)
    tried = [(0, float(clip)) for clip in longer * _STEPS if clip > 0]
    if center and not fmt.is_float:
        tried += around(low, high, longer * _STEPS, fmt.qmax)
    return tried
