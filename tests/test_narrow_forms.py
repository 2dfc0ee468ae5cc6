"""Weights alone, W4A8, NVFP4 and MXFP8: what is emitted computes what it should."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from core_graphs import Net, initializer, inlined, operators, placed, quantized, run, snr
from core_oracle import evaluate
from onnx import TensorProto

from onnxq.calibrate.ranges import Range
from onnxq.errors import OnnxqError
from onnxq.transform import apply_placement

FP16, FP32, BF16 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
# FP32: the same codes, sums in another order. 16 bits: the weight, the product and what follows are
# rounded to 2^-11 (2^-8), and that tips some codes of activations over to a neighbour.
CLOSE = {FP32: 95.0, FP16: 45.0, BF16: 28.0}
QMAX = {"int8": 127.0, "fp8": 448.0, "int4": 7.0}
E4M3, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn

K, N = 96, 32


# --- what it should compute, in double ------------------------------------------------------------


def rounded(x: Any, fmt: str) -> Any:
    """Quotients to the format's numbers."""
    if fmt == "int4":
        return np.clip(np.rint(x), -8, 7)
    if fmt == "int8":
        return np.clip(np.rint(x), -127, 127)
    if fmt == "fp8":
        return np.clip(x, -448, 448).astype(E4M3).astype(np.float64)
    return np.clip(x, -6, 6).astype(E2M1).astype(np.float64)


def blocked(w: Any, size: int, make: Any) -> Any:
    """`make` of each block of `size` rows of [K, N], as [size, N] arrays."""
    return np.concatenate([make(w[i : i + size]) for i in range(0, len(w), size)])


def int4(w: Any, size: int, dtype: Any) -> Any:
    def block(rows: Any) -> Any:
        scale = (np.abs(rows).max(0) / 7).astype(dtype).astype(np.float64)
        return rounded(rows / scale, "int4") * scale

    return blocked(w, size, block)


def uint4(w: Any, size: int, dtype: Any) -> Any:
    """Codes 0 to 15 over what is between the least and the largest value, 0 among them."""

    def block(rows: Any) -> Any:
        low, high = np.minimum(rows.min(0), 0), np.maximum(rows.max(0), 0)
        scale = ((high - low) / 15).astype(np.float32).astype(dtype).astype(np.float64)
        zero = np.clip(np.rint(-low / scale), 0, 15)
        return (np.clip(np.rint(rows / scale) + zero, 0, 15) - zero) * scale

    return blocked(w, size, block)


def per_channel(w: Any, fmt: str, dtype: Any) -> Any:
    scale = (np.abs(w).max(0) / QMAX[fmt]).astype(dtype).astype(np.float64)
    return rounded(w / scale, fmt) * scale


def expanded(w: Any, size: int, fmt: str, dtype: Any) -> Any:
    """INT4, and then 8 bits under the power of two that holds 8 steps of the channel's blocks."""
    steps = blocked(w, size, lambda rows: (np.abs(rows).max(0) / 7).astype(dtype)[None])
    least = steps.astype(np.float64).max(0) * 8 / QMAX[fmt]
    scale = 2.0 ** np.ceil(np.log2(least))
    # DequantizeLinear gives the type of its scale: FP16 lands on ties that the product misses.
    middle = int4(w, size, dtype).astype(dtype).astype(np.float64)
    return rounded(middle / scale, fmt) * scale


def nvfp4(x: Any, peak: float | None = None) -> Any:
    """[K, N] in blocks of 16 rows."""
    unit = np.float64(np.float32((np.abs(x).max() if peak is None else peak) / (6 * 448)))

    def block(rows: Any) -> Any:
        step = (np.abs(rows).max(0) / 6 / unit).astype(np.float32)
        scale = np.clip(step, 2.0**-9, 448).astype(E4M3).astype(np.float64) * unit
        return rounded(rows / scale, "nvfp4") * scale

    return blocked(x, 16, block)


def mxfp8(x: Any) -> Any:
    def block(rows: Any) -> Any:
        scale = 2.0 ** np.ceil(np.log2(np.maximum(np.abs(rows).max(0), 1e-30) / 448))
        return rounded(rows / scale, "fp8") * scale

    return blocked(x, 32, block)


