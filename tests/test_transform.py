"""What is emitted computes what it should: every form against numpy and onnx's own Q/DQ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from core_attention import SPELLINGS
from core_graphs import (
    Net,
    initializer,
    inlined,
    operators,
    placed,
    quantized,
    ranges_of,
    run,
    snr,
)
from core_oracle import dequantize_linear, evaluate, quantize_linear
from onnx import TensorProto
from test_attention import feeds as attention_feeds
from test_attention import half_net, peaks_of

import onnxq
from onnxq.errors import OnnxqError
from onnxq.graph.casting import apply_precision
from onnxq.graph.model import Model
from onnxq.graph.precision import BASES, plan_precision
from onnxq.graph.prepare import prepare
from onnxq.graph.query import constant_operand
from onnxq.graph.save import save
from onnxq.ranging import settle
from onnxq.transform import apply_placement

QMAX = {"int8": 127.0, "fp8": 448.0}
BF16 = np.dtype(ml_dtypes.bfloat16)
FP16, FP32 = np.dtype(np.float16), np.dtype(np.float32)
# FP32: the same codes, sums in another order. FP16: scales, ratios and sums carry 2^-11 each, and
# that tips some codes over to a neighbour: 2^-11 of them, by a step of 2^-4 (FP8) or 2^-7.
CLOSE = {FP32: 100.0, FP16: 45.0, BF16: 30.0}

PEAK = 16.0
"""Beyond any activation here: nothing saturates."""

PRESETS = ["int8", "fp8", "int8-dynamic", "fp8-dynamic"]
each_preset = pytest.mark.parametrize("preset", PRESETS)
each_base = pytest.mark.parametrize("dtype", [FP32, FP16], ids=lambda d: d.name)


# --- what it should compute -----------------------------------------------------------------------


def fake_quantized(x: Any, scale: Any, fmt: str) -> Any:
    """Q and DQ by onnx's evaluator, in double."""
    scale = np.float32(scale)
    codes = quantize_linear(x.astype(np.float32), scale, fmt)
    return dequantize_linear(codes, scale).astype(np.float64)


def expected_activation(x: Any, preset: str, peak: float, axes: tuple[int, ...]) -> Any:
    """x as its codes stand for it: under a scale for all, or one for each row or sample."""
    fmt = preset[:4].rstrip("-")
    x64 = x.astype(np.float64)
    if "dynamic" not in preset:
        return fake_quantized(x, np.asarray(peak / QMAX[fmt]).astype(x.dtype), fmt)
    m = np.abs(x64).max(axes, keepdims=True)
    m = np.where(m == 0, 1, m)
    scale = np.asarray(1 / QMAX[fmt]).astype(x.dtype)
    return fake_quantized((x64 / m).astype(x.dtype), scale, fmt) * m


def expected_weight(w: Any, preset: str, axis: int | None) -> Any:
    """Each channel under its own scale (or the tensor under one)."""
    fmt = preset[:4].rstrip("-")
    rows = w.astype(np.float32)[None] if axis is None else np.moveaxis(w, axis, 0)
    # A channel's scale has the weight's type: numpy 1 would divide 16 bits in double.
    scales = [(np.abs(row).max() / np.float32(QMAX[fmt])).astype(row.dtype) for row in rows]
    found = [fake_quantized(row, scale, fmt) for row, scale in zip(rows, scales, strict=True)]
    return found[0] if axis is None else np.moveaxis(np.stack(found), 0, axis)


def uneven(net: Net, name: str, *shape: int, axis: int) -> Any:
    """A weight whose channels differ by 1000: under one scale most would be lost."""
    spread = np.geomspace(1e-2, 10, shape[axis])
    w = net.rng.standard_normal(shape) / np.sqrt(np.prod(shape) / shape[axis])
    w = (w * spread.reshape([-1 if i == axis else 1 for i in range(len(shape))])).astype(net.dtype)
    net.const(name, w)
    return w


def activations(*shape: int, dtype: Any = FP32, seed: int = 3) -> Any:
    """Rows of different magnitude, one of zeros."""
    x = np.random.default_rng(seed).standard_normal(shape)
    x = x * np.geomspace(0.1, 4, shape[0]).reshape([-1] + [1] * (len(shape) - 1))
    x[1] = 0
    return x.astype(dtype)


def products_read_dequantizers(proto: onnx.ModelProto, *names: str) -> None:
    """Both operands of each product come straight from a DequantizeLinear."""
    producer = {o: n.op_type for n in proto.graph.node for o in n.output}
    for node in proto.graph.node:
        if node.name in names:
            assert [producer.get(i) for i in node.input[:2]] == ["DequantizeLinear"] * 2


