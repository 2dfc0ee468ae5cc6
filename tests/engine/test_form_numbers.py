"""The forms' arithmetic: what the graph computes against W8A8 written out in numpy.

The codes of the activation are taken from the graph and held against the exact quotient; the
outputs are held against the exact product of codes. Both tolerances are derived below.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from engine_graphs import QMAX, SMALLEST_AMAX, Form, conv, linear
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

Array = NDArray[np.float64]
EPS = {"fp16": 2.0**-11, "fp32": 2.0**-24}
"""Half a unit in the last place, relative, for normal numbers."""


def run(form: Form, x: NDArray[Any]) -> dict[str, Array]:
    """Outputs and the activation's dequantized codes, from onnx's reference evaluator."""
    model = onnx.ModelProto()
    model.CopyFrom(form.model)
    inner = next(n for n in model.graph.node if n.op_type == "DequantizeLinear")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(inner.output[0]))
    names = [o.name for o in model.graph.output]
    found = ReferenceEvaluator(model).run(None, {"x": x})
    named = {name: np.asarray(v, np.float64) for name, v in zip(names, found, strict=True)}
    named["activation"] = named.pop(inner.output[0])
    return named


def rows(base: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Activations with outliers, a row of zeros, a tiny row and a huge one."""
    x = np.random.default_rng(3).normal(size=shape)
    x[..., 3] *= 40
    x[0, 0] = 0
    x[0, 1] *= 1e-6
    x[0, 2] *= 300
    return x.astype(np.float16 if base == "fp16" else np.float32)


def exact_codes(x: Array, m: Array, fmt: str) -> Array:
    """x / m in units of one code, before rounding."""
    return x / m * QMAX[fmt]


@pytest.mark.parametrize("base", ["fp16", "fp32"])
@pytest.mark.parametrize("fmt", ["int8", "fp8"])
@pytest.mark.parametrize("consumers", [1, 3])
def test_dynamic_linear_is_w8a8_per_token(fmt: str, base: str, consumers: int) -> None:
    form = linear(fmt, base=base, dynamic=True, consumers=consumers)
    x = rows(base, (2, 6, 64))
    found = run(form, x)
    m = np.maximum(np.abs(x.astype(np.float64)).max(-1, keepdims=True), SMALLEST_AMAX[base])
    codes = found["activation"] / form.arrays["act_scale"].astype(np.float64)
    _check_codes(codes, exact_codes(x.astype(np.float64), m, fmt), fmt, base)
    assert not codes[0, 0].any()
    scale = float(form.arrays["act_scale"])
    for index in range(consumers):
        acting = form.arrays[f"acting{index}"].astype(np.float64)
        weight = form.arrays[f"codes{index}"].astype(np.float64) * acting
        bias = form.arrays[f"bias{index}"].astype(np.float64)
        product = codes * scale @ weight * m
        # Every value is rounded to the base: both operands' dequantized values and the product
        # (K = 64 roundings at most in a sum, whatever its order), then Mul m, Mul rest, Add bias.
        size = np.abs(codes * scale) @ np.abs(weight) * m
        tolerance = EPS[base] * ((64 + 6) * size + 2 * np.abs(product + bias) + np.abs(bias))
        # In FP16 the product of normalised rows may be subnormal: 2^-25 before it is times m.
        tolerance += 2.0**-24 * m * form.arrays[f"weight{index}"].max() + 2.0**-24
        assert (np.abs(found[f"y{index}"] - (product + bias)) <= tolerance).all()


