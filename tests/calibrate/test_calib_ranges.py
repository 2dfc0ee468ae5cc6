"""Clipping ranges against independent brute force on the raw values."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxq.calibrate.bins import MagnitudeBins
from onnxq.calibrate.ranges import choose, levels
from onnxq.calibrate.statistics import Histogram
from onnxq.errors import OnnxqError

METHODS = ("max", "percentile", "percentile:99", "entropy", "mse", "mse:2")


def histogram(*parts: np.ndarray) -> Histogram:
    result = Histogram()
    for part in parts:
        result.update(part.astype(np.float32))
    return result


def drawn(kind: str, size: int = 40_000, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = {
        "normal": lambda: rng.standard_normal(size),
        "laplace": lambda: rng.laplace(size=size),
        "uniform": lambda: rng.uniform(-3, 3, size),
        "relu": lambda: np.maximum(rng.standard_normal(size), 0),
        "outlier": lambda: np.append(rng.standard_normal(size) * 1.5, 50.0),
        "edge": lambda: np.append(rng.uniform(-1, 1, size), rng.uniform(1, 1.06, size // 2000)),
    }[kind]()
    return values.astype(np.float32)


KINDS = ("normal", "laplace", "uniform", "relu", "outlier")


def test_the_codes_are_the_formats_own() -> None:
    codes = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert np.array_equal(levels("fp8") * 448, codes)
    assert np.array_equal(np.rint(levels("int8") * 127), np.arange(128))
    with pytest.raises(OnnxqError, match="fp9"):
        levels("fp9")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [50.0, 99.0, 99.9, 99.99, 100.0])
def test_percentiles_are_numpys_within_a_bin(kind: str, share: float) -> None:
    values = drawn(kind)
    rank = math.ceil(len(values) * Fraction(str(share)) / 100)  # numpy rounds this product
    exact = float(np.sort(np.abs(values))[rank - 1])
    assert math.isclose(
        exact, np.percentile(np.abs(values), share, method="inverted_cdf"), rel_tol=1e-2
    )
    found = histogram(values)
    edges = found.bins.edges()
    low, high = (edges[np.searchsorted(edges, exact, side="right") + k] for k in (-1, 0))
    assert low <= exact <= choose(found, f"percentile:{share}") <= min(high, found.amax)


def test_outlier_is_clipped() -> None:
    """A maximum of 50 over a bulk near 6 (1 value in 40,000): no search may answer 50.

    This is also what fails when entropy is the maximum in disguise.
    """
    found = histogram(drawn("outlier"))
    assert choose(found, "max") == 50.0
    assert 4.0 < choose(found, "entropy") < 8.0
    assert 4.0 < choose(found, "percentile") < 8.0


def brute_entropy(values: np.ndarray, bins: int, width: float) -> float:
    """TensorRT's search as its authors' slides word it, bin by bin, on the values themselves."""
    magnitudes = np.abs(values.astype(np.float64))
    counts = np.bincount(np.floor(magnitudes[magnitudes > 0] / width).astype(int), minlength=bins)
    best, best_clip = math.inf, bins
    for clip in range(128, bins + 1):
        if counts[clip - 1] == 0 or 1000 * counts[clip:].sum() > counts.sum():
            continue
        p = counts[:clip].astype(np.float64)
        p[-1] += counts[clip:].sum()
        q = np.zeros(clip)
        starts = [0] + [round((j + 0.5) / 127 * clip) for j in range(127)] + [clip]
        for j in range(128):
            cell = counts[starts[j] : starts[j + 1]]
            if cell.any():
                q[starts[j] : starts[j + 1]][cell > 0] = cell.sum() / np.count_nonzero(cell)
        p, q = p / p.sum(), q / q.sum()
        used = p > 0
        divergence = float(np.sum(p[used] * np.log(p[used] / q[used])))
        if divergence <= best + 1e-12:  # of equals the widest; 1e-12: sums in another order
            best, best_clip = divergence, clip
    return best_clip * width


@pytest.mark.parametrize(("kind", "size"), [*((k, 5_000) for k in KINDS), ("edge", 40_000)])
def test_entropy_is_the_brute_force_search(kind: str, size: int) -> None:
    values = drawn(kind, size)
    found = histogram(values)
    width = 2.0 ** (math.floor(math.log2(found.amax)) - 11)
    expected = min(brute_entropy(values, int(found.amax / width) + 1, width), found.amax)
    assert choose(found, "entropy") == pytest.approx(expected, rel=1e-12)


def quantized(values: np.ndarray, clip: float, name: str) -> np.ndarray:
    scaled = values.astype(np.float64) / clip
    if name == "int8":
        return np.clip(np.rint(scaled * 127), -127, 127) / 127 * clip
    eight = np.clip(scaled * 448, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    return eight.astype(np.float64) / 448 * clip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_mse_clip_is_as_good_as_the_best_of_a_fine_grid(kind: str, name: str) -> None:
    values = drawn(kind)
    clip = choose(histogram(values), "mse", name)
    amax = float(np.abs(values).max())
    errors = [
        np.mean((values - quantized(values, c, name)) ** 2)
        for c in amax * np.exp2(-np.arange(0, 8, 1 / 48))
    ]
    # Bins of 1/2048 to 1/4096 of the range against codes of 1/127: the error is known to about
    # (1/2048) / (1/127) / 4 = 1.6 % of itself, and clips 1.1 % apart add as much again.
    assert np.mean((values - quantized(values, clip, name)) ** 2) <= 1.03 * min(errors)


def clip_averse_error(values: np.ndarray, clip: float, name: str, weight: float) -> float:
    """Mean squared error, that of values a code above the last would be nearest to weighted."""
    last_step = {"int8": 1 / 127, "fp8": 32 / 448}[name]
    beyond = np.abs(values) > clip * (1 + last_step / 2)
    errors = (values - quantized(values, clip, name)) ** 2
    return float(np.mean(errors * np.where(beyond, weight, 1.0)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["int8", "fp8"])
@pytest.mark.parametrize("weight", [2, 16])
def test_weighted_mse_clip_is_as_good_as_the_best_of_a_fine_grid(
    kind: str, name: str, weight: int
) -> None:
    values = drawn(kind)
    clip = choose(histogram(values), f"mse:{weight}", name)
    amax = float(np.abs(values).max())
    errors = [
        clip_averse_error(values, c, name, weight) for c in amax * np.exp2(-np.arange(0, 8, 1 / 48))
    ]
    # As for mse; a bin that the border runs through counts on one of its sides: its share of the
    # error is that of 1/4096 of the range, below 1 % of all in each of these.
    assert clip_averse_error(values, clip, name, weight) <= 1.04 * min(errors)


def test_the_more_a_clipped_value_counts_the_less_is_clipped() -> None:
    found = histogram(drawn("laplace"))
    clips = [choose(found, f"mse:{weight}") for weight in (1, 2, 4, 16, 1e12)]
    assert clips == sorted(clips)
    assert clips[0] == choose(found, "mse") < clips[1] < clips[3]
    # An error that counts 1e12 times is no option: at most half a step is cut off.
    assert clips[-1] * (1 + 0.5 / 127) >= found.amax * (1 - 1 / 2048)


def test_mse_for_int8_clips_what_fp8_keeps() -> None:
    """One value of 50 in a million: FP8's codes reach it and stay fine below, INT8's cannot."""
    found = histogram(drawn("outlier", 1_000_000))
    assert choose(found, "mse", "int8") < 10 < 49 < choose(found, "mse", "fp8")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 1 << 30), st.integers(1, 9), st.sampled_from(KINDS))
def test_ranges_do_not_depend_on_order_or_split(seed: int, parts: int, kind: str) -> None:
    values = drawn(kind, 3000, seed)
    shuffled = np.random.default_rng(seed).permutation(values)
    one, many = histogram(values), histogram(*np.array_split(shuffled, parts))
    for method in METHODS:
        for name in ("int8", "fp8"):
            assert choose(one, method, name) == choose(many, method, name)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1))
def test_any_values_give_a_range_between_zero_and_the_maximum(values: list[float]) -> None:
    found = histogram(np.array(values, np.float32))
    for method in METHODS:
        for name in ("int8", "fp8"):
            clip = choose(found, method, name)
            assert 0.0 <= clip <= found.amax
            assert (clip > 0.0) == (found.amax > 0.0) or method.startswith("percentile")


def test_power_of_two_scaling_scales_the_ranges() -> None:
    values = drawn("laplace")
    for method in METHODS:
        plain, scaled = choose(histogram(values), method), choose(histogram(values * 8), method)
        assert scaled == 8 * plain


def test_of_equally_good_clips_the_widest_is_taken() -> None:
    """1.0 and 1.5 in bins and codes of their own, whatever the clip: no clip loses anything."""
    found = histogram(np.repeat([1.0, 1.5], [5000, 1]))
    assert choose(found, "entropy") == 1.5


def test_values_piled_up_on_few_points_do_not_draw_the_clip_into_the_middle() -> None:
    rng = np.random.default_rng(0)
    spikes = np.repeat(rng.uniform(0.1, 0.2, 40), 2000)
    found = histogram(np.concatenate([spikes, rng.uniform(0, 2, 2000)]))
    assert choose(found, "entropy") > 1.9  # 1 in 41 values is above 0.2


def test_methods_are_checked() -> None:
    found = histogram(np.ones(3))
    for method in ("median", "max:3", "entropy:2", ""):
        with pytest.raises(OnnxqError, match="no calibration method"):
            choose(found, method)
    for number in ("x", "0", "101", "nan", ""):
        with pytest.raises(OnnxqError, match="no percentile"):
            choose(found, f"percentile:{number}")
    for number in ("x", "0", "0.5", "-2", "inf", "nan", ""):
        with pytest.raises(OnnxqError, match="no weight of clipped"):
            choose(found, f"mse:{number}")


def test_zeros_only_are_zero() -> None:
    found = histogram(np.zeros(10))
    assert {choose(found, method) for method in METHODS} == {0.0}
    assert isinstance(found.bins, MagnitudeBins)