# --- linear layers --------------------------------------------------------------------------------

LINEAR = {
    # operator, has bias, attributes, rank of x
    "matmul": ("MatMul", False, {}, 2),
    "matmul-3d": ("MatMul", False, {}, 3),
    "gemm": ("Gemm", False, {}, 2),
    "gemm-bias": ("Gemm", True, {}, 2),
    "gemm-trans-b": ("Gemm", True, {"transB": 1}, 2),
    "gemm-alpha": ("Gemm", True, {"transB": 1, "alpha": 0.75}, 2),
}


def linear_net(form: str, dtype: Any) -> tuple[Net, Any, Any]:
    """The net, its weight as [K, N] and its bias."""
    op, has_bias, attributes, rank = LINEAR[form]
    net = Net(dtype=dtype)
    x = net.input("x", ["m", "s", 48][3 - rank :])
    transposed = bool(attributes.get("transB"))
    shape = (32, 48) if transposed else (48, 32)
    w = uneven(net, "w", *shape, axis=0 if transposed else 1)
    inputs = [x, "w"]
    bias = np.linspace(-2, 2, 32).astype(dtype)
    if has_bias:
        inputs.append(net.const("bias", bias))
    net.output(net.op(op, *inputs, name="/fc", **attributes))
    wide = (w.T if transposed else w).astype(np.float64)
    return net, wide, bias if has_bias else np.zeros(32)


@each_base
@each_preset
@pytest.mark.parametrize("form", LINEAR)
def test_linear_layers(form: str, preset: str, dtype: Any) -> None:
    net, w, bias = linear_net(form, dtype)
    shape = (5, 48) if LINEAR[form][3] == 2 else (5, 3, 48)
    x = activations(*shape, dtype=dtype)
    peak = float(np.abs(x).max())
    proto = quantized(net, preset, peaks=None if "dynamic" in preset else peak)
    alpha = LINEAR[form][2].get("alpha", 1.0)
    activation = expected_activation(x, preset, peak, (-1,))
    expected = alpha * activation @ expected_weight(w.astype(dtype), preset, 1) + bias
    for found in (run(proto, {"x": x})[0], evaluate(proto, {"x": x})[0]):
        assert found.dtype == dtype
        assert snr(expected, found) > CLOSE[dtype]
        # Channel by channel, or the small ones could be anything.
        for channel in (0, 15, 31):
            assert snr(expected[..., channel], found[..., channel]) > CLOSE[dtype] - 12
        np.testing.assert_array_equal(found[1], np.broadcast_to(bias, found[1].shape))
    products_read_dequantizers(proto, "/fc")


@each_preset
def test_linear_layers_in_bf16(preset: str) -> None:
    net, w, bias = linear_net("gemm-alpha", BF16)
    x = activations(5, 48, dtype=BF16)
    peak = float(np.abs(x.astype(np.float32)).max())
    proto = quantized(net, preset, peaks=None if "dynamic" in preset else peak)
    kinds = {t.data_type for t in proto.graph.initializer} - {TensorProto.INT64}
    codes = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}[preset[:4].rstrip("-")]
    assert kinds == {TensorProto.BFLOAT16, codes}
    activation = expected_activation(x, preset, peak, (-1,))
    expected = 0.75 * activation @ expected_weight(w, preset, 1) + bias.astype(np.float64)
    found = evaluate(proto, {"x": x})[0]
    assert snr(expected, found.astype(np.float64)) > CLOSE[BF16]


@each_preset
def test_one_scale_for_the_whole_weight(preset: str) -> None:
    for dtype in (FP32, FP16):
        net, w, bias = linear_net("gemm-bias", dtype)
        x = activations(5, 48, dtype=dtype)
        peak = float(np.abs(x).max())
        peaks = None if "dynamic" in preset else peak
        proto = quantized(net, preset, peaks=peaks, weight_granularity="tensor")
        activation = expected_activation(x, preset, peak, (-1,))
        expected = activation @ expected_weight(w.astype(dtype), preset, None) + bias
        # One of 1,536 codes tips over at a tie, the largest weight's: -216 is 208 or 224 steps.
        assert snr(expected, run(proto, {"x": x})[0]) > CLOSE[dtype] - 12
        if "dynamic" not in preset:  # alone under its scale, it needs no factor behind it
            assert not operators(proto, ["Mul"])


