"""The step `smoothquant` on one input: what its alphas would cost, tried on rows of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxq import numerics
from onnxq.algorithms import smoothquant
from onnxq.algorithms.clip import rounded
from onnxq.calibrate.one_sided import around, centered
from onnxq.calibrate.ranges import choose
from onnxq.calibrate.statistics import Histogram
from onnxq.calibrate.table import CalibrationTable
from onnxq.formats import QuantScheme
from onnxq.graph.fold import Fold
from onnxq.numerics import FloatArray
from onnxq.recipe import Recipe
from onnxq.report import decibels

Fit = Callable[[FloatArray], FloatArray]
Weights = Sequence[tuple[FloatArray, QuantScheme]]


def search_factors(
    fold: Fold, weights: Weights, recipe: Recipe, table: CalibrationTable, fit: Fit
) -> tuple[FloatArray | None, str]:
    """The factors for one input, None where none help; and why, in words.

    Args:
        weights: W [K, N] and how it is stored, of every layer that reads it.
        fit: brings factors to within what 16 bits hold.
    """
    name = fold.tensor.name
    peaks, values, ties = table.channels(name), [W for W, _ in weights], fold.ties()

    def candidate(alpha: float, of: FloatArray) -> FloatArray:
        return fit(smoothquant.factors(of, values, alpha, ties))

    if recipe.alpha is not None:
        return candidate(recipe.alpha, peaks), f"alpha {recipe.alpha:.2f} as the recipe says"
    rows, counts = table.rows(name)
    ordinary = np.abs(rows[counts > 1]).max(axis=0, initial=0)
    candidates = {f"alpha {a:.2f}": candidate(a, peaks) for a in smoothquant.ALPHAS}
    if ordinary.any() and recipe.mode == "static":
        more = {
            f"alpha {a:.2f} of ordinary rows": candidate(a, ordinary) for a in smoothquant.ALPHAS
        }
        candidates |= more
    quantized = input_rounding(recipe, peaks, counts)
    found = smoothquant.search(rows, counts, weights, candidates, quantized)
    if found.alpha is None:
        return None, f"no alpha lowers the output error of {decibels(found.before)}"
    said = f"output error {decibels(found.before)} to {decibels(found.after)}"
    return found.s, f"{found.alpha}, {said}"


def input_rounding(
    recipe: Recipe, peaks: FloatArray, counts: FloatArray
) -> Callable[[FloatArray, FloatArray], list[FloatArray]]:
    """What a recipe may make of rows [R, K] that were divided by s [K].

    Args:
        peaks: max |x| of each channel over all data, before it was divided [K].
        counts: how many rows each stands for [R].
    """
    fmt = recipe.activation_format
    assert fmt is not None  # the recipe was checked

    def dynamic(rows: FloatArray, _: FloatArray) -> list[FloatArray]:
        step = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(1e-30)) / fmt.qmax
        return [np.asarray(numerics.nearest(rows / step, fmt) * step)]

    def by_output(rows: FloatArray, s: FloatArray) -> list[FloatArray]:
        """Ranges of all rows, of the ordinary ones, and between."""
        low, high = float(rows.min()), float(rows.max())
        whole = max(high, -low)
        usual = float(np.abs(rows[counts > 1]).max(initial=0)) or whole
        tops = np.array([whole, (whole * usual) ** 0.5, usual])
        tried = [(0, float(top)) for top in tops]
        if recipe.center:
            tried += around(low, high, tops, fmt.qmax)
        return [rounded(rows, *each, fmt) for each in tried]

    def static(rows: FloatArray, s: FloatArray) -> list[FloatArray]:
        found, method = _counted(rows, counts), recipe.calibrator
        middle = centered(found, method, recipe.activations) if recipe.center else None
        if middle is not None:
            offset, reach = middle
        elif method == "max":
            offset, reach = 0, float((peaks / s).max())
        else:
            offset, reach = 0, choose(found, method, recipe.activations)
        return [rounded(rows, offset, reach, fmt)]

    if recipe.mode == "dynamic":
        return dynamic
    return by_output if recipe.calibrator == "output" else static


def _counted(rows: FloatArray, counts: FloatArray) -> Histogram:
    """A histogram of rows, each counted as often as rows it stands for."""
    total = Histogram()
    for count in np.unique(counts):
        part = Histogram()
        part.update(rows[counts == count])
        part.bins.counts *= max(1, round(float(count)))
        total.merge(part)
    return total
