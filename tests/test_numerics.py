"""Scales and codes against onnx's reference evaluator and ml_dtypes, code by code."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from core_oracle import dequantize_linear, quantize_linear
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onnxq import numerics
from onnxq.formats import FORMATS, PerChannel, PerTensor, QuantFormat, QuantScheme

INT8, FP8 = FORMATS["int8"], FORMATS["fp8"]
FP16, BF16, FP32 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)
SCALE_DTYPES = [FP16, BF16, FP32]
FORMAT_ROWS = [INT8, FP8]
# Half the distance between two numbers of a scale's type, relative to the number: what rounding a
# scale to its type may change it by.
ROUNDING = {FP16: 2.0**-11, BF16: 2.0**-8, FP32: 2.0**-24}

each_format = pytest.mark.parametrize("fmt", FORMAT_ROWS, ids=lambda f: f.name)
each_dtype = pytest.mark.parametrize("dtype", SCALE_DTYPES, ids=lambda d: d.name)


def along(axis: int | None) -> PerTensor | PerChannel:
    return PerTensor() if axis is None else PerChannel(axis)


def amax(values: Any, axis: int | None = None) -> Any:
    return numerics.peaks(np.asarray(values), along(axis))


def scale_for(peak: Any, fmt: QuantFormat, dtype: Any) -> Any:
    return numerics.scales_for(peak, QuantScheme(fmt, PerTensor(), np.dtype(dtype).name))


def quantize(values: Any, scale: Any, fmt: QuantFormat, axis: int | None = None) -> Any:
    return numerics.quantize(values, scale, QuantScheme(fmt, along(axis), scale.dtype.name))


def dequantize(codes: Any, scale: Any, axis: int | None = None) -> Any:
    return numerics.dequantize(codes, scale, QuantScheme(INT8, along(axis), scale.dtype.name))


def fp8_codes() -> Any:
    """All 256 codes, NaN among them."""
    return np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)


def same_bits(a: Any, b: Any) -> None:
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


# --- codes ------------------------------------------------------------------------------------


def test_every_fp8_code_survives_a_round_trip() -> None:
    codes = fp8_codes()
    finite = codes[np.isfinite(codes.astype(np.float32))]
    assert finite.size == 254
    for scale in np.float32([1, 0.25, 3e-3, 7.7]):
        values = dequantize(finite, scale)
        np.testing.assert_array_equal(values, finite.astype(np.float32) * scale)
        same_bits(quantize(values, scale, FP8), finite)


def test_every_int8_code_survives_a_round_trip() -> None:
    codes = np.arange(-127, 128).astype(np.int8)
    for scale in np.float32([1, 0.25, 3e-3, 7.7]):
        same_bits(quantize(dequantize(codes, scale), scale, INT8), codes)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0078125, 3.7e-3, 12.3])
def test_int8_ties_round_to_even(scale: float) -> None:
    """Every tie: (code + 1/2) x scale; whatever the scale, the division decides as ONNX's does."""
    ties = ((np.arange(-130, 130) + 0.5) * scale).astype(np.float32)
    around = np.concatenate([ties, np.nextafter(ties, np.float32(9e9)), np.nextafter(ties, -ties)])
    ours = quantize(around, np.float32(scale), INT8)
    oracle = quantize_linear(around, np.float32(scale), "int8")
    np.testing.assert_array_equal(ours, np.maximum(oracle, -127))  # symmetric: -128 is not used


def test_int8_ties_at_scale_one_are_even() -> None:
    values = np.float32([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5, 126.5])
    codes = quantize(values, np.float32(1), INT8)
    np.testing.assert_array_equal(codes, np.int8([0, 2, 2, 0, -2, -2, 126, 126]))