def per_token(x: Any, fmt: str, dtype: Any) -> Any:
    m = np.abs(x).max(-1, keepdims=True)
    m = np.where(m == 0, 1, m)
    normal = (x / m).astype(dtype).astype(np.float64)
    if fmt == "nvfp4":
        return nvfp4(normal.reshape(-1, x.shape[-1]).T, 1.0).T.reshape(x.shape) * m
    scale = np.asarray(1 / QMAX[fmt]).astype(dtype).astype(np.float64)
    return rounded(divided(normal, scale, dtype), fmt) * scale * m


def per_tensor(x: Any, fmt: str, peak: float, dtype: Any) -> Any:
    if fmt == "nvfp4":
        return nvfp4(x.reshape(-1, x.shape[-1]).T, peak).T.reshape(x.shape)
    scale = np.asarray(peak / QMAX[fmt]).astype(dtype).astype(np.float64)
    return rounded(divided(x, scale, dtype), fmt) * scale


def divided(x: Any, scale: Any, dtype: Any) -> Any:
    """As onnx's evaluator divides, in the type of both; FP16's 2^-11 decides 1 code in 30."""
    return (x.astype(dtype) / scale.astype(dtype)).astype(np.float64)


@dataclass(frozen=True)
class Case:
    """A recipe with changes, and what its weight and its activation become."""

    recipe: str
    weight: Any
    activation: Any = lambda x, peak, dtype: x
    static: bool = False
    changes: tuple[tuple[str, Any], ...] = ()
    target: str = "sm89"


def tokens(fmt: str) -> Any:
    return lambda x, peak, dtype: per_token(x, fmt, dtype)


def tensors(fmt: str) -> Any:
    return lambda x, peak, dtype: per_tensor(x, fmt, peak, dtype)


def mx_tokens(x: Any, peak: float, dtype: Any) -> Any:
    return mxfp8(x.reshape(-1, x.shape[-1]).T).T.reshape(x.shape)


FP8_SIDE = (("activations", "fp8"),)
CASES = {
    "int4": Case("int4-rtn", lambda w, d: int4(w, 32, d)),  # 64 does not divide 96
    "int4-16": Case("int4-rtn", lambda w, d: int4(w, 16, d), changes=(("block_size", 16),)),
    "uint4": Case("uint4-rtn", lambda w, d: uint4(w, 32, d), target="onnxruntime"),
    "int8 weights": Case("int8-weight-only", lambda w, d: per_channel(w, "int8", d)),
    "fp8 weights": Case("fp8-weight-only", lambda w, d: per_channel(w, "fp8", d)),
    "w4a8 int8": Case("w4a8-rtn", lambda w, d: expanded(w, 32, "int8", d), tensors("int8"), True),
    "w4a8 int8 per token": Case(
        "w4a8-rtn-dynamic", lambda w, d: expanded(w, 32, "int8", d), tokens("int8")
    ),
    "w4a8 fp8": Case(
        "w4a8-rtn", lambda w, d: expanded(w, 32, "fp8", d), tensors("fp8"), True, FP8_SIDE
    ),
    "w4a8 fp8 per token": Case(
        "w4a8-rtn-dynamic", lambda w, d: expanded(w, 32, "fp8", d), tokens("fp8"), False, FP8_SIDE
    ),
    "nvfp4": Case("nvfp4", lambda w, d: nvfp4(w), tokens("nvfp4"), target="sm120"),
    "nvfp4 static": Case(
        "nvfp4", lambda w, d: nvfp4(w), tensors("nvfp4"), True, (("mode", "static"),), "sm120"
    ),
    "mxfp8": Case("mxfp8", lambda w, d: mxfp8(w), mx_tokens, target="sm120"),
}
LINEAR: dict[str, tuple[str, bool, dict[str, Any], int]] = {
    "matmul-3d": ("MatMul", False, {}, 3),
    "gemm-bias": ("Gemm", True, {}, 2),
    "gemm-alpha": ("Gemm", True, {"transB": 1, "alpha": 0.75}, 2),
}


