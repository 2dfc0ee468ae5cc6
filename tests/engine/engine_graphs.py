"""The quantized forms, as tiny ONNX graphs: what emission may write and what it must not.

Every builder returns a `Form`: the model, the nodes whose multiplication is looked at, and the
shapes of a dynamic build. Sizes are small enough for some hundred compiles in a minute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from onnxq.engine.coverage import WeightedNode

ONNX_TYPE = {
    "int8": TensorProto.INT8,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
    "fp32": TensorProto.FLOAT,
}
NUMPY_TYPE = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}
QMAX = {"int8": 127.0, "fp8": 448.0}

SMALLEST_AMAX = {"fp16": 6.1e-5, "bf16": 1e-12, "fp32": 1e-12}
"""The guard of a row of zeros: a normal number of the base type, so that no quotient is inf."""

K, N = 64, 96


@dataclass
class Form:
    model: onnx.ModelProto
    nodes: list[WeightedNode]
    shapes: list[str] = field(default_factory=list)
    arrays: dict[str, NDArray[np.float32]] = field(default_factory=dict)


class Graph:
    """An ONNX graph under construction, in one base type."""

    def __init__(self, base: str = "fp16", opset: int = 21, seed: int = 0) -> None:
        self.base, self.opset = base, opset
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.arrays: dict[str, NDArray[np.float32]] = {}

    def op(self, kind: str, inputs: Sequence[str], name: str | None = None, **attrs: object) -> str:
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"/{name}", **attrs))
        return name

    def constant(self, value: object, base: str | None = None) -> str:
        name = f"constant_{len(self.constants)}"
        array = np.asarray(value).astype(NUMPY_TYPE[base or self.base])
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def integers(self, *values: int) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.array(values, np.int64), name))
        return name

    def codes(self, codes: NDArray[np.generic], fmt: str) -> str:
        name = f"codes_{len(self.constants)}"
        self.constants.append(
            helper.make_tensor(name, ONNX_TYPE[fmt], codes.shape, codes.tobytes(), raw=True)
        )
        return name

    def quantized(self, x: str, fmt: str, scale: float, base: str | None = None) -> str:
        """QuantizeLinear and DequantizeLinear with one constant scale."""
        s = self.constant(scale, base)
        zero = self.codes(np.zeros((), np.int8), fmt)
        q = self.op("QuantizeLinear", [x, s, zero])
        return self.op("DequantizeLinear", [q, s, zero])

    def model(
        self,
        inputs: dict[str, tuple[str, list[int | str]]],
        outputs: dict[str, list[int | str]],
        extra: Sequence[tuple[str, int]] = (),
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "form",
            [helper.make_tensor_value_info(n, _type(t), s) for n, (t, s) in inputs.items()],
            [helper.make_tensor_value_info(n, _type(self.base), s) for n, s in outputs.items()]
            + [helper.make_tensor_value_info(n, t, None) for n, t in extra],
            self.constants,
        )
        opsets = [helper.make_opsetid("", self.opset)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def quantize(w: NDArray[np.float32], scale: NDArray[np.float32], fmt: str) -> NDArray[np.generic]:
    """Codes of `w` under `scale` (broadcast): nearest even, saturated."""
    if fmt == "int8":
        return np.clip(np.rint(w / scale), -128, 127).astype(np.int8)
    return np.clip(w / scale, -448, 448).astype(ml_dtypes.float8_e4m3fn)


def amax(g: Graph, x: str, axes: Sequence[int]) -> str:
    """The guarded largest magnitude along `axes`: the m of dynamic activations."""
    m = g.op("ReduceMax", [g.op("Abs", [x]), g.integers(*axes)], keepdims=1)
    return g.op("Max", [m, g.constant(SMALLEST_AMAX[g.base])])


def _type(word: str) -> int:
    return TensorProto.BOOL if word == "bool" else ONNX_TYPE[word]


def shared_scale(scales: Sequence[NDArray[np.float32]]) -> float:
    """One power of two for all weights of one tensor: 2^round(log2(geometric mean))."""
    logs = np.log2(np.concatenate([s.reshape(-1) for s in scales]))
    return float(2.0 ** np.round(logs.mean()))


def linear(
    fmt: str,
    *,
    base: str = "fp16",
    dynamic: bool = False,
    static_shapes: bool = False,
    weight: str = "shared",
    consumers: int = 1,
    bias: bool = True,
    gemm: bool = False,
    columns: int = N,
) -> Form:
    """x [B, S, K] (or [B, K] for Gemm) times one or several W [K, columns].

    `weight` is how scales per output channel are given: `shared`: DequantizeLinear with one power
    of two for all consumers, and the rest of the scale in a Mul after the product; `own`: the same
    with one power of two each; `channel`: DequantizeLinear per channel; `tensor`: one scale each.
    """
    g = Graph(base)
    x: list[int | str] = [2, 48, K] if static_shapes else ["B", "S", K]
    if gemm:
        x = [x[0], K]
    weights = []
    for index in range(consumers):
        normal, spread = g.random.normal(size=(K, columns)), g.random.uniform(0.02, 0.3, columns)
        weights.append((normal * spread * (1 + 0.9 * index)).astype(np.float32))
    m = amax(g, "x", [-1]) if dynamic else ""
    source = g.op("Div", ["x", m]) if dynamic else "x"
    activation = g.quantized(source, fmt, 1 / QMAX[fmt] if dynamic else 0.03)
    g.arrays["act_scale"] = np.float32(
        NUMPY_TYPE[base](1 / QMAX[fmt] if dynamic else 0.03).astype(np.float32)
    )
    scales = [np.abs(w).max(axis=0) / QMAX[fmt] for w in weights]
    common = shared_scale(scales)
    outputs: dict[str, list[int | str]] = {}
    nodes = []
    for index, (w, scale) in enumerate(zip(weights, scales, strict=True)):
        one = common if weight == "shared" else shared_scale([scale])
        rest = (scale / one).astype(NUMPY_TYPE[base])
        if weight in ("tensor", "channel"):
            given = (scale.max() if weight == "tensor" else scale).astype(NUMPY_TYPE[base])
            acting = np.asarray(given.astype(np.float32))
        else:
            given = np.asarray(one)
            acting = rest.astype(np.float32) * np.float32(one)
        stored = quantize(w, acting, fmt)
        attrs = {"axis": 1} if weight == "channel" else {}
        w_dq = g.op("DequantizeLinear", [g.codes(stored, fmt), g.constant(given)], **attrs)
        y = g.op("Gemm" if gemm else "MatMul", [activation, w_dq], f"product_{index}")
        nodes.append(WeightedNode(f"/{y}", "gemm", fmt))
        if dynamic:
            y = g.op("Mul", [y, m])
        if weight in ("shared", "own"):
            y = g.op("Mul", [y, g.constant(rest)])
        b = g.random.normal(size=columns).astype(np.float32)
        if bias:
            y = g.op("Add", [y, g.constant(b)])
        out = g.op("Identity", [y], f"y{index}")
        outputs[out] = [*x[:-1], columns]
        g.arrays.update(
            {
                f"weight{index}": w,
                f"codes{index}": stored.astype(np.float32),
                f"acting{index}": acting,
                f"bias{index}": b if bias else np.zeros(columns, np.float32),
            }
        )
    shapes = ["x:1x64,8x64,32x64" if gemm else "x:1x1x64,2x32x64,4x64x64"]
    model = g.model({"x": (base, x)}, outputs)
    return Form(model, nodes, [] if static_shapes else shapes, g.arrays)


def tied(fmt: str, *, base: str = "fp16", static_shapes: bool = False) -> Form:
    """A head tied to an embedding: codes [N, K], DequantizeLinear, Transpose, MatMul."""
    g = Graph(base)
    w = (g.random.normal(size=(N, K)) * 0.1).astype(np.float32)
    scale = np.float32(2.0**-9 if fmt == "int8" else 2.0**-11)
    x: list[int | str] = [2, 48, K] if static_shapes else ["B", "S", K]
    activation = g.quantized("x", fmt, 0.03)
    w_dq = g.op("DequantizeLinear", [g.codes(quantize(w, scale, fmt), fmt), g.constant(scale)])
    y = g.op("MatMul", [activation, g.op("Transpose", [w_dq], perm=[1, 0])], "product_0")
    g.op("Identity", [y], "y")
    model = g.model({"x": (base, x)}, {"y": [*x[:-1], N]})
    return Form(
        model,
        [WeightedNode("/product_0", "gemm", fmt)],
        [] if static_shapes else ["x:1x1x64,2x32x64,4x64x64"],
    )


def weight_only(block: int | None = 32, *, static_shapes: bool = False) -> Form:
    """FP16 x times an INT4 weight in blocks along K, or per channel where `block` is None."""
    g = Graph()
    w = (g.random.normal(size=(K, N)) * 0.1).astype(np.float32)
    rows = w.reshape(K // block, block, N) if block else w[None]
    scale = (np.abs(rows).max(axis=1) / 7).astype(np.float16)
    codes = np.clip(np.rint(rows / scale[:, None].astype(np.float32)), -8, 7).reshape(K, N)
    flat = codes.reshape(-1).astype(np.int8)
    packed = ((flat[0::2] & 0xF) | ((flat[1::2] & 0xF) << 4)).astype(np.uint8)
    g.constants.append(
        helper.make_tensor("codes", TensorProto.INT4, [K, N], packed.tobytes(), raw=True)
    )
    attrs = {"axis": 0, "block_size": block} if block else {"axis": 1}
    s = g.constant(scale if block else scale[0])
    w_dq = g.op("DequantizeLinear", ["codes", s], **attrs)
    x: list[int | str] = [48, K] if static_shapes else ["M", K]
    g.op("MatMul", ["x", w_dq], "product_0")
    model = g.model({"x": ("fp16", x)}, {"product_0": [x[0], N]})
    shapes = [] if static_shapes else ["x:1x64,32x64,64x64"]
    return Form(model, [WeightedNode("/product_0", "gemm", "int4")], shapes)


def conv(
    fmt: str,
    *,
    base: str = "fp16",
    dynamic: bool = False,
    static_shapes: bool = False,
    weight: str = "shared",
    channels: tuple[int, int] = (32, 64),
    kernel: int = 3,
    group: int = 1,
) -> Form:
    """x [B, C, H, W]: Conv, rescale, bias, ReLU; dynamic activations per sample."""
    g = Graph(base)
    into, out = channels
    x: list[int | str] = [2, into, 16, 16] if static_shapes else ["B", into, "H", "W"]
    w = g.random.normal(size=(out, into // group, kernel, kernel)).astype(np.float32)
    w *= g.random.uniform(0.02, 0.3, (out, 1, 1, 1)).astype(np.float32)
    scale = np.abs(w).max(axis=(1, 2, 3)) / QMAX[fmt]
    m = amax(g, "x", [1, 2, 3]) if dynamic else ""
    source = g.op("Div", ["x", m]) if dynamic else "x"
    act_scale = 1 / QMAX[fmt] if dynamic else 0.03
    activation = g.quantized(source, fmt, act_scale)
    one = shared_scale([scale])
    rest = (scale / one).astype(NUMPY_TYPE[base])
    if weight == "channel":
        given, attrs = scale.astype(NUMPY_TYPE[base]), {"axis": 0}
        acting = given.astype(np.float32)
    else:
        given, attrs = np.asarray(one), {}
        acting = rest.astype(np.float32) * np.float32(one)
    stored = quantize(w, acting[:, None, None, None], fmt)
    w_dq = g.op("DequantizeLinear", [g.codes(stored, fmt), g.constant(given)], **attrs)
    pads = [kernel // 2] * 4
    y = g.op("Conv", [activation, w_dq], "product_0", pads=pads, group=group)
    if dynamic:
        y = g.op("Mul", [y, m])
    if weight == "shared":
        y = g.op("Mul", [y, g.constant(rest[:, None, None])])
    b = g.random.normal(size=out).astype(np.float32)
    y = g.op("Add", [y, g.constant(b[:, None, None])])
    g.op("Relu", [y], "y0")
    g.arrays.update(
        codes0=stored.astype(np.float32),
        acting0=acting,
        bias0=b,
        act_scale=np.float32(NUMPY_TYPE[base](act_scale).astype(np.float32)),
    )
    model = g.model({"x": (base, x)}, {"y0": [x[0], out, *x[2:]]})
    shapes = [f"x:1x{into}x8x8,2x{into}x16x16,4x{into}x32x32"]
    nodes = [WeightedNode("/product_0", "conv", fmt)]
    return Form(model, nodes, [] if static_shapes else shapes, g.arrays)


def attention(
    fmt: str,
    *,
    base: str = "fp16",
    static_shapes: bool = False,
    fixed: int = 64,
    minimum: int = 32,
    where: str = "product",
    mask: str = "add",
    softmax32: bool = False,
    scale: str = "q",
    heads: tuple[int, int] = (8, 2),
    size: int = 64,
) -> Form:
    """Grouped-query attention with a mask; Q/DQ on q, k, v and softmax unless `fmt` is the base.

    Args:
        fixed: the sequence of static shapes.
        minimum: the profile's shortest sequence.
        where: Q/DQ on k and v right at the `product`, or before the heads are repeated.
        mask: `add` (in the base type), `where` (boolean) or `none`.
        softmax32: softmax and mask in FP32 between Casts.
        scale: `q`, `both` (a Mul on q and on k) or `scores` (a Mul after the first product).
    """
    g = Graph(base)
    many, few = heads
    quantized = fmt in QMAX
    batch: int | str = 2 if static_shapes else "B"
    length: int | str = fixed if static_shapes else "S"
    q, k, v = "q", "k", "v"
    root = size ** (-0.25 if scale == "both" else -0.5)
    if scale in ("q", "both"):
        q = g.op("Mul", [q, g.constant(root)])
    if scale == "both":
        k = g.op("Mul", [k, g.constant(root)])
    if quantized and where == "before":
        k, v = g.quantized(k, fmt, 0.02), g.quantized(v, fmt, 0.02)
    k, v = (_repeat(g, t, many, few, size) for t in (k, v))
    if quantized and where == "product":
        k, v = g.quantized(k, fmt, 0.02), g.quantized(v, fmt, 0.02)
    if quantized:
        q = g.quantized(q, fmt, 0.02)
    s = g.op("MatMul", [q, g.op("Transpose", [k], perm=[0, 1, 3, 2])], "scores")
    if scale == "scores":
        s = g.op("Mul", [s, g.constant(root)])
    if softmax32:
        s = g.op("Cast", [s], to=TensorProto.FLOAT)
    wide = "fp32" if softmax32 else base
    if mask == "add":
        given = g.op("Cast", ["mask"], to=TensorProto.FLOAT) if softmax32 else "mask"
        s = g.op("Add", [s, given])
    if mask == "where":
        s = g.op("Where", ["mask", s, g.constant(-6e4, wide)])
    p = g.op("Softmax", [s], "weights", axis=-1)
    if softmax32:
        p = g.op("Cast", [p], to=ONNX_TYPE[base])
    if quantized:
        p = g.quantized(p, fmt, 1 / QMAX[fmt])
    g.op("MatMul", [p, v], "context")
    inputs = {
        "q": (base, [batch, many, length, size]),
        "k": (base, [batch, few, length, size]),
        "v": (base, [batch, few, length, size]),
    }
    shapes = [_range("q", many, minimum, size)]
    shapes += [_range(n, few, minimum, size) for n in "kv"]
    if mask != "none":
        inputs["mask"] = ("bool" if mask == "where" else base, [batch, 1, length, length])
        shapes.append(f"mask:1x1x{minimum}x{minimum},1x1x64x64,2x1x128x128")
    model = g.model(inputs, {"context": [batch, many, length, size]})
    parts = ("/scores", "/weights", "/context")
    nodes = [WeightedNode("/context", "attention", fmt, parts)]
    return Form(model, nodes, [] if static_shapes else shapes)


def _repeat(g: Graph, x: str, many: int, few: int, size: int) -> str:
    """Unsqueeze, Expand, Reshape: each of `few` heads many / few times, as exporters write it."""
    if many == few:
        return x
    shape = g.op("Shape", [x])
    batch, length = (g.op("Gather", [shape, g.integers(axis)]) for axis in (0, 2))
    inner = [batch, g.integers(few, many // few), length, g.integers(size)]
    outer = [batch, g.integers(many), length, g.integers(size)]
    x = g.op("Unsqueeze", [x, g.integers(2)])
    x = g.op("Expand", [x, g.op("Concat", inner, axis=0)])
    return g.op("Reshape", [x, g.op("Concat", outer, axis=0)])


def _range(name: str, heads: int, minimum: int, size: int) -> str:
    return f"{name}:1x{heads}x{minimum}x{size},1x{heads}x64x{size},2x{heads}x128x{size}"