def test_codes_are_onnxs_own() -> None:
    """Ties among them: a weight of half-integers under a scale of 1 rounds to even."""
    halves = (np.arange(32 * 16).reshape(32, 16) % 253 - 126) / 2 + 0.5
    halves[0] = 127
    net = Net()
    net.const("w", halves)
    net.output(net.op("MatMul", net.input("x", ["m", 32]), "w", name="/fc"))
    for fmt in ("int8", "fp8"):
        w = halves if fmt == "int8" else halves * (448 / 127)
        net.initializers[0] = onnx.numpy_helper.from_array(w.astype(np.float32), "w")
        proto = quantized(net, fmt, peaks=1.0)
        np.testing.assert_array_equal(initializer(proto, "w_scale"), np.ones(16, np.float32))
        expected = quantize_linear(w.astype(np.float32), np.ones(16, np.float32), fmt)
        codes = initializer(proto, f"w_{fmt}")
        np.testing.assert_array_equal(codes.view(np.uint8), expected.view(np.uint8))


# --- convolutions ---------------------------------------------------------------------------------

CONVS: dict[str, tuple[tuple[int, ...], dict[str, Any], bool]] = {
    "1d": ((24, 20, 3), {"pads": [1, 1]}, True),
    "2d": ((24, 20, 3, 3), {"pads": [1] * 4, "strides": [2, 2]}, True),
    "2d-no-bias": ((24, 20, 1, 1), {}, False),
    "2d-groups": ((40, 20, 3, 3), {"group": 2}, True),
    "3d": ((24, 20, 2, 2, 2), {"dilations": [1, 1, 1]}, True),
}


def convolution_net(form: str, dtype: Any) -> tuple[Net, Any, Any]:
    shape, attributes, has_bias = CONVS[form]
    net = Net(dtype=dtype)
    channels = shape[1] * attributes.get("group", 1)
    x = net.input("x", ["n", channels, *(f"d{i}" for i in range(len(shape) - 2))])
    w = uneven(net, "w", *shape, axis=0)
    bias = np.linspace(-1, 1, shape[0]).astype(dtype)
    inputs = [x, "w"] + ([net.const("bias", bias)] if has_bias else [])
    net.output(net.op("Conv", *inputs, name="/conv", **attributes))
    return net, w, bias if has_bias else np.zeros(shape[0], dtype)


@each_base
@each_preset
@pytest.mark.parametrize("form", CONVS)
def test_convolutions(form: str, preset: str, dtype: Any) -> None:
    net, w, bias = convolution_net(form, dtype)
    shape, attributes, _ = CONVS[form]
    channels = shape[1] * attributes.get("group", 1)
    x = activations(3, channels, *[6] * (len(shape) - 2), dtype=dtype)
    peak = float(np.abs(x).max())
    proto = quantized(net, preset, peaks=None if "dynamic" in preset else peak)
    axes = tuple(range(1, x.ndim))
    plain, _, _ = convolution_net(form, FP32)  # the convolution itself, of what codes stand for
    plain.initializers = [t for t in plain.initializers if t.name not in ("w", "bias")]
    plain.const("w", expected_weight(w, preset, 0))
    plain.const("bias", bias.astype(np.float32))
    activation = expected_activation(x, preset, peak, axes).astype(np.float32)
    expected = run(plain.model(), {"x": activation})[0]
    found = run(proto, {"x": x})[0]
    assert snr(expected, found) > CLOSE[dtype]
    for channel in (0, 12, shape[0] - 1):
        assert snr(expected[:, channel], found[:, channel]) > CLOSE[dtype] - 12
    column = bias.reshape([1, -1] + [1] * (x.ndim - 2))[0]
    np.testing.assert_array_equal(found[1], np.broadcast_to(column, found[1].shape))
    products_read_dequantizers(proto, "/conv")


def test_a_bias_that_is_computed() -> None:
    net = Net(dtype=FP16)
    x, b = net.input("x", ["n", 20, "h", "w"]), net.input("b", [24])
    uneven(net, "w", 24, 20, 3, 3, axis=0)
    net.output(net.op("Conv", x, "w", net.op("Neg", b, name="/neg"), name="/conv"))
    feeds = {"x": activations(2, 20, 6, 6, dtype=FP16), "b": np.linspace(-1, 1, 24).astype(FP16)}
    proto = quantized(net, "fp8-dynamic")
    # A zero sample gives the bias; FP8 has 2^-4 / sqrt(12) noise in either operand.
    np.testing.assert_array_equal(
        run(proto, feeds)[0][1], np.broadcast_to(-feeds["b"][:, None, None], (24, 4, 4))
    )
    assert snr(run(net.model(), feeds)[0], run(proto, feeds)[0]) > 25