def linear_net(form: str, dtype: Any) -> tuple[Net, Any, Any]:
    """The net, its weight as [K, N], whose channels and rows differ much, and its bias."""
    op, has_bias, attributes, rank = LINEAR[form]
    net = Net(dtype=dtype)
    x = net.input("x", ["m", "s", K][3 - rank :])
    w = net.rng.standard_normal((K, N)) / np.sqrt(K)
    w = w * np.geomspace(0.05, 2, N) * np.geomspace(0.3, 1, K)[:, None]
    w = w.astype(dtype).astype(np.float64)
    net.const("w", w.T if attributes.get("transB") else w)
    inputs = [x, "w"]
    bias = np.linspace(-2, 2, N).astype(dtype)
    if has_bias:
        inputs.append(net.const("bias", bias))
    net.output(net.op(op, *inputs, name="/fc", **attributes))
    return net, w, bias.astype(np.float64) if has_bias else np.zeros(N)


def activations(rank: int, dtype: Any) -> Any:
    x = np.random.default_rng(3).standard_normal((5, K) if rank == 2 else (5, 3, K))
    x = x * np.geomspace(0.1, 4, 5).reshape([-1] + [1] * (rank - 1))
    x[..., 7] *= 6
    x[1] = 0
    return x.astype(dtype)


