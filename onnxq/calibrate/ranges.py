"""From a histogram to the range that a quantizer's codes shall cover.

The methods give the magnitude that the largest code stands for:

    max              the largest magnitude seen
    percentile:99.9  the magnitude that 99.9 % of the values do not exceed (99.99 when not said)
    entropy          the clip that keeps most of the distribution: smallest KL divergence
    mse              the clip with the smallest mean squared rounding and clipping error
    mse:2            the same, the squared error of a clipped value counting twice (or what is said)

A rounding error is as likely up as down and cancels in the sums of the layers behind; clipping
always errs towards zero. Counting it twice (INT8, static, data that the choice was not made with):

    figure                                       max     mse   mse:2   mse:4
    MiniLM-L6, SNR on two halves of its data    12.5    12.7    13.7    13.8  dB
    SmolLM2-135M, perplexity (15.04 in FP32)    32.4    22.3    24.0    25.1

Weighing each channel's error by its weights, which is what reaches the output, was worse on both
sides of that choice (11.3 to 12.7 dB on MiniLM): the channels of the outliers carry large weights,
and keep their maximum.

All of them are functions of the counts alone and so, like these, the same for any batch order.
The codes of a format are given as its non-negative values over its largest one: `levels("int8")`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.bins import TOP_BITS, MagnitudeBins
from onnxq.calibrate.statistics import Histogram
from onnxq.errors import OnnxqError
from onnxq.formats import quant_format

Floats = NDArray[np.float64]

METHODS = ("max", "percentile", "entropy", "mse")
_OPTIONS = {"percentile": 99.99, "mse": 1.0}  # what may follow the colon, when nothing does

# The clips that mse tries: max * 2^(-j/64) over eight octaves, 1.1 % apart, all lower ones being
# worse than some of these unless fewer than 1 in 2^16 values carry the maximum's whole energy.
_MSE_STEPS_PER_OCTAVE = 64
_MSE_OCTAVES = 8
LEAST = 2.0**-96  # maxima below it, zero above all, are not worth a search (nor binned for one)
_MOST_CLIPPED = 1000  # entropy clips 1 value in so many at most
_CLIPS_AT_ONCE = 512  # entropy's work space: 0.5 MB an array


@dataclass(frozen=True)
class Range:
    """What the codes of a tensor shall cover.

    Attributes:
        peak: the magnitude that the largest code stands for.
        offset, reach: of a range around another middle than 0, where that is better: how many
            steps it is from 0, and how far the largest code is from it.
        lost: the share of its channels, of those that are ever other than 0, that are always
            rounded to 0.
    """

    peak: float
    offset: int = 0
    reach: float = 0.0
    lost: float = 0.0


Ranges = dict[tuple[int, int], Range]
"""(id(node), input index) -> what the codes shall cover."""


def levels(name: str) -> Floats:
    """The non-negative values of a format over the largest: [n], from 0 to 1.

    Raises:
        OnnxqError: not a format that a range can be chosen for.
    """
    row = quant_format(name)
    if not row.is_float:
        return np.arange(row.qmax + 1.0) / row.qmax
    codes = np.arange(1 << row.bits, dtype=np.uint8).view(row.dtype()).astype(np.float64)
    return np.unique(codes[codes >= 0.0]) / row.qmax  # NaN is not >= 0


def choose(histogram: Histogram, method: str, format_name: str = "int8") -> float:
    """The clipping magnitude of `method` ("percentile:99.9"); 0.0 where all values are zero.

    Never above the largest magnitude seen.

    Raises:
        OnnxqError: an unknown method or format, or a number that the method does not take.
    """
    kind, number = parse(method)
    grid = levels(format_name)
    amax, bins = histogram.amax, histogram.bins
    if kind == "max" or amax < LEAST:
        return amax
    if kind == "percentile":
        clip = percentile(bins, number)
    elif kind == "entropy":
        clip = entropy(bins, amax, grid)
    else:
        clip = mse(bins, amax, grid, number)
    return min(clip, amax)


def parse(method: str) -> tuple[str, float]:
    """The name and the number of `percentile:99.9`; the number left out is the default, or 0.

    Raises:
        OnnxqError: no such method, or a number it does not take.
    """
    kind, colon, option = method.partition(":")
    if kind not in METHODS or (colon and kind not in _OPTIONS):
        raise OnnxqError(
            f"there is no calibration method {method!r}",
            f"choose among {', '.join(METHODS)} (percentile:99.9 for another than 99.99, mse:2)",
        )
    try:
        number = float(option) if colon else _OPTIONS.get(kind, 0.0)
    except ValueError:
        number = math.nan
    if kind == "percentile" and not 0.0 < number <= 100.0:
        raise OnnxqError(
            f"{option!r} is no percentile", "give a number above 0, up to 100: percentile:99.9"
        )
    if kind == "mse" and not 1.0 <= number < math.inf:
        raise OnnxqError(
            f"{option!r} is no weight of clipped values' errors", "give 1 or more: mse:2"
        )
    return kind, number


def percentile(bins: MagnitudeBins, share: float) -> float:
    """Upper edge of the bin that holds the value `share` percent of the values do not exceed."""
    cumulated = np.cumsum(bins.counts)
    # As numpy's method "inverted_cdf": the smallest value with at least this many at or below it.
    # In exact fractions: 40,000 x 99.9 / 100 in floats is a little more than 39,960.
    rank = max(math.ceil(int(cumulated[-1]) * Fraction(str(share)) / 100), 1)
    return float(bins.edges()[int(np.searchsorted(cumulated, rank)) + 1])


def entropy(bins: MagnitudeBins, amax: float, grid: Floats) -> float:
    """The clip whose quantized distribution diverges least from the real one.

    Szymon Migacz, "8-bit Inference with TensorRT" (GTC 2017): P is the histogram up to the clip
    with all that lies above it added to its last bin; Q spreads what falls to each code evenly
    over the bins of that code which hold anything; take the clip of least sum P log(P / Q). Here
    over 2048 to 4096 bins of one width, every clip from one bin per code up. Zeros are left out:
    every clip keeps them exactly, and half a ReLU's values would otherwise drown the rest. Clips
    that more than 1 value in 1,000 exceeds are not considered: values that pile up on a few points
    (a blank background behind a convolution) look lost to P log(P / Q) when their code holds
    neighbours too, and drew the clip into the middle of such distributions: PP-OCRv4's recognizer
    in INT8 kept 1.4 dB of its output, and keeps 11.6 so.

    Returns the upper edge of the clip's last bin.
    """
    counts = _uniform(bins, amax)
    # Where the last bin is empty, P would hold the clipped values there and Q nothing: infinite.
    clips = np.flatnonzero(counts) + 1
    exceeding = counts.sum() - np.cumsum(counts)[clips - 1]
    enough = (clips >= min(grid.size, counts.size)) & (exceeding * _MOST_CLIPPED <= counts.sum())
    clips = clips[enough]
    divergences = _divergences(counts, clips, grid)
    # 1e-12 nats: the running sums are rounded; what they cannot tell apart is equal.
    widest = np.flatnonzero(divergences <= divergences.min() + 1e-12)[-1]
    return float(clips[widest]) * _width(bins)


def _width(bins: MagnitudeBins) -> float:
    """The width of the bins in the octave of the maximum."""
    edges = bins.edges()
    return float(edges[-1] - edges[-2])


def _uniform(bins: MagnitudeBins, amax: float) -> NDArray[np.int64]:
    """Counts, without the zeros', in bins of the top octave's width over [0, amax]."""
    width = _width(bins)
    index = (bins.edges()[:-1] / width).astype(np.int64)
    result = np.zeros(2 << TOP_BITS, np.int64)
    np.add.at(result, index[1:], bins.counts[1:])
    return result[: int(amax / width) + 1]


def _divergences(counts: NDArray[np.int64], clips: NDArray[np.int64], grid: Floats) -> Floats:
    """KL(P || Q) in nats of each clip [clips], given in bins; see `entropy` for P and Q.

    With P = p / N and Q = M_c / (u_c K) for a code's mass M_c over u_c used bins and K all mass
    below the clip, sum P log(P / Q) = (sum p log p - sum_c M_c log(M_c / u_c)) / N - log(N / K).
    The sums over bins are differences of running sums, so a clip costs a look-up per code.
    """
    total = float(counts.sum())
    mass = counts.astype(np.float64)
    all_mass, all_used, all_logs = (
        np.concatenate([[0.0], np.cumsum(part)])
        for part in (mass, (counts > 0).astype(np.float64), _x_log_x(mass))
    )
    middles = (grid[1:] + grid[:-1]) / 2.0
    result = []
    for part in np.array_split(clips, max(1, clips.size // _CLIPS_AT_ONCE)):
        inner = np.rint(part[:, None] * middles).astype(np.int64)
        bounds = np.concatenate([np.zeros_like(part)[:, None], inner, part[:, None]], axis=1)
        m, used = np.diff(all_mass[bounds], axis=1), np.diff(all_used[bounds], axis=1)
        codes = (_x_log_x(m) - m * np.log(np.maximum(used, 1.0))).sum(axis=1)
        last, kept = mass[part - 1], all_mass[part]
        moved = total - kept  # what is clipped counts as the last bin's
        own = all_logs[part] - _x_log_x(last) + _x_log_x(last + moved)
        codes += moved * np.log(m[:, -1] / used[:, -1])
        result.append((own - codes) / total - np.log(total / kept))
    return np.concatenate(result)


def _x_log_x(x: Floats) -> Floats:
    return np.asarray(x * np.log(np.maximum(x, 1.0)))  # x is 0 or a count


def mse(bins: MagnitudeBins, amax: float, grid: Floats, clipped: float = 1.0) -> float:
    """The clip of least summed squared error, every bin standing at its middle.

    Args:
        clipped: what the squared error of a value counts that lies so far above the clip that it
            would be rounded up to the next value, were there one.
    """
    clips = mse_clips()
    errors = mse_errors(bins, amax, clips[:, None] * grid, clipped)
    return float(clips[int(np.argmin(errors))] * amax)  # of equals the widest


def mse_clips() -> Floats:
    """The clips that mse tries, over the largest magnitude."""
    return np.exp2(-np.arange(_MSE_OCTAVES * _MSE_STEPS_PER_OCTAVE) / _MSE_STEPS_PER_OCTAVE)


def mse_errors(bins: MagnitudeBins, amax: float, values: Floats, clipped: float) -> Floats:
    """Summed squared error over amax^2 of each row of `values`, which are the codes' over amax.

    The sum over the bins that round to one value v is S2 - 2 v S1 + v^2 S0 with running sums of
    1, x and x^2, so a row costs one look-up per value.
    """
    edges = bins.edges()
    middle = np.minimum((edges[1:] + edges[:-1]) / 2.0, amax) / amax
    middle[0] = 0.0
    weight = bins.counts.astype(np.float64)
    s0, s1, s2 = (np.concatenate([[0.0], np.cumsum(weight * middle**power)]) for power in (0, 1, 2))
    # The last value takes two ranges, below and above the place where its successor's would begin.
    last = values[:, -1:]
    halves = (values[:, 1:] + values[:, :-1]) / 2.0
    halves = np.concatenate([halves, last + (last - values[:, -2:-1]) / 2.0], axis=1)
    values = np.concatenate([values, last], axis=1)
    inner = np.searchsorted(middle, halves)
    ends = np.zeros((len(values), 1), np.int64)
    bounds = np.concatenate([ends, inner, ends + middle.size], axis=1)
    d0, d1, d2 = (np.diff(s[bounds], axis=1) for s in (s0, s1, s2))
    errors = d2 - 2.0 * values * d1 + values**2 * d0
    errors[:, -1] *= clipped
    return np.asarray(errors.sum(axis=1))