# --- extremes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=lambda d: d.name)
@pytest.mark.parametrize("magnitude", [1e-3, 1.0, 3e4])
def test_dynamic_scales_follow_the_row(dtype: Any, magnitude: float) -> None:
    """Rows of zeros, of tiny and of large numbers: no NaN, and none is crushed."""
    net = Net(dtype=dtype)
    net.output(net.op("MatMul", net.input("x", ["m", 32]), net.weight("w", 32, 16), name="/fc"))
    w = onnx.numpy_helper.to_array(net.initializers[0]).astype(np.float64)
    x = (np.random.default_rng(0).uniform(-1, 1, (4, 32)) * magnitude).astype(dtype)
    x[0] = 0
    found = evaluate(quantized(net, "int8-dynamic"), {"x": x})[0].astype(np.float64)
    expected = x.astype(np.float64) @ w
    assert (found[0] == 0).all()
    # INT8: rows and channels of uniform and normal numbers are 2^-8 and 2^-6 fine: 35 dB.
    assert snr(expected, found) > 30


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=lambda d: d.name)
def test_rows_far_below_fp16_are_not_crushed(dtype: Any) -> None:
    net = Net(dtype=dtype)
    net.output(net.op("MatMul", net.input("x", ["m", 32]), net.weight("w", 32, 16), name="/fc"))
    w = onnx.numpy_helper.to_array(net.initializers[0]).astype(np.float64)
    x = (np.random.default_rng(0).standard_normal((4, 32)) * 1e-12).astype(dtype)
    found = evaluate(quantized(net, "int8-dynamic"), {"x": x})[0].astype(np.float64)
    assert snr(x.astype(np.float64) @ w, found) > 30


@pytest.mark.parametrize("preset", ["int8", "fp8", "int8-dynamic"])
def test_channels_that_differ_by_ten_million(preset: str) -> None:
    """One large channel among dead and tiny ones: no infinite ratio, and the large one is right."""
    net = Net(dtype=FP16)
    w = np.random.default_rng(0).standard_normal((32, 16)) * 6e-7
    w[:, 3] *= 1e7
    w[:, 5] = 0
    net.const("w", w)
    net.output(net.op("MatMul", net.input("x", ["m", 32]), "w", name="/fc"))
    x = np.random.default_rng(1).standard_normal((64, 32)).astype(FP16)
    found = run(quantized(net, preset, peaks=None if "dynamic" in preset else 4.5), {"x": x})[0]
    expected = run(net.model(), {"x": x})[0]
    assert np.isfinite(found).all()
    assert snr(expected[:, 3], found[:, 3]) > 25
    assert (found[:, 5] == 0).all()


@pytest.mark.parametrize("preset", ["int8", "fp8"])
def test_sums_that_fit_fp16_do_not_overflow_before_their_rescale(preset: str) -> None:
    """Results of 40,000 from a channel whose weights are an eighth of the others'."""
    net = Net(dtype=FP16)
    w = np.ones((64, 16))
    w[:, 3] = 0.125
    net.const("w", w)
    net.output(net.op("MatMul", net.input("x", ["m", 64]), "w", name="/fc"))
    x = np.full((2, 64), 5000, FP16)
    x[1, 1::2] = -5000
    found = evaluate(quantized(net, preset, peaks=5000.0), {"x": x})[0]
    np.testing.assert_allclose(found[0, 3], 40000, rtol=2e-2)
    np.testing.assert_array_equal(found[1], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(bad: float) -> None:
    net = Net()
    w = np.ones((32, 16))
    w[3, 4] = bad
    net.const("fc.weight", w)
    net.output(net.op("MatMul", net.input("x", ["m", 32]), "fc.weight", name="/fc"))
    with pytest.raises(OnnxqError, match=r"weight 'fc\.weight' of '/fc' holds NaN or inf") as error:
        quantized(net, "int8-dynamic")
    assert "leave weight=fc.weight" in error.value.hint
    assert operators(quantized(net, "int8-dynamic", "leave weight=fc.weight")) == ["MatMul"]


@pytest.mark.parametrize(
    ("peak", "reason"),
    [
        (0.0, "its input was 0 throughout the calibration"),
        (1e-4, "a range of 0.0001 needs a scale below the normal numbers of float16"),
        (1e7, "a range of 1e+07 needs a scale that overflows float16"),
    ],
)
def test_ranges_without_a_scale_leave_the_layer(peak: float, reason: str) -> None:
    net = Net(dtype=FP16)
    x = net.op("MatMul", net.input("x", ["m", 32]), net.weight("w", 32, 32), name="/first")
    net.output(net.op("MatMul", x, net.weight("v", 32, 16), name="/second"))
    model = net.loaded(21)
    placement = placed(model, "int8")
    ranges = ranges_of(placement, {"x": 4.0, "/first:0": peak})
    settled = settle(placement, ranges)
    assert [d.reason for d in settled.left] == [reason]
    edits = apply_placement(model, settled, ranges)
    assert [(e.verb, e.target) for e in edits] == [("quantize", "/first"), ("leave", "/second")]
    assert edits[1].reason == reason
    assert operators(inlined(model), ["QuantizeLinear"]) == ["QuantizeLinear"]


def test_a_range_of_ten_million_gives_a_right_model(tmp_path: Path) -> None:
    """Between two layers values reach 1e7; FP16 has no such scale, and no such numbers."""
    net = Net()
    x = net.op("MatMul", net.input("x", ["m", 32]), net.weight("w", 32, 32), name="/first")
    x = net.op("Mul", x, net.const("up", 1e7), name="/up")
    x = net.op("MatMul", x, net.weight("v", 32, 16, scale=1e-7), name="/second")
    net.output(net.op("Relu", x, name="/relu"))
    source = net.save(tmp_path / "m.onnx")
    data = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=data)
    for name in ("int8", "fp8"):
        done = onnxq.quantize(
            source, tmp_path / "q.onnx", recipe=name, calib=tmp_path / "calib.npz"
        )
        found = run(onnx.load(done.files[0]), {"x": data})[0]
        # Two layers of 8 bits; the larger rows decide the step of INT8: 25 dB.
        assert snr(run(net.model(), {"x": data})[0], found) > 22


