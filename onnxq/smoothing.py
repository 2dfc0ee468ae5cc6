"""The step `smoothquant` on one input: what its alphas would cost, tried on rows of the data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from onnxq import numerics
from onnxq.algorithms import smoothquant
from onnxq.algorithms.clip import rounded
from onnxq.algorithms.smoothquant import Trial
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
Factors = Callable[[Trial], FloatArray]


@dataclass(frozen=True)
class Weights:
    """Those of the layers that read one input.

    Attributes:
        loudest: max |w_j| of each of its channels, in all of them [K].
        matrices: reads each W [K, N], and how it will be stored.
    """

    loudest: FloatArray
    matrices: Callable[[], Sequence[tuple[FloatArray, QuantScheme]]]


def search_factors(
    fold: Fold, weights: Weights, recipe: Recipe, table: CalibrationTable, fit: Fit
) -> tuple[FloatArray | None, str]:
    """The factors for one input, None where none help; and why, in words.

    Args:
        weights: of every layer that reads it; read only if there is something to search.
        fit: brings factors to within what 16 bits hold.
    """
    name = fold.tensor.name
    peaks, ties = table.channels(name), fold.ties()

    def candidate(alpha: float, of: FloatArray) -> FloatArray:
        return fit(smoothquant.factors(of, weights.loudest, alpha, ties))

    if recipe.alpha is not None:
        return candidate(recipe.alpha, peaks), f"alpha {recipe.alpha:.2f} as the recipe says"

    def by_peaks(alpha: float) -> Factors:
        return lambda trial: candidate(alpha, trial.peaks)

    def by_ordinary(alpha: float) -> Factors:
        return lambda trial: candidate(alpha, _ordinary(trial))

    rows, counts = table.rows(name)
    trials = smoothquant.halved(rows, counts, *table.halves(name))
    candidates = {f"alpha {a:.2f}": by_peaks(a) for a in smoothquant.ALPHAS}
    if recipe.mode == "static" and all(_ordinary(trial).any() for trial in trials):
        more = {f"alpha {a:.2f} of ordinary rows": by_ordinary(a) for a in smoothquant.ALPHAS}
        candidates |= more
    read = input_rounding(recipe)
    found = smoothquant.search(trials, weights.matrices(), candidates, read)
    if found.alpha is None:
        return None, f"no alpha lowers the output error of {decibels(found.before)}"
    said = f"output error {decibels(found.before)} to {decibels(found.after)}"
    everything = Trial(rows, counts, peaks, rows, counts)
    return candidates[found.alpha](everything), f"{found.alpha}, {said}"


def _ordinary(trial: Trial) -> FloatArray:
    """max |x| of each channel over the rows that are seen and are none of the loudest [K]."""
    return np.asarray(np.abs(trial.seen[trial.seen_counts > 1]).max(axis=0, initial=0))


def input_rounding(recipe: Recipe) -> Callable[[Trial, FloatArray], list[FloatArray]]:
    """What a recipe may make of a trial's rows divided by s [K], by what the trial has seen."""
    fmt = recipe.activation_format
    assert fmt is not None  # the recipe was checked

    def dynamic(trial: Trial, s: FloatArray) -> list[FloatArray]:
        rows = _over(trial.X, s)
        step = np.maximum(np.abs(rows).max(axis=1, keepdims=True), np.float32(1e-30)) / fmt.qmax
        return [np.asarray(numerics.nearest(rows / step, fmt) * step)]

    def by_output(trial: Trial, s: FloatArray) -> list[FloatArray]:
        """Ranges of all rows, of the ordinary ones, and between."""
        low, high = _extremes(trial, s)
        whole = max(high, -low)
        ordinary = _over(trial.seen[trial.seen_counts > 1], s)
        usual = float(np.abs(ordinary).max(initial=0)) or whole
        tops = np.array([whole, (whole * usual) ** 0.5, usual])
        tried = [(0, float(top)) for top in tops]
        if recipe.center:
            tried += around(low, high, tops, fmt.qmax)
        return [rounded(_over(trial.X, s), *each, fmt) for each in tried]

    def static(trial: Trial, s: FloatArray) -> list[FloatArray]:
        found, method = _counted(trial, s), recipe.calibrator
        middle = centered(found, method, recipe.activations) if recipe.center else None
        if middle is not None:
            offset, reach = middle
        elif method == "max":
            offset, reach = 0, float((trial.peaks / s).max())
        else:
            offset, reach = 0, choose(found, method, recipe.activations)
        return [rounded(_over(trial.X, s), offset, reach, fmt)]

    if recipe.mode == "dynamic":
        return dynamic
    return by_output if recipe.calibrator == "output" else static


def _over(rows: FloatArray, s: FloatArray) -> FloatArray:
    return np.asarray(rows / s, np.float32)


def _peaks(trial: Trial, s: FloatArray) -> FloatArray:
    """The largest value of each channel over s, with the sign it has among the rows [K]."""
    above = trial.seen.max(axis=0) >= -trial.seen.min(axis=0)
    return np.asarray(np.where(above, trial.peaks, -trial.peaks) / s, np.float32)


def _extremes(trial: Trial, s: FloatArray) -> tuple[float, float]:
    values = np.concatenate([_over(trial.seen, s).reshape(-1), _peaks(trial, s)])
    return float(values.min()), float(values.max())


def _counted(trial: Trial, s: FloatArray) -> Histogram:
    """A histogram of the rows that are seen, each as often as it counts, and of the peaks."""
    total, rows = Histogram(), _over(trial.seen, s)
    total.update(_peaks(trial, s))
    for count in np.unique(trial.seen_counts):
        part = Histogram()
        part.update(rows[trial.seen_counts == count])
        part.bins.counts *= max(1, round(float(count)))
        total.merge(part)
    return total
