"""Codes of every format against onnx's reference evaluator and ml_dtypes; how they are packed."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from core_oracle import CODES, dequantize_linear, quantize_linear
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import codes, numerics, threads
from onnxq.formats import FORMATS, Granularity, PerBlock, PerChannel, QuantFormat, QuantScheme
from onnxq.graph.dtypes import from_bytes, payload_bytes, to_bytes

FORMAT_ROWS = [f for f in FORMATS.values() if f.name != "uint4"]
each_format = pytest.mark.parametrize("fmt", FORMAT_ROWS, ids=lambda f: f.name)
NARROW = ["int4", "uint4", "nvfp4"]


def all_codes(fmt: QuantFormat) -> Any:
    """Every finite code of a format, NaN left out, from its bits."""
    bits = np.arange(1 << fmt.bits, dtype=np.uint8).view(fmt.dtype())
    wide = bits.astype(np.float32)
    return bits[np.isfinite(wide) & (wide >= fmt.qmin)]


def numbers(fmt: QuantFormat) -> Any:
    """The numbers they stand for, in order, each once."""
    return np.unique(all_codes(fmt).astype(np.float32))


def same_bits(a: Any, b: Any) -> None:
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


def oracle(values: Any, scale: Any, fmt: QuantFormat) -> Any:
    """QuantizeLinear by onnx; INT8's -128, which no symmetric weight uses, left out."""
    clipped = np.clip(values, -1e6 * scale, 1e6 * scale)  # its integers go through int32
    found = quantize_linear(clipped.astype(np.float32), np.float32(scale), fmt.name)
    return np.maximum(found, np.int8(-127)) if fmt.name == "int8" else found


def scheme(fmt: QuantFormat, granularity: Granularity | None = None) -> QuantScheme:
    return QuantScheme(fmt, granularity or PerChannel(0), "float32")


def quantize(values: Any, scale: float, fmt: QuantFormat) -> Any:
    steps = np.full((), scale, np.float32)
    return numerics.quantize(np.asarray(values), steps, scheme(fmt))


@each_format
@pytest.mark.parametrize("scale", [1.0, 0.25, 3e-3, 7.7])
def test_every_code_survives_a_round_trip(fmt: QuantFormat, scale: float) -> None:
    everything = all_codes(fmt)
    assert (
        everything.size
        == {"int8": 255, "fp8": 254, "int4": 16, "nvfp4": 16, "mxfp8": 254}[fmt.name]
    )
    steps = np.full((), scale, np.float32)
    values = numerics.dequantize(everything, steps, scheme(fmt))
    np.testing.assert_array_equal(values, everything.astype(np.float32) * np.float32(scale))
    same_bits(quantize(values, scale, fmt), everything)


@each_format
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.7e-3, 12.3])
def test_ties_between_all_neighbours(fmt: QuantFormat, scale: float) -> None:
    grid = numbers(fmt)
    ties = ((grid[:-1] + grid[1:]) / 2 * np.float32(scale)).astype(np.float32)
    beyond = np.nextafter(ties, np.float32(9e9)), np.nextafter(ties, np.float32(-9e9))
    values = np.concatenate([ties, *beyond])
    same_bits(quantize(values, scale, fmt), oracle(values, scale, fmt))


def test_fp4_ties_at_scale_one_go_to_the_even_code() -> None:
    """0, .5, 1, 1.5, 2, 3, 4, 6: the first of each pair has a mantissa of 0."""
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    found = quantize(ties, 1.0, FORMATS["nvfp4"]).astype(np.float32)
    np.testing.assert_array_equal(found, [0, 1, 1, 2, 2, 4, 4])


def test_int4_ties_at_scale_one_are_even_and_reach_minus_eight() -> None:
    values = [0.5, 1.5, -0.5, -1.5, 6.5, 7.5, -7.5, -8.5, -9]
    found = quantize(values, 1.0, FORMATS["int4"]).astype(np.int8)
    np.testing.assert_array_equal(found, [0, 2, 0, -2, 6, 7, -8, -8, -8])