def emitted(net: Net, case: Case, peak: float) -> onnx.ModelProto:
    model = net.loaded(23)
    placement = placed(model, case.recipe, gpu=case.target, **dict(case.changes))
    if not case.static:
        apply_placement(model, placement, None)
        return inlined(model)
    ranges = {(id(d.site.node), 0): Range(peak) for d in placement.quantized}
    apply_placement(model, placement, ranges)
    return inlined(model)


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=lambda d: d.name)
@pytest.mark.parametrize("form", LINEAR)
@pytest.mark.parametrize("name", CASES)
def test_linear_layers(name: str, form: str, dtype: Any) -> None:
    case = CASES[name]
    net, w, bias = linear_net(form, dtype)
    x = activations(LINEAR[form][3], dtype)
    wide = x.astype(np.float64)
    peak = float(np.abs(wide).max())
    proto = emitted(net, case, peak)
    alpha = LINEAR[form][2].get("alpha", 1.0)
    weight, activation = case.weight(w, dtype), case.activation(wide, peak, dtype)
    expected = alpha * activation @ weight + bias
    found = evaluate(proto, {"x": x})[0]
    assert found.dtype == dtype
    found = found.astype(np.float64)
    assert snr(expected, found) > CLOSE[dtype]
    for channel in (0, N // 2, N - 1):
        assert snr(expected[..., channel], found[..., channel]) > CLOSE[dtype] - 12
    np.testing.assert_array_equal(found[1], np.broadcast_to(bias, found[1].shape))
    # And it is worth something: what it stands for is near the layer itself.
    plain = alpha * wide @ w + bias
    assert snr(plain, found) > {"int8": 25, "fp8 ": 25, "mxfp": 25}.get(name[:4], 12)


@pytest.mark.parametrize("name", [n for n in CASES if CASES[n].target != "sm120"])
def test_onnxruntime_computes_the_same(name: str) -> None:
    case = CASES[name]
    net, _, _ = linear_net("gemm-alpha", FP16)
    x = activations(2, FP16)
    proto = emitted(net, case, float(np.abs(x).max()))
    # It divides in FP32: 1 code in 30 is another, a third of what rounding itself costs.
    assert snr(evaluate(proto, {"x": x})[0], run(proto, {"x": x})[0]) > 35


# --- what is stored -------------------------------------------------------------------------------


def types(proto: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for tensor in proto.graph.initializer:
        found[f"{tensor.name} {TensorProto.DataType.Name(tensor.data_type)}"] = tuple(tensor.dims)
    return found


def test_int4_is_stored_in_half_a_byte_with_a_scale_a_block() -> None:
    net, w, _ = linear_net("gemm-alpha", FP16)
    proto = emitted(net, CASES["int4"], 1.0)
    assert types(proto) == {
        "bias FLOAT16": (N,),
        "w_int4 INT4": (N, K),
        "w_scale FLOAT16": (N, K // 32),
    }
    (codes,) = [t for t in proto.graph.initializer if t.name == "w_int4"]
    assert len(codes.raw_data) == N * K // 2
    (node,) = [n for n in proto.graph.node if n.op_type == "DequantizeLinear"]
    assert {a.name: a.i for a in node.attribute} == {"axis": 1, "block_size": 32}
    (scale,) = [initializer(proto, "w_scale")]
    peaks = np.abs(w.T.reshape(N, K // 32, 32)).max(-1)
    np.testing.assert_array_equal(scale, (peaks / 7).astype(np.float16))
    assert operators(proto) == ["DequantizeLinear", "Gemm"]


def test_uint4_stores_a_zero_point_a_block() -> None:
    net, _, _ = linear_net("gemm-alpha", FP16)
    proto = emitted(net, CASES["uint4"], 1.0)
    stored = types(proto)
    assert stored["w_uint4 UINT4"] == (N, K)
    assert stored["w_scale FLOAT16"] == stored["w_zero UINT4"] == (N, K // 32)
    assert len(set(initializer(proto, "w_zero").astype(int).ravel())) > 3


def test_w4a8_keeps_four_bits_and_one_power_of_two() -> None:
    """The trap: INT4 codes straight into an INT8 product lose their block scales."""
    net, _, _ = linear_net("matmul-3d", FP16)
    proto = emitted(net, CASES["w4a8 int8 per token"], 1.0)
    stored = types(proto)
    assert stored["w_int4 INT4"] == (K, N) and stored["w_scale FLOAT16"] == (K // 32, N)
    assert stored["w_channel_scale FLOAT16"] == (N,)
    shares = initializer(proto, "w_channel_scale").astype(np.float64)
    unit = initializer(proto, "w_dequantized_scale").astype(np.float64)
    for value in (*shares, unit):
        assert np.frexp(value)[0] == 0.5
    assert len(set(shares)) > 3, "channels differ here"
    producer = {o: n for n in proto.graph.node for o in n.output}
    (product,) = [n for n in proto.graph.node if n.op_type == "MatMul"]
    chain, tensor = [], product.input[1]
    while tensor in producer:
        chain.append(producer[tensor].op_type)
        tensor = producer[tensor].input[0]
    assert chain == ["DequantizeLinear", "QuantizeLinear", "DequantizeLinear"]


def test_nvfp4_stores_codes_scales_and_one_number() -> None:
    net, w, _ = linear_net("matmul-3d", FP16)
    proto = emitted(net, CASES["nvfp4"], 1.0)
    stored = types(proto)
    assert stored["w_nvfp4 FLOAT4E2M1"] == (K, N)
    assert stored["w_scale FLOAT8E4M3FN"] == (K // 16, N)
    assert stored["w_unit FLOAT"] == ()
    assert initializer(proto, "w_unit") == np.float32(np.abs(w).max() / (6 * 448))
    (unit,) = [n for n in stored if n.startswith("x") and n.endswith("unit FLOAT")]
    assert initializer(proto, unit.split()[0]) == np.float32(1 / (6 * 448))
    assert {o.domain: o.version for o in proto.opset_import} == {"": 23, "trt": 1}


def test_mxfp8_stores_its_scales_as_bytes() -> None:
    net, _, _ = linear_net("gemm-alpha", FP16)
    proto = emitted(net, CASES["mxfp8"], 1.0)
    stored = types(proto)
    assert stored["w_mxfp8 FLOAT8E4M3FN"] == (N, K) and stored["w_scale UINT8"] == (N, K // 32)


@pytest.mark.parametrize("name", ["int4", "w4a8 int8 per token", "nvfp4"])
def test_consumers_of_one_tensor_share_its_codes(name: str) -> None:
    net = Net(dtype=FP16)
    x = net.input("x", ["m", K])
    for i in range(3):
        net.weight(f"w{i}", K, N, scale=0.02 * (1 + i))
        net.output(net.op("MatMul", x, f"w{i}", name=f"/fc{i}"))
    proto = emitted(net, CASES[name], 1.0)
    kinds = operators(proto, ["QuantizeLinear", "TRT_FP4DynamicQuantize", "ReduceMax"])
    # W4A8: one for x, and one for each weight; all weights under one unit, since they are merged.
    assert len(kinds) == {"int4": 0, "w4a8 int8 per token": 5, "nvfp4": 2}[name]
    if "w4a8" in name:
        units = {float(initializer(proto, f"w{i}_dequantized_scale")) for i in range(3)}
        assert len(units) == 1


def test_one_weight_of_two_layers_is_stored_once() -> None:
    for name in ("int4", "nvfp4", "w4a8 int8 per token"):
        net = Net(dtype=FP16)
        net.weight("w", K, N)
        for i in range(2):
            net.output(net.op("MatMul", net.input(f"x{i}", ["m", K]), "w", name=f"/fc{i}"))
        proto = emitted(net, CASES[name], 1.0)
        big = [t.name for t in proto.graph.initializer if np.prod(t.dims) == K * N]
        assert big == [f"w_{CASES[name].recipe[:5] if name == 'nvfp4' else 'int4'}"]


def test_an_embedding_keeps_the_weight_it_shares() -> None:
    """The head is asked for by a rule; the table that Gather reads is untouched."""
    net = Net(dtype=FP16)
    net.weight("table", 64, K)
    ids, x = net.input("ids", ["m"], np.int64), net.input("x", ["m", K])
    net.output(net.op("Gather", "table", ids, name="/embed"), dtype=FP16)
    head = net.op("Transpose", "table", perm=[1, 0], name="/turn")
    net.output(net.op("MatMul", x, head, name="/head"))
    left = quantized(net, "int4-rtn")
    assert operators(left, ["DequantizeLinear"]) == []
    both = quantized(net, "int4-rtn", "quantize node=/head")
    assert operators(both, ["DequantizeLinear"]) == ["DequantizeLinear"]
    assert types(both)["table FLOAT16"] == (64, K) and types(both)["table_int4 INT4"] == (K, 64)
    feeds = {"ids": np.arange(3), "x": activations(2, FP16)}
    plain, found = evaluate(net.model(), feeds), evaluate(both, feeds)
    np.testing.assert_array_equal(plain[0], found[0])
    assert snr(plain[1], found[1]) > 15


def test_no_initializer_is_left_that_nothing_reads() -> None:
    for case in CASES.values():
        proto = emitted(linear_net("gemm-alpha", FP16)[0], case, 1.0)
        read = {i for n in proto.graph.node for i in n.input}
        assert {t.name for t in proto.graph.initializer} <= read


# --- extremes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["int4", "nvfp4", "mxfp8", "w4a8 int8 per token"])
def test_zeros_and_blocks_far_below_the_others(name: str) -> None:
    net = Net(dtype=FP16)
    w = np.random.default_rng(0).standard_normal((K, N)) * 0.1
    w[:, 3] = 0
    w[:64, 5] = 0
    w[:, 7] *= 1e-4
    net.const("w", w)
    net.output(net.op("MatMul", net.input("x", ["m", K]), "w", name="/fc"))
    x = np.random.default_rng(1).standard_normal((16, K)).astype(FP16)
    found = evaluate(emitted(net, CASES[name], 1.0), {"x": x})[0].astype(np.float64)
    expected = x.astype(np.float64) @ w.astype(np.float16).astype(np.float64)
    assert (found[:, 3] == 0).all()
    assert snr(expected, found) > 12
    if name != "nvfp4":  # whose blocks reach 448 x 512 below the largest
        assert snr(expected[:, 7], found[:, 7]) > 10
    allzero = Net(dtype=FP16)
    allzero.const("w", np.zeros((K, N)))
    allzero.output(allzero.op("MatMul", allzero.input("x", ["m", K]), "w", name="/fc"))
    assert (evaluate(emitted(allzero, CASES[name], 1.0), {"x": x})[0] == 0).all()


@pytest.mark.parametrize("name", CASES)
def test_a_weight_that_is_not_finite_is_named(name: str) -> None:
    net = Net(dtype=FP16)
    w = np.ones((K, N))
    w[5, 6] = np.inf
    net.const("w", w)
    net.output(net.op("MatMul", net.input("x", ["m", K]), "w", name="/fc"))
    with pytest.raises(OnnxqError, match="weight 'w' of '/fc' holds NaN or infinite") as error:
        emitted(net, CASES[name], 1.0)
    assert "leave weight=w" in str(error.value)