# --- what is shared -------------------------------------------------------------------------------


def projections(dtype: Any = FP16) -> tuple[Net, dict[str, Any]]:
    """q, k and v of one tensor, weights of different magnitude; and another layer of it."""
    net = Net(dtype=dtype)
    x = net.op("Relu", net.input("x", ["b", "s", 32]), name="/norm")
    weights = {}
    for name, scale in (("q", 1.0), ("k", 0.02), ("v", 8.0)):
        net.weight(f"{name}.weight", 32, 32, scale=scale)
        weights[name] = onnx.numpy_helper.to_array(net.initializers[-1]).astype(np.float64)
        net.output(net.op("MatMul", x, f"{name}.weight", name=f"/{name}"))
        net.module(f"model.{name}_proj")
    return net, weights


@pytest.mark.parametrize("preset", ["int8", "int8-dynamic", "fp8"])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_projections_share_one_q_dq_and_one_scale(preset: str, granularity: str) -> None:
    net, weights = projections()
    proto = quantized(
        net,
        preset,
        peaks=None if "dynamic" in preset else PEAK,
        weight_granularity=granularity,
    )
    assert len(operators(proto, ["QuantizeLinear"])) == 1
    assert len(operators(proto, ["ReduceMax"])) == ("dynamic" in preset)
    scales = {float(initializer(proto, f"{name}.weight_scale")) for name in weights}
    assert len(scales) == 1 and np.frexp(scales.pop())[0] == 0.5
    nodes = {n.name: n for n in proto.graph.node}
    assert len({nodes[f"/{name}"].input[0] for name in weights}) == 1
    feeds = {"x": activations(4, 3, 32, dtype=FP16)}
    for a, b in zip(run(net.model(), feeds), run(proto, feeds), strict=True):
        assert snr(a, b) > 22


def test_in_fp32_each_weight_keeps_its_own_scale() -> None:
    net, weights = projections(FP32)
    proto = quantized(net, "int8", peaks=PEAK)
    for name, w in weights.items():
        stored = initializer(proto, f"{name}.weight_scale")
        np.testing.assert_allclose(stored, np.abs(w).max(0) / 127, rtol=1e-6)
    assert not operators(proto, ["Mul"])


def test_a_layer_left_by_a_rule_reads_what_it_read() -> None:
    net, _ = projections()
    proto = quantized(net, "int8", "leave node=/k", peaks=PEAK)
    nodes = {n.name: n for n in proto.graph.node}
    assert list(nodes["/k"].input) == ["/norm:0", "k.weight"]
    stored = {t.name for t in proto.graph.initializer}
    assert "k.weight" in stored and "q.weight" not in stored
    feeds = {"x": activations(4, 3, 32, dtype=FP16)}
    np.testing.assert_array_equal(run(net.model(), feeds)[1], run(proto, feeds)[1])


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=lambda d: d.name)
def test_an_embedding_that_is_the_lm_head_too(dtype: Any) -> None:
    """Gather keeps the float table, byte for byte; the product gets codes in its own layout."""
    net = Net(dtype=dtype)
    ids = net.input("ids", ["s"], np.int64)
    table = net.weight("embedding", 64, 32)
    hidden = net.op("Gather", table, ids, name="/embed")
    head = net.op("Transpose", table, perm=[1, 0], name="/t")
    net.output(net.op("MatMul", hidden, head, name="/head"))
    proto = quantized(net, "int8-dynamic", lm_head="quantize")
    stored = {t.name: t for t in proto.graph.initializer}
    assert stored["embedding"].SerializeToString() == net.initializers[0].SerializeToString()
    assert list(stored["embedding_int8"].dims) == [32, 64]
    assert "Transpose" not in operators(proto)
    products_read_dequantizers(proto, "/head")
    feeds = {"ids": np.arange(40, 60)}
    assert snr(run(net.model(), feeds)[0], run(proto, feeds)[0]) > 30