@each_format
@pytest.mark.parametrize("source", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 0.0123, 2.0**-14])
def test_every_16_bit_value(fmt: QuantFormat, source: Any, scale: float) -> None:
    """Subnormal numbers too, which are widened by their bits."""
    values = np.arange(1 << 16, dtype=np.uint16).view(source)
    values = values[np.isfinite(values.astype(np.float32))]
    if fmt.name == "nvfp4":  # the evaluator adds a zero point of 0 first, which makes -0 a 0
        values = values[values.view(np.uint16) != 0x8000]
    expected = oracle(values.astype(np.float32), scale, fmt)
    same_bits(quantize(values, scale, fmt), expected)
    same_bits(quantize(values.astype(np.float32), scale, fmt), expected)


@each_format
def test_a_million_float32_numbers_of_every_size(fmt: QuantFormat) -> None:
    rng = np.random.default_rng(5)
    bits = rng.integers(0, 1 << 32, 1 << 20, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    near = (rng.choice(numbers(fmt), 1 << 18) * rng.uniform(0.9, 1.1, 1 << 18)).astype(np.float32)
    values = np.concatenate([values, near, near + np.float32(0.5)])
    expected = np.clip(values, fmt.qmin, fmt.qmax)
    if not fmt.is_float:
        expected = np.rint(expected).astype(np.int8)
    same_bits(quantize(values, 1.0, fmt), expected.astype(fmt.dtype()))


@each_format
def test_zeros_keep_their_sign_where_the_format_has_one(fmt: QuantFormat) -> None:
    found = quantize(np.float32([0.0, -0.0, -1e-9]), 1.0, fmt).view(np.uint8).tolist()
    minus = 1 << (fmt.bits - 1) if fmt.is_float else 0
    assert found == [0, minus, minus]


@each_format
def test_saturation(fmt: QuantFormat) -> None:
    huge = np.float32([fmt.qmax * 1.2, 1e6, 3e38, np.inf])
    found = quantize(np.concatenate([huge, -huge]), 1.0, fmt).astype(np.float32)
    np.testing.assert_array_equal(found, np.float32([fmt.qmax] * 4 + [fmt.qmin] * 4))
    tiny = quantize(np.float32([3e38, -3e38]), 1e-38, fmt).astype(np.float32)
    np.testing.assert_array_equal(tiny, np.float32([fmt.qmax, fmt.qmin]))


@each_format
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_nearest_is_what_codes_are(fmt: QuantFormat, seed: int) -> None:
    values = np.random.default_rng(seed).standard_normal(64).astype(np.float32) * fmt.qmax
    found = numerics.nearest(values, fmt)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, quantize(values, 1.0, fmt).astype(np.float32))
    distance = np.abs(numbers(fmt)[:, None] - np.clip(values, fmt.qmin, fmt.qmax)).min(0)
    np.testing.assert_array_equal(
        np.abs(found - np.clip(values, fmt.qmin, fmt.qmax)), distance.astype(np.float32)
    )


# --- where the scales lie -------------------------------------------------------------------------

LAYOUTS = {
    "columns": ((48, 40), PerBlock(0, 16)),
    "rows": ((40, 48), PerBlock(1, 16)),
    "ragged columns": ((50, 40), PerBlock(0, 16)),
    "ragged rows": ((40, 50), PerBlock(-1, 16)),
    "one block": ((48, 40), PerBlock(0, 64)),
    "three axes": ((3, 32, 5), PerBlock(1, 8)),
    "channels": ((48, 40), PerChannel(1)),
    "filters": ((6, 5, 3, 3), PerChannel(0)),
    "inner channels": ((4, 6, 5), PerChannel(1)),
}


@each_format
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_each_scale_acts_on_its_own(fmt: QuantFormat, layout: str, dtype: Any) -> None:
    """The scale of each element by its index, written out."""
    shape, granularity = LAYOUTS[layout]
    rng = np.random.default_rng(1)
    values = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 1, shape)).astype(dtype)
    peak = numerics.peaks(values, granularity)
    assert peak.shape == numerics.scale_shape(shape, granularity)
    scale = numerics.scales_for(peak, scheme(fmt, granularity))
    found = numerics.quantize(values, scale, scheme(fmt, granularity))
    back = numerics.dequantize(found, scale, scheme(fmt, granularity))
    axis = granularity.axis % len(shape)
    size = granularity.size if isinstance(granularity, PerBlock) else 1
    steps, largest = np.empty(shape, np.float32), np.zeros_like(peak)
    for index in np.ndindex(*shape):
        if isinstance(granularity, PerChannel):
            at: tuple[int, ...] = (index[axis],)
        else:
            at = tuple(i // size if n == axis else i for n, i in enumerate(index))
        steps[index] = scale[at]
        largest[at] = max(largest[at], abs(np.float32(values[index])))
    np.testing.assert_array_equal(peak, largest)
    expected = np.clip(values.astype(np.float32) / steps, fmt.qmin, fmt.qmax)
    if not fmt.is_float:
        expected = np.rint(expected).astype(np.int8)
    same_bits(found, expected.astype(fmt.dtype()))
    attrs = {"block": size} if isinstance(granularity, PerBlock) else {}
    np.testing.assert_array_equal(back, dequantize_linear(found, scale, axis, **attrs))


def test_one_block_is_a_channel() -> None:
    fmt = FORMATS["int4"]
    values = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float16)
    found = []
    for granularity in (PerBlock(0, 64), PerChannel(1)):
        scale = numerics.scales_for(numerics.peaks(values, granularity), scheme(fmt, granularity))
        found.append(numerics.quantize(values, scale, scheme(fmt, granularity)))
    same_bits(*found)