@pytest.mark.parametrize("base", ["fp16", "fp32"])
@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_dynamic_linear_stays_near_the_float_product(fmt: str, base: str) -> None:
    form = linear(fmt, base=base, dynamic=True)
    x = rows(base, (2, 6, 64)).astype(np.float64)
    found = run(form, x.astype(np.float16 if base == "fp16" else np.float32))
    weight = form.arrays["weight0"].astype(np.float64)
    true = x @ weight + form.arrays["bias0"]
    m = np.maximum(np.abs(x).max(-1, keepdims=True), SMALLEST_AMAX[base])
    # INT8: half a step of m / 127 on x and of s_w on W. FP8: relative 2^-4 (three bits and the
    # hidden one), or half a subnormal step of 2^-9 codes. 1 % on top for the FP16 roundings.
    if fmt == "int8":
        dx, dw = np.broadcast_to(m / 127 / 2, x.shape), form.arrays["acting0"] / 2
        dw = np.broadcast_to(dw, weight.shape)
    else:
        dx = np.maximum(np.abs(x) * 2.0**-4, m / 448 * 2.0**-10)
        dw = np.maximum(np.abs(weight) * 2.0**-4, form.arrays["acting0"] * 2.0**-10)
    bound = dx @ np.abs(weight) + np.abs(x) @ dw + dx @ dw
    slack = 0.01 * (np.abs(x) @ np.abs(weight) + np.abs(true))
    assert (np.abs(found["y0"] - true) <= bound + slack).all()


@pytest.mark.parametrize("base", ["fp16", "fp32"])
@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_dynamic_conv_is_w8a8_per_sample(fmt: str, base: str) -> None:
    form = conv(fmt, base=base, dynamic=True, channels=(8, 6))
    x = rows(base, (2, 8, 5, 5))
    x[1] = 0
    found = run(form, x)
    exact = x.astype(np.float64)
    m = np.abs(exact).max((1, 2, 3), keepdims=True)
    m = np.maximum(m, SMALLEST_AMAX[base])
    codes = found["activation"] / form.arrays["act_scale"].astype(np.float64)
    _check_codes(codes, exact_codes(exact, m, fmt), fmt, base)
    assert not codes[1].any()
    acting = form.arrays["acting0"].astype(np.float64)[:, None, None, None]
    weight = form.arrays["codes0"].astype(np.float64) * acting
    normal = codes * float(form.arrays["act_scale"])
    bias = form.arrays["bias0"].astype(np.float64)[:, None, None]
    product = _convolve(normal, weight) * m
    size = _convolve(np.abs(normal), np.abs(weight)) * m
    taps = 8 * 9  # the longest sum
    tolerance = EPS[base] * ((taps + 6) * size + 2 * np.abs(product + bias) + np.abs(bias))
    tolerance += 2.0**-24 * m * np.abs(weight).max() + 2.0**-24
    assert (np.abs(found["y0"] - np.maximum(product + bias, 0)) <= tolerance).all()


@pytest.mark.parametrize("fmt", ["int8", "fp8"])
def test_form_a_keeps_the_channels_scales(fmt: str) -> None:
    """One power of two and the rest beside it store the same codes as a scale per channel."""
    shared = linear(fmt, base="fp32")
    channel = linear(fmt, base="fp32", weight="channel")
    x = rows("fp32", (2, 6, 64))
    np.testing.assert_allclose(run(shared, x)["y0"], run(channel, x)["y0"], rtol=2e-5, atol=2e-5)
    one = np.abs(shared.arrays["weight0"]).max() / QMAX[fmt]
    worst = shared.arrays["acting0"].min() / one
    assert worst < 0.3  # else one scale for all would do as well and this shows nothing


def _check_codes(codes: Array, exact: Array, fmt: str, base: str) -> None:
    """Codes are the nearest to the exact quotient, but for roundings of the quotient itself.

    x / m and its division by the scale are rounded to the base, as is the scale: three relative
    errors of EPS; 1/127 in FP16 is off by up to that much too. INT8: half a step beside it.
    FP8: half a step is 2^-4 relative, or 2^-10 where subnormal.
    """
    limit = QMAX[fmt]
    exact = np.clip(exact, -limit, limit)
    half = np.full_like(exact, 0.5)
    if fmt == "fp8":
        half = np.maximum(np.abs(exact) * 2.0**-4, 2.0**-10)
    # FP16 quotients below 2^-14 have steps of 2^-24.
    rounding = 4 * EPS[base] * np.abs(exact) + 2.0**-24 * limit
    assert (np.abs(codes - exact) <= half * 1.001 + rounding).all()


def _convolve(x: Array, w: Array) -> Array:
    """3x3, stride 1, zero padding 1."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.asarray(np.einsum("bchwij,ocij->bohw", windows, w))