@pytest.mark.parametrize("scale", [1.0, 0.25, 3.7e-3, 12.3])
def test_fp8_ties_between_all_neighbours(scale: float) -> None:
    positive = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (positive[:-1] + positive[1:]) / 2
    values = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, ties * 2)])
    values = np.concatenate([values, -values]) * np.float32(scale)
    same_bits(
        quantize(values, np.float32(scale), FP8),
        quantize_linear(values, np.float32(scale), "fp8"),
    )


def test_fp8_ties_at_scale_one_go_to_the_even_code() -> None:
    positive = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (positive[:-1] + positive[1:]) / 2
    codes = quantize(ties, np.float32(1), FP8).view(np.uint8)
    below = np.arange(0x7E, dtype=np.uint8)
    np.testing.assert_array_equal(codes, below + below % 2)


@pytest.mark.parametrize("source", [np.float16, np.float32, ml_dtypes.bfloat16])
def test_every_16_bit_value_quantizes_as_onnx_does(source: Any) -> None:
    """All finite FP16 and BF16 numbers (for FP32: the numbers both of them have)."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = bits.view(np.float16 if source == np.float32 else source).astype(source)
    values = values[np.isfinite(values.astype(np.float32))]
    wide = values.astype(np.float32)
    for scale in (np.float32(1), np.float32(0.0123)):
        oracle = quantize_linear(wide, scale, "fp8")
        same_bits(quantize(values, scale, FP8), oracle)
        clipped = np.clip(wide, -1e6, 1e6)  # the evaluator goes through int32
        oracle = np.maximum(quantize_linear(clipped, scale, "int8"), -127)
        same_bits(quantize(values, scale, INT8), oracle)


@each_format
def test_zeros_keep_their_sign_where_the_format_has_one(fmt: QuantFormat) -> None:
    codes = quantize(np.float32([0.0, -0.0]), np.float32(0.1), fmt)
    same_bits(codes, quantize_linear(np.float32([0.0, -0.0]), np.float32(0.1), fmt.name))
    assert codes.view(np.uint8).tolist() == ([0, 0x80] if fmt is FP8 else [0, 0])


@each_format
def test_saturation_at_the_largest_code(fmt: QuantFormat) -> None:
    huge = np.float32([fmt.qmax, fmt.qmax * 1.04, 1e6, 3e38, np.inf])
    codes = quantize(np.concatenate([huge, -huge]), np.float32(1), fmt)
    expected = [fmt.qmax] * 5 + [-fmt.qmax] * 5
    np.testing.assert_array_equal(codes.astype(np.float32), np.float32(expected))


@each_format
def test_dequantize_equals_the_reference(fmt: QuantFormat) -> None:
    codes = fp8_codes() if fmt is FP8 else np.arange(-128, 128).astype(np.int8)
    table = codes.reshape(4, 64)
    scales = np.float32([0.1, 1, 3e-5, 77])
    np.testing.assert_array_equal(
        dequantize(table, scales, axis=0), dequantize_linear(table, scales, axis=0)
    )
    np.testing.assert_array_equal(dequantize(table, scales[0]), dequantize_linear(table, scales[0]))


# --- scales -----------------------------------------------------------------------------------


@each_dtype
@each_format
@given(peak=st.floats(0, 1e6, width=32))
@settings(max_examples=200, deadline=None)
def test_scales_are_positive_finite_and_near(
    fmt: QuantFormat, dtype: np.dtype[Any], peak: float
) -> None:
    scale = scale_for(np.float32(peak), fmt, dtype)
    assert scale.dtype == dtype and scale.shape == ()
    value = float(scale)
    normal = float(ml_dtypes.finfo(dtype).smallest_normal)
    assert normal <= value < np.inf
    if peak > fmt.qmax * normal:
        # The scale is rounded once, to its type.
        assert abs(value - peak / fmt.qmax) <= ROUNDING[dtype] * peak / fmt.qmax


@each_dtype
@each_format
@given(
    values=hnp.arrays(
        np.float32,
        hnp.array_shapes(max_dims=3, max_side=5),
        elements=st.floats(-1e4, 1e4, width=32),
    ),
    axis=st.integers(-1, 2),
)
@settings(max_examples=150, deadline=None)
def test_error_is_at_most_half_a_step(
    fmt: QuantFormat, dtype: np.dtype[Any], values: Any, axis: int
) -> None:
    axis = None if axis < 0 or axis >= values.ndim else axis
    scale = scale_for(amax(values, axis), fmt, dtype)
    codes = quantize(values, scale, fmt, axis)
    error = np.abs(dequantize(codes, scale, axis).astype(np.float64) - values)
    step = np.broadcast_to(
        scale.astype(np.float64).reshape([-1 if i == axis else 1 for i in range(values.ndim)])
        if axis is not None
        else scale.astype(np.float64),
        values.shape,
    )
    if fmt is INT8:
        # A scale rounded down by r leaves 127 r < 127/256 of a step beyond the last code; FP32
        # rounding of the division and the product adds 127 x 2^-23.
        bound = 0.5 * step * (1 + 1e-4)
    else:
        # 3 mantissa bits: half a step is 2^-4 of the value, or half of 2^-9 for subnormal codes.
        bound = np.maximum(np.abs(values) * 2.0**-4, step * 2.0**-10) * (1 + 1e-6)
    assert (error <= bound).all()


@each_dtype
def test_zero_channels_cost_nothing(dtype: np.dtype[Any]) -> None:
    peak = np.float32([0, 2, 0.5, 0])
    scale = scale_for(peak, INT8, dtype)
    alone = scale_for(np.float32([2, 0.5]), INT8, dtype)
    np.testing.assert_array_equal(scale, alone[[0, 0, 1, 0]])
    weight = np.float32([[0, 0], [2, -1], [0.5, 0.1], [0, -0.0]])
    np.testing.assert_array_equal(quantize(weight, scale, INT8, 0)[[0, 3]], 0)


@each_format
@each_dtype
def test_all_zero_tensor(fmt: QuantFormat, dtype: np.dtype[Any]) -> None:
    values = np.zeros((3, 4), np.float32)
    for axis in (None, 0, 1):
        scale = scale_for(amax(values, axis), fmt, dtype)
        np.testing.assert_array_equal(scale.astype(np.float32), 1)
        assert not quantize(values, scale, fmt, axis).astype(np.float32).any()
    empty = amax(np.zeros((0, 4), np.float32), 1)
    np.testing.assert_array_equal(empty, np.zeros(4, np.float32))


@each_format
def test_subnormal_values_get_a_normal_scale(fmt: QuantFormat) -> None:
    for dtype in SCALE_DTYPES:
        tiny = np.float32(1e-40)
        scale = scale_for(tiny, fmt, dtype)
        assert scale == ml_dtypes.finfo(dtype).smallest_normal
        # 1 / scale, by which a compiler may multiply, is finite in the same type
        assert np.isfinite((1 / scale.astype(np.float64)).astype(dtype).astype(np.float32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(bad: float) -> None:
    weight = np.float32([[1, 2], [3, bad]])
    for axis in (None, 0, 1):
        with pytest.raises(numerics.NotFiniteError):
            scale_for(amax(weight, axis), INT8, FP16)
    with pytest.raises(numerics.NotFiniteError):
        scale_for(amax(np.float64([1e300])), INT8, FP16)


def test_a_range_that_needs_more_than_fp16() -> None:
    for fmt in FORMAT_ROWS:
        limit = 65504 * fmt.qmax
        assert np.isfinite(scale_for(np.float32(limit * 0.999), fmt, FP16))
        with pytest.raises(numerics.ScaleRangeError, match="overflows float16"):
            scale_for(np.float32(limit * 1.01), fmt, FP16)
        assert float(scale_for(np.float32(1e12), fmt, BF16)) > 1e9
    with pytest.raises(numerics.ScaleRangeError):
        numerics.activation_scale(1e7, INT8, FP16)


@each_format
def test_activation_ranges_that_no_scale_serves(fmt: QuantFormat) -> None:
    with pytest.raises(numerics.ScaleRangeError, match="was 0 throughout"):
        numerics.activation_scale(0.0, fmt, FP16)
    with pytest.raises(numerics.NotFiniteError):
        numerics.activation_scale(np.nan, fmt, FP16)
    for dtype in SCALE_DTYPES:
        np.testing.assert_array_equal(
            numerics.activation_scale(3.0, fmt, dtype),
            scale_for(np.float32(3), fmt, dtype),
        )
    least = fmt.qmax * 2.0**-14
    slack = 1.5 if fmt is INT8 else 64
    assert numerics.activation_scale(least / slack * 1.01, fmt, FP16) == np.float16(2.0**-14)
    with pytest.raises(numerics.ScaleRangeError, match="below the normal numbers"):
        numerics.activation_scale(least / slack * 0.99, fmt, FP16)
    assert float(numerics.activation_scale(1e-5, fmt, BF16)) < 1e-6


# --- one scale for several channels ------------------------------------------------------------

scale_arrays = hnp.arrays(
    np.float32, st.integers(1, 8), elements=st.floats(2.0**-40, 60000, width=32)
)


def under(unit: float, dtype: Any) -> QuantScheme:
    return QuantScheme(INT8, PerChannel(0), np.dtype(dtype).name, unit)


@each_dtype
@given(scales=st.lists(scale_arrays, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_common_scale_and_ratios(dtype: np.dtype[Any], scales: list[Any]) -> None:
    common = numerics.common_scale(scales, dtype)
    assert np.array(common).astype(dtype).astype(np.float64) == common
    mantissa, _ = np.frexp(common)
    assert mantissa == 0.5, "a power of two, so that codes times it are exact"
    normal = float(ml_dtypes.finfo(dtype).smallest_normal)
    assert common >= normal
    least, largest = min(map(np.min, scales)), max(map(np.max, scales))
    # Below every scale, so that no product is larger than its result; but not far below the
    # largest, whose product would lose digits.
    assert common <= max(float(least), float(largest) * 2.0**-5, normal)
    assert common > min(float(least) / 2, float(largest) * 2.0**-6.01)
    for scale in scales:
        peak = (scale.astype(np.float64) * 127).astype(np.float32)
        ratios = numerics.scales_for(peak, under(common, dtype))
        assert ratios.dtype == dtype and ratios.shape == scale.shape
        wide = ratios.astype(np.float64)
        assert np.isfinite(wide).all() and (wide >= normal).all()
        wanted = peak.astype(np.float64) / 127
        kept = wanted >= common * normal
        effective = wide * common
        assert (abs(effective - wanted)[kept] <= ROUNDING[dtype] * wanted[kept]).all()
        assert (effective >= wanted * (1 - ROUNDING[dtype])).all(), "no channel may saturate"


def test_common_scale_of_like_channels_and_of_an_outlier() -> None:
    like = [np.float32([2.0**-7, 2.0**-9]), np.float32(1.5 * 2.0**-8)]
    assert numerics.common_scale(like, FP16) == 2.0**-9
    ratios = numerics.scales_for(like[0] * 127, under(2.0**-9, FP16))
    np.testing.assert_array_equal(ratios, np.float16([4, 1]))
    assert numerics.common_scale([*like, np.float32(1)], FP16) == 2.0**-6


def test_common_scale_of_one_outlier_among_dead_channels() -> None:
    """The ratio of the outlier to the mean would be 1e7, infinite in FP16."""
    scales = np.float32([1e-8] * 99 + [0.1])
    common = numerics.common_scale([scales], FP16)
    ratios = numerics.scales_for(scales * np.float32(127), under(common, FP16))
    assert np.isfinite(ratios).all()
    assert float(ratios[-1]) * common == pytest.approx(0.1, rel=2**-11)


def test_common_scale_beyond_the_type() -> None:
    with pytest.raises(numerics.ScaleRangeError):
        numerics.common_scale([np.float32([70000])], FP16)
    assert numerics.common_scale([np.float32([70000])], BF16) == 65536


# --- symmetries --------------------------------------------------------------------------------


@each_format
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_permuting_channels_permutes_codes(fmt: QuantFormat, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((6, 5)).astype(np.float32)
    order = rng.permutation(6)

    def codes(w: Any) -> Any:
        scale = scale_for(amax(w, 0), fmt, FP16)
        return quantize(w, scale, fmt, 0), scale

    (a, scale_a), (b, scale_b) = codes(weight), codes(weight[order])
    same_bits(np.ascontiguousarray(a[order]), b)
    np.testing.assert_array_equal(scale_a[order], scale_b)
    per_channel = quantize(weight, scale_a, fmt, 0)
    rows = [quantize(weight[i], scale_a[i], fmt) for i in range(6)]
    same_bits(per_channel, np.stack(rows))


@each_dtype
@each_format
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-3, 3))
@settings(max_examples=30, deadline=None)
def test_scaling_by_a_power_of_two_is_exact(
    fmt: QuantFormat, dtype: np.dtype[Any], seed: int, exponent: int
) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((4, 7)).astype(np.float32)
    factor = np.float32(2.0**exponent)
    scale = scale_for(amax(weight, 0), fmt, dtype)
    scaled = scale_for(amax(weight * factor, 0), fmt, dtype)
    np.testing.assert_array_equal(
        scale.astype(np.float32) * factor, scaled.astype(np.float32), strict=True
    )
    same_bits(quantize(weight, scale, fmt, 0), quantize(weight * factor, scaled, fmt, 0))


def test_amax_is_the_largest_magnitude() -> None:
    values = np.float32([[1, -3, 2], [0.5, 0.25, -0.125]])
    assert amax(values) == 3
    np.testing.assert_array_equal(amax(values, 1), np.float32([1, 3, 2]))
    np.testing.assert_array_equal(amax(values, -2), np.float32([3, 0.5]))
    for dtype in (np.float16, ml_dtypes.bfloat16):
        narrow = amax(values.astype(dtype), 0)
        assert narrow.dtype == np.float32
        np.testing.assert_array_equal(narrow, np.float32([3, 0.5]))
    np.testing.assert_array_equal(amax(np.float16([[-65504, 65504]]), 1), [65504, 65504])


def test_the_scale_stored_is_the_scale_used() -> None:
    """An FP16 scale differs from the FP32 one; codes follow what the file holds."""
    weight = np.float32(np.linspace(-1.2345, 1.2345, 4001))
    stored = scale_for(amax(weight), INT8, FP16)
    assert float(stored) != 1.2345 / 127
    same_bits(
        quantize(weight, stored, INT8),
        quantize_linear(weight, stored.astype(np.float32), "int8"),
    )


@pytest.mark.parametrize("name", ["fp8", "nvfp4"])
def test_nearest_values_are_those_of_a_cast(name: str) -> None:
    """At every code and midpoint, one float32 to either side, and far outside; signs of 0 too."""
    fmt = FORMATS[name]
    codes = np.arange(1 << fmt.bits, dtype=np.uint8).view(fmt.dtype()).astype(np.float32)
    values = np.unique(codes[np.isfinite(codes)])
    middles = (values[1:] + values[:-1]) / 2
    sides = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    many = rng.standard_normal(10_000) * np.exp(rng.uniform(-40, 9, 10_000))
    given = np.concatenate([values, middles, *sides, many, [-0.0, 1e-45, 3e38]])
    given = np.concatenate([given, -given]).astype(np.float32)
    expected = np.clip(given, fmt.qmin, fmt.qmax).astype(fmt.dtype()).astype(np.float32)
    found = numerics.nearest(given, fmt)
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
