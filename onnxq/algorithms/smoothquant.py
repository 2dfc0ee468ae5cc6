"""SmoothQuant: make the loud channels of an input quieter, and the weights that meet them larger.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language
Models", arXiv:2211.10438, section 4: x W = (x / s)(s W) with s_j = max|x_j|^alpha /
max|w_j|^(1 - alpha). Activations have one scale for all channels, so that one loud channel leaves
the others few codes; weights have a scale an output and can take the difference. The paper takes
one alpha for a model; here each input has its own, the one that errs least on rows of the data.

Which alpha that is must be asked of rows whose values did not make s. With alpha 1 each channel's
largest value is the range's end, so that in the data s was made of nothing is ever clipped, and
among other rows one in five is, in one channel or another: what measured 29 dB for a layer of
SmolLM2 on the rows it was chosen by cost the model ten times what 22 dB with alpha 0.5 did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq import numerics
from onnxq.algorithms.clip import powers, row_error
from onnxq.formats import QuantScheme
from onnxq.threads import in_order

Matrix = NDArray[Any]

ALPHAS = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


@dataclass(frozen=True)
class Trial:
    """Some of the data to judge by, and some that may be looked at for it.

    Attributes:
        X, counts: rows of the input [R, K], and how many each stands for [R].
        peaks: max |x| of each channel over all that may be looked at [K].
        seen, seen_counts: rows of it, as X and counts.
    """

    X: Matrix
    counts: Matrix
    peaks: Matrix
    seen: Matrix
    seen_counts: Matrix


Factors = NDArray[np.float64]


@dataclass(frozen=True)
class Smoothing:
    """What a search found.

    Attributes:
        alpha: what the best is called; None where none errs less than none.
        before, after: error of the layers' outputs over their power (see `clip.row_error`), as they
            are and smoothed.
    """

    alpha: str | None
    before: float
    after: float


def factors(
    peaks: Matrix, loudest: Matrix, alpha: float, ties: Sequence[NDArray[np.int64]] = ()
) -> NDArray[np.float64]:
    """s [K] of one alpha, its least and largest value as far below 1 as above.

    Args:
        peaks: max |x_j| [K].
        loudest: max |w_j| [K] in every layer that reads the input.
        ties: channels that must share a value; what they share is the largest of them.
    """
    a, w = np.asarray(peaks, np.float64), np.asarray(loudest, np.float64)
    a, w = (np.maximum(v, v.max() * 1e-4 or 1.0) for v in (a, w))
    s = a**alpha / w ** (1 - alpha)
    for tied in ties:
        s[tied] = s[tied].max()
    return np.asarray(s / np.sqrt(s.max() * s.min()))


def halved(X: Matrix, counts: Matrix, sides: Matrix, peaks: Matrix) -> list[Trial]:
    """Each half of the rows judged by what the other shows; all by all where one has no rows.

    Args:
        sides: which half each row is of [R], bool.
        peaks: max |x| of each half [2, K].
    """
    if sides.all() or not sides.any():
        return [Trial(X, counts, peaks.max(axis=0), X, counts)]
    return [
        Trial(X[side], counts[side], peaks[other], X[~side], counts[~side])
        for other, side in ((0, sides), (1, ~sides))
    ]


def search(
    trials: Sequence[Trial],
    weights: Sequence[tuple[Matrix, QuantScheme]],
    candidates: Mapping[str, Callable[[Trial], Factors]],
    quantized: Callable[[Trial, Factors], Iterable[Matrix]],
) -> Smoothing:
    """The alpha whose s gives the layers' outputs the least error, weights and input quantized.

    Args:
        weights: W [K, N] and how it is stored, of every layer that reads the input.
        candidates: what makes s [K] of what may be looked at, by what it is called.
        quantized: a trial and its s -> its X / s quantized and back, in every way that may be
            chosen.
    """
    exact = [trial.X @ np.hstack([W for W, _ in weights]) for trial in trials]
    both = powers(np.concatenate([t.counts for t in trials]), np.concatenate(exact))
    power = np.split(both, np.cumsum([len(t.X) for t in trials])[:-1])

    def error(factors_of: Callable[[Trial], Factors]) -> float:
        total = 0.0
        for trial, wanted, own in zip(trials, exact, power, strict=True):
            s = factors_of(trial)
            each = s.astype(np.float32)[:, None]
            stored = np.hstack([rounded_weight(W * each, scheme) for W, scheme in weights])
            found = [
                row_error(read @ stored - wanted, own, trial.counts) for read in quantized(trial, s)
            ]
            total += float(trial.counts.sum()) * min(found) ** 2
        return float(np.sqrt(total / sum(float(t.counts.sum()) for t in trials)))

    before = error(lambda trial: np.ones(trial.X.shape[1]))
    best = Smoothing(None, before, before)
    errors = in_order(error, candidates.values())
    for alpha, found in zip(candidates, errors, strict=True):
        if found < best.after:
            best = Smoothing(alpha, before, found)
    return best


def rounded_weight(W: Matrix, scheme: QuantScheme) -> Matrix:
    """Q(W) [K, N], rounded to nearest."""
    scale = numerics.scales_for(numerics.peaks(W, scheme.granularity), scheme)
    step = numerics.steps(scale, scheme, W.shape)
    return np.asarray(numerics.nearest(W / step, scheme.format) * step)