@pytest.mark.parametrize("kept", [PerBlock(0, 16), PerBlock(1, 16), PerChannel(0), PerChannel(1)])
def test_a_transposed_weight_has_transposed_codes(kept: PerBlock | PerChannel) -> None:
    values = np.random.default_rng(0).standard_normal((48, 64)).astype(np.float16)
    one = scheme(FORMATS["int4"], kept)
    other = one.transposed()
    scale = numerics.scales_for(numerics.peaks(values, one.granularity), one)
    turned = numerics.scales_for(numerics.peaks(values.T, other.granularity), other)
    np.testing.assert_array_equal(scale.T, turned)
    same_bits(
        numerics.quantize(values, scale, one),
        np.ascontiguousarray(numerics.quantize(values.T, turned, other).T),
    )


@each_format
@pytest.mark.parametrize("granularity", [PerBlock(0, 64), PerBlock(1, 32), PerChannel(1)])
def test_pieces_and_threads_give_the_same_bytes(
    fmt: QuantFormat, granularity: PerBlock | PerChannel, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = np.random.default_rng(0).standard_normal((64, 96)).astype(np.float16)
    used = scheme(fmt, granularity)
    scale = numerics.scales_for(numerics.peaks(values, granularity), used)
    monkeypatch.setattr(codes, "_PIECE", values.size)
    whole = numerics.quantize(values, scale, used)
    monkeypatch.setattr(codes, "_PARTS_EACH", 1)
    for piece in (1, 50, 96, 700):
        for cores in (1, 2, 5):
            monkeypatch.setattr(codes, "_PIECE", piece)
            monkeypatch.setattr(threads, "cores", lambda cores=cores: cores)
            same_bits(numerics.quantize(values, scale, used), whole)


# --- scales of 8 bits -----------------------------------------------------------------------------


def e8m0(peak: Any, fmt: str = "mxfp8") -> Any:
    return numerics.scales_for(
        np.asarray(peak, np.float32), QuantScheme(FORMATS[fmt], PerBlock(0, 32), "float8_e8m0fnu")
    )


def test_every_power_of_two_is_its_own_scale() -> None:
    exponents = np.arange(-127, 119)  # 448 x 2^119 is beyond float32
    powers = 2.0 ** exponents.astype(np.float64)
    found = e8m0(448 * powers)
    assert found.dtype == ml_dtypes.float8_e8m0fnu
    np.testing.assert_array_equal(found.view(np.uint8), exponents + 127)
    # Rounded up, so that nothing saturates: the next number belongs to the next power.
    above = np.nextafter((448 * powers).astype(np.float32), np.float32(np.inf))
    np.testing.assert_array_equal(e8m0(above).view(np.uint8), exponents + 128)
    below = np.nextafter((448 * powers[1:]).astype(np.float32), np.float32(0))
    np.testing.assert_array_equal(e8m0(below).view(np.uint8), exponents[1:] + 127)


def test_powers_of_two_have_ends() -> None:
    assert e8m0([1e-45, 448.0]).view(np.uint8).tolist() == [0, 127]
    assert e8m0([0.0, 0.0]).astype(np.float32).tolist() == [1, 1]
    with pytest.raises(numerics.NotFiniteError):
        e8m0([np.inf])


def test_nvfp4_scales_are_the_nearest_multiples_of_the_tensors() -> None:
    fmt = FORMATS["nvfp4"]
    peak = np.abs(np.random.default_rng(0).standard_normal(4096)).astype(np.float32) * 0.3
    peak[:3] = 0, 1e-30, 0.9
    unit = numerics.tensor_unit(float(peak.max()), fmt)
    assert unit == np.float32(np.float64(peak.max()) / (6 * 448))
    found = numerics.scales_for(
        peak, QuantScheme(fmt, PerBlock(0, 16), "float8_e4m3fn").with_unit(unit)
    )
    assert found.dtype == ml_dtypes.float8_e4m3fn
    positive = np.arange(1, 0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    wanted = peak.astype(np.float64) / 6 / unit
    best = np.abs(positive[:, None] - wanted).min(0)
    wide = found.astype(np.float64)
    assert wide[peak.argmax()] == 448
    assert wide[0] == 448 and wide[1] == 2.0**-9  # of zeros whatever; never 0
    np.testing.assert_allclose(np.abs(wide - wanted)[2:], best[2:], rtol=1e-12)


def test_the_scale_of_a_tensor() -> None:
    fmt = FORMATS["nvfp4"]
    assert numerics.tensor_unit(0.0, fmt) == 1.0
    assert numerics.tensor_unit(1e-44, fmt) == np.finfo(np.float32).tiny
    with pytest.raises(numerics.NotFiniteError):
        numerics.tensor_unit(float("inf"), fmt)


# --- zero points ----------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), shift=st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_asymmetric_blocks_keep_zero_and_half_a_step(seed: int, shift: float) -> None:
    fmt, granularity = FORMATS["uint4"], PerBlock(0, 16)
    values = np.random.default_rng(seed).standard_normal((32, 4)).astype(np.float32)
    values = values + np.float32(shift)
    used = scheme(fmt, granularity)
    scale, zero = numerics.scales_and_zeros(*numerics.extremes(values, granularity), used)
    assert zero.dtype == fmt.dtype() and zero.shape == scale.shape == (2, 4)
    found = numerics.quantize(values, scale, used, zero)
    back = numerics.dequantize(found, scale, used, zero)
    # Half a step of rounding; the zero point's own rounding moves one end by half a step more.
    assert (np.abs(back - values) <= np.repeat(scale, 16, 0) * (1 + 1e-5)).all()
    nothing = numerics.quantize(np.zeros_like(values), scale, used, zero)
    np.testing.assert_array_equal(numerics.dequantize(nothing, scale, used, zero), 0)


# --- packing --------------------------------------------------------------------------------------


def raw(values: Any, fmt: str) -> bytes:
    return bytes(to_bytes(values, CODES[fmt]))


@pytest.mark.parametrize("fmt", NARROW)
def test_every_pair_of_codes_shares_a_byte_the_first_in_the_lower_half(fmt: str) -> None:
    nibbles = np.arange(16, dtype=np.uint8)
    pairs = np.stack(np.meshgrid(nibbles, nibbles), -1).reshape(-1, 2)
    dtype = FORMATS[fmt].dtype()
    packed = raw(pairs.view(dtype), fmt)
    assert packed == bytes(int(first) | int(second) << 4 for first, second in pairs)
    again = from_bytes(np.frombuffer(packed, np.uint8), CODES[fmt], pairs.shape)
    same_bits(again, pairs.view(dtype))
    assert packed == onnx.numpy_helper.from_array(pairs.view(dtype)).raw_data


@pytest.mark.parametrize("fmt", NARROW)
@pytest.mark.parametrize("size", [0, 1, 2, 3, 15, 127])
def test_odd_lengths_end_with_half_a_byte(fmt: str, size: int) -> None:
    nibbles = np.random.default_rng(size).integers(0, 16, size).astype(np.uint8)
    values = nibbles.view(FORMATS[fmt].dtype())
    packed = raw(values, fmt)
    assert len(packed) == payload_bytes(CODES[fmt], (size,)) == (size + 1) // 2
    if size % 2:
        assert packed[-1] == nibbles[-1]
    same_bits(from_bytes(np.frombuffer(packed, np.uint8), CODES[fmt], (size,)), values)


def test_signed_bytes_and_strided_views_pack_alike() -> None:
    dtype = FORMATS["int4"].dtype()
    values = np.arange(-8, 8).astype(np.int8).reshape(4, 4)
    assert raw(values, "int4") == raw(values.astype(dtype), "int4")
    assert raw(values.T, "int4") == raw(np.ascontiguousarray(values.T), "int4")