def test_a_weight_of_two_layers_is_stored_once() -> None:
    net = Net(dtype=FP16)
    w = net.weight("w", 32, 32)
    x = net.op("MatMul", net.input("x", ["m", 32]), w, name="/a")
    net.output(net.op("MatMul", net.op("Relu", x, name="/relu"), w, name="/b"))
    proto = quantized(net, "fp8-dynamic")
    nodes = {n.name: n for n in proto.graph.node}
    assert nodes["/a"].input[1] == nodes["/b"].input[1]
    codes = [t for t in proto.graph.initializer if t.data_type == TensorProto.FLOAT8E4M3FN]
    assert len([t for t in codes if t.dims]) == 1
    feeds = {"x": activations(4, 32, dtype=FP16)}
    assert snr(run(net.model(), feeds)[0], run(proto, feeds)[0]) > 25


@pytest.mark.parametrize(
    "through", [("Transpose",), ("Identity",), ("Cast",), ("Identity", "Transpose", "Cast")]
)
def test_weights_behind_layout_nodes_and_casts(through: tuple[str, ...]) -> None:
    net = Net()
    w = np.random.default_rng(0).standard_normal((32, 48)) / 6
    transposed = "Transpose" in through
    stored = w.T if transposed else w
    tensor = net.const("w", stored, FP16 if "Cast" in through else FP32)
    w = onnx.numpy_helper.to_array(net.initializers[0]).astype(np.float32)
    w = w.T if transposed else w
    for kind in through:
        tensor = net.op(kind, tensor, **({"to": 1} if kind == "Cast" else {}))
    net.output(net.op("MatMul", net.input("x", ["m", 32]), tensor, name="/fc"))
    proto = quantized(net, "int8", peaks=PEAK)
    assert operators(proto) == ["QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "MatMul"]
    scale = (np.abs(w).max(0) / 127).astype(np.float32)
    np.testing.assert_array_equal(
        initializer(proto, "w_int8"), quantize_linear(w, scale, "int8", axis=1)
    )


def test_a_convolutions_weight_behind_two_transposes() -> None:
    """Channels last in the file, turned twice: (2, 0, 1, 3), then (0, 3, 1, 2)."""
    net = Net()
    w = np.random.default_rng(0).standard_normal((24, 20, 3, 2)).astype(np.float32)
    stored = np.transpose(np.transpose(w, (0, 2, 3, 1)), (1, 2, 0, 3))
    once = net.op("Transpose", net.const("w", stored), perm=[2, 0, 1, 3])
    twice = net.op("Transpose", once, perm=[0, 3, 1, 2])
    net.output(net.op("Conv", net.input("x", ["n", 20, "h", "w"]), twice, name="/conv"))
    proto = quantized(net, "int8", peaks=PEAK)
    scale = (np.abs(w).max((1, 2, 3)) / 127).astype(np.float32)
    np.testing.assert_array_equal(
        initializer(proto, "w_int8"), quantize_linear(w, scale, "int8", axis=0)
    )


# --- from FP32 to 16 bits and 8 -------------------------------------------------------------------


def through_precision(
    net: Net, preset: str, base: str, peaks: Mapping[str, float] | float | None = None
) -> onnx.ModelProto:
    """As `quantize` does it: place, convert the base precision, emit."""
    model = net.loaded(BASES[base].min_opset)
    placement = placed(model, preset)
    ranges = ranges_of(placement, peaks)
    apply_precision(model, plan_precision(model, BASES[base]))
    apply_placement(model, settle(placement, ranges), ranges)
    return inlined(model)


@pytest.mark.parametrize("base", ["fp16", "bf16"])
@each_preset
def test_codes_come_from_the_fp32_weights(preset: str, base: str) -> None:
    """Not from their 16-bit copies, which are rounded already; those are not even stored."""
    net, w, bias = linear_net("gemm-bias", FP32)
    proto = through_precision(net, preset, base, None if "dynamic" in preset else PEAK)
    fmt = preset[:4].rstrip("-")
    stored = {t.name: t for t in proto.graph.initializer}
    assert "w" not in stored and f"w_{base}" not in stored
    scale = initializer(proto, "w_scale").astype(np.float32)
    effective = scale * initializer(proto, "w_channel_scale").astype(np.float32)
    unit = {"fp16": 2.0**-11, "bf16": 2.0**-8}[base]
    np.testing.assert_allclose(effective, np.abs(w).max(0) / QMAX[fmt], rtol=unit)
    codes = quantize_linear(w.astype(np.float32), effective, fmt, axis=1)
    np.testing.assert_array_equal(
        initializer(proto, f"w_{fmt}").view(np.uint8), codes.view(np.uint8)
    )
    x = activations(5, 48)
    found = evaluate(proto, {"x": x})[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[1], bias, rtol=unit)


def test_a_converted_weight_still_knows_its_fp32_values() -> None:
    net, w, _ = linear_net("matmul", FP32)
    w = onnx.numpy_helper.to_array(net.initializers[0])
    net.initializers[0].raw_data = (w * 1.0001).astype(np.float32).tobytes()
    model = net.loaded(21)
    apply_precision(model, plan_precision(model, BASES["fp16"]))
    operand = constant_operand(next(n for n in model.graph.nodes if n.op == "MatMul"), 1)
    assert operand is not None and operand.constant.name == "w_fp16"
    np.testing.assert_array_equal(operand.load(), (w * 1.0001).astype(np.float32))


@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_nodes_that_lead_nowhere_are_dropped(base: str) -> None:
    net, _, _ = linear_net("matmul", FP32)
    net.op("MatMul", "x", net.weight("dead", 48, 32), name="/dead")
    proto = through_precision(net, "int8-dynamic", base)
    assert operators(proto, ["MatMul"]) == ["MatMul"]
    assert not any(t.name.startswith("dead") for t in proto.graph.initializer)


def test_layers_that_stay_fp32_have_fp32_scales() -> None:
    net = Net()
    x = net.op("MatMul", net.input("x", ["m", 32]), net.weight("w", 32, 32), name="/narrow")
    large = net.weight("large", 32, 32, scale=3e4)  # beyond FP16: it stays
    net.output(net.op("MatMul", x, large, name="/wide"))
    proto = through_precision(net, "int8", "fp16", PEAK)
    assert initializer(proto, "w_scale").dtype == np.float16
    wide = initializer(proto, "large_scale")
    assert wide.dtype == np.float32 and wide.shape == (32,)
    feeds = {"x": activations(4, 32)}
    assert snr(run(net.model(), feeds)[0], evaluate(proto, feeds)[0]) > 20


# --- the file -------------------------------------------------------------------------------------


def test_weights_are_stored_in_8_bits_and_the_floats_are_gone() -> None:
    net, _ = projections()
    before = net.model().ByteSize()
    for preset in PRESETS:
        proto = quantized(net, preset, peaks=None if "dynamic" in preset else PEAK)
        kinds = [t.data_type for t in proto.graph.initializer if len(t.dims) == 2]
        assert len(kinds) == 3 and len(set(kinds)) == 1
        assert kinds[0] in (TensorProto.INT8, TensorProto.FLOAT8E4M3FN)
        weights = sum(len(t.raw_data) for t in proto.graph.initializer if len(t.dims) == 2)
        assert weights == 3 * 32 * 32 < before / 2


def test_outputs_keep_their_names_and_new_names_are_unique() -> None:
    net = Net(dtype=FP16)
    x = net.input("x", ["m", 32])
    taken = net.op("Relu", x, name="x_QuantizeLinear")
    bias = net.const("w_scale", np.ones(32))
    net.nodes[-1].output[0] = "x_quantized"
    y = net.op("Gemm", "x_quantized", net.weight("w", 32, 32), bias, name="/fc")
    assert taken == "x_QuantizeLinear:0"
    net.output(y)
    net.output(net.op("MatMul", x, net.weight("v", 32, 32), name="w_DequantizeLinear"))
    net.output(net.op("Abs", y, name="/abs"))
    for preset in PRESETS:
        proto = quantized(net, preset, peaks=None if "dynamic" in preset else PEAK)
        assert [o.name for o in proto.graph.output] == [o.name for o in net.outputs]
        names = [n.name for n in proto.graph.node]
        values = [o for n in proto.graph.node for o in n.output]
        values += [t.name for t in proto.graph.initializer] + [i.name for i in proto.graph.input]
        assert len(set(names)) == len(names) and len(set(values)) == len(values)
        feeds = {"x": activations(4, 32, dtype=FP16)}
        for a, b in zip(run(net.model(), feeds), run(proto, feeds), strict=True):
            assert snr(a, b) > 20


@each_preset
def test_new_nodes_carry_the_module_path_of_their_layer(preset: str) -> None:
    net, _ = projections()
    proto = quantized(net, preset, peaks=None if "dynamic" in preset else PEAK)
    for node in proto.graph.node:
        if node.name != "/norm":
            assert "_proj" in node.metadata_props[0].value, node.name
    rescale = next(n for n in proto.graph.node if n.name == "/v_Rescale")
    assert "model.v_proj" in rescale.metadata_props[0].value


@each_preset
def test_same_input_same_bytes(preset: str, tmp_path: Path) -> None:
    contents = []
    for path in (tmp_path / "a.onnx", tmp_path / "b.onnx"):
        net, _ = projections()
        source = net.save(tmp_path / "net.onnx")
        model, _ = prepare(Model.load(source), 21)
        placement = placed(model, preset)
        apply_placement(
            model, placement, ranges_of(placement, None if "dynamic" in preset else PEAK)
        )
        contents.append(save(model, path)[0].read_bytes())
    assert contents[0] == contents[1]


@pytest.mark.parametrize("how", SPELLINGS[:8], ids=str)
def test_stripping_q_dq_of_an_activation_only_graph_restores_it(how: Any) -> None:
    net = half_net(how)
    rules = ("leave op=MatMul", "quantize node=/scores")
    proto = quantized(net, "fp8-attention", *rules, peaks=peaks_of(net))
    plain = run(net.model(), attention_feeds(net))[0]
    assert not np.array_equal(run(proto, attention_feeds(net))[0], plain)
    # The factor is a power of two, exact before the product as behind it.
    np.testing.assert_array_equal(run(stripped(proto), attention_feeds(net))[0], plain)


def stripped(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Every reader of a Q/DQ pair reads what the pair reads."""
    sources: dict[str, str] = {}
    kept = []
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            sources[node.output[0]] = sources.get(node.input[0], node.input[0])
        else:
            kept.append(node)
    for node in kept:
        for index, name in enumerate(node.input):
            node.input[index] = sources.get(name, name)
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    copied.graph.ClearField("node")
    copied.graph.node.extend(kept)
    return copied


@pytest.mark.parametrize("preset", ["int8", "fp8-dynamic"])
def test_a_gemm_with_alpha_compiles_into_one_scaled_product(preset: str, tmp_path: Path) -> None:
    """Left in the Gemm, the factor would make the compiler store raw sums of codes in FP16."""
    pytest.importorskip("tensorrt_rtx")
    net, _, _ = linear_net("gemm-alpha", FP32)
    np.savez(tmp_path / "calib.npz", x=activations(8, 48))
    calib = None if "dynamic" in preset else tmp_path / "calib.npz"
    source = net.save(tmp_path / "m.onnx")
    done = onnxq.quantize(source, tmp_path / "q.onnx", recipe=preset, calib=calib)
    built = onnxq.build(done.files[0], tmp_path / "m.plan", shapes=["x:1x48,8x48,64x48"])
    assert built.coverage is not None and built.coverage.complete
    assert built.report.facts["products"]["gemm"] == {preset[:4].rstrip("-"): 1}


@pytest.mark.parametrize("opset", [17, 19, 20, 22])
@pytest.mark.parametrize("name", ["fp8", "fp8-dynamic"])
def test_fp8_behind_a_transpose_loads_in_onnx_runtime_as_it_is(
    name: str, opset: int, tmp_path: Path
) -> None:
    """At opset 19 and 20 it moves the Transpose to between Q and DQ, and has none of FP8."""
    net = Net(opset=opset)
    turned = net.op("Transpose", net.input("x", ["b", 64, 8]), perm=[0, 2, 1])
    y = net.op("MatMul", turned, net.weight("w", 64, 64), name="/fc1")
    split = net.op("Reshape", y, net.const("heads", np.array([0, 0, 4, 16])))
    turned = net.op("Transpose", split, perm=[0, 2, 1, 3])
    merged = net.op("Reshape", turned, net.const("flat", np.array([0, -1, 16])))
    net.output(net.op("MatMul", merged, net.weight("v", 16, 32), name="/fc2"))
    x = np.random.default_rng(0).standard_normal((2, 64, 8)).astype(np.float32)
    np.savez(tmp_path / "d.npz", x=x)
    source = net.save(tmp_path / "m.onnx")
    made = onnxq.quantize(source, recipe=name, calib=tmp_path / "d.npz")
    assert made.placement is not None and len(made.placement.quantized) == 2
    session = ort.InferenceSession(made.files[0], providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": x})
    assert snr(run(onnx.load(source), {"x": x})[0], found) > 25
