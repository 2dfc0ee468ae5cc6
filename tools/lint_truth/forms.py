"""One small graph a fault, and its sound neighbours: which rules each must trip.

Every case was compiled with tensorrt-rtx 1.7.1 before its rule was written; `python -m
tools.lint_truth` compiles them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from tools.lint_truth.building import ONNX, Graph, product

EIGHT = ("int8", "fp8")


@dataclass(frozen=True)
class Case:
    """A graph, the rules it must trip and no others, and the shapes of a dynamic build."""

    model: onnx.ModelProto
    rules: frozenset[str]
    target: str = "sm89"
    shapes: tuple[str, ...] = ()


CASES: dict[str, Case] = {}


def add(name: str, model: onnx.ModelProto, *rules: str, target: str = "sm89") -> None:
    assert name not in CASES, name
    CASES[name] = Case(model, frozenset(rules), target)


def linear(
    activation: str | None = "int8",
    weight: str | None = "int8",
    *,
    base: str = "fp16",
    opset: int = 21,
    rows: tuple[int, ...] = (2, 48),
    k: int = 64,
    n: int = 96,
    left: Callable[[Graph, str], str] = lambda g, t: t,
    right: Callable[[Graph, str], str] = lambda g, t: t,
    activation_scale: object = 0.03,
    activation_type: str | None = None,
    weight_scale: object = 0.01,
    weight_type: str | None = None,
    output: str | None = None,
    domain: str = "",
    axis: int | None = None,
    block: int = 0,
    **attrs: object,
) -> onnx.ModelProto:
    """x [rows, k] times W [k, n], each operand quantized or not; `left`, `right` add nodes."""
    g = Graph(base, opset)
    x = g.input("x", [*rows, k])
    if activation:
        x = g.quantized(x, activation, activation_scale, activation_type, domain=domain)
    w = g.floats(k, n)
    if weight:
        more = {"axis": axis} if axis is not None else {}
        more |= {"block_size": block} if block else {}
        w = g.weight((k, n), weight, weight_scale, weight_type, domain=domain, **more)
    return product(g, left(g, x), right(g, w), kind=output, **attrs)


def conv(
    activation: str | None = "int8",
    weight: str | None = "int8",
    *,
    channels: tuple[int, int] = (32, 64),
    kernel: tuple[int, ...] = (3, 3),
    base: str = "fp16",
    op: str = "Conv",
    group: int = 1,
    scale: object = 0.01,
    axis: int | None = None,
    left: Callable[[Graph, str], str] = lambda g, t: t,
    bias: str | None = None,
) -> onnx.ModelProto:
    """x [2, in, 8, ...] convolved, each operand quantized or not."""
    g = Graph(base)
    into, out = channels
    x = g.input("x", [2, into, *[8 if len(kernel) < 3 else 6] * len(kernel)])
    if activation:
        x = g.quantized(x, activation)
    shape = (out, into // group) if op == "Conv" else (into, out // group)
    if weight:
        more = {"axis": axis} if axis is not None else {}
        w = g.weight((*shape, *kernel), weight, scale, **more)
    else:
        w = g.floats(*shape, *kernel)
    inputs = [left(g, x), w]
    if bias == "float":
        inputs.append(g.floats(out))
    elif bias is not None:
        inputs.append(g.op("DequantizeLinear", [g.codes((out,), bias), g.constant(0.0003)]))
    pads = [side // 2 for side in kernel] * 2
    g.output(g.op(op, inputs, "product", pads=pads, group=group))
    return g.model()


def attention(
    q: str | None = "fp8",
    k: str | None = "fp8",
    p: str | None = "fp8",
    v: str | None = "fp8",
    *,
    length: int = 64,
    keys: int | None = None,
    head: int = 64,
    base: str = "fp16",
    mask: str | None = None,
    scores: str | None = None,
    soft32: bool = False,
    given: str | None = None,
) -> onnx.ModelProto:
    """softmax(q k^T) v; Q/DQ in the format given, or none; `given`: on what it gives."""
    g = Graph(base)
    keys = keys or length
    tensors = [
        g.input("q", [2, 4, length, head]),
        g.input("k", [2, 4, keys, head]),
        g.input("v", [2, 4, keys, head]),
    ]
    tensors[1] = g.op("Transpose", [tensors[1]], perm=[0, 1, 3, 2])
    formats = (q, k, v)
    tensors = [g.quantized(t, f, 0.02) if f else t for t, f in zip(tensors, formats, strict=True)]
    s = g.op("MatMul", tensors[:2], "scores")
    if scores:
        s = g.quantized(s, scores, 0.1)
    if mask:
        added = g.input("mask", [2, 1, length, keys])
        s = g.op("Add", [s, g.quantized(added, mask) if mask in EIGHT else added])
    if soft32:
        s = g.op("Cast", [s], to=TensorProto.FLOAT)
    s = g.op("Softmax", [s], "softmax", axis=-1)
    if soft32:
        s = g.op("Cast", [s], to=ONNX[base])
    if p:
        s = g.quantized(s, p, 1 / 448 if p == "fp8" else 1 / 127)
    y = g.op("MatMul", [s, tensors[2]], "context")
    if given:
        y = g.quantized(g.op("Transpose", [y], perm=[0, 2, 1, 3]), given)
    g.output(y)
    return g.model()


def then(op: str, *constants: Callable[[Graph], str], **attrs: object) -> Callable[..., str]:
    """A node behind a tensor."""
    return lambda g, t: g.op(op, [t, *(c(g) for c in constants)], **attrs)


def _ints(*values: int) -> Callable[[Graph], str]:
    return lambda g: g.integers(*values)


def _number(value: object) -> Callable[[Graph], str]:
    return lambda g: g.constant(value)


def _products() -> None:
    for fmt in EIGHT:
        add(f"{fmt} linear", linear(fmt, fmt))
        add(f"{fmt} linear, bf16", linear(fmt, fmt, base="bf16"))
        add(f"{fmt} conv", conv(fmt, fmt))
        add(f"{fmt} conv, scale a channel", conv(fmt, fmt, scale=np.full(64, 0.01), axis=0))
        add(f"{fmt} activation only", linear(fmt, None), "one-operand")
        add(f"{fmt} weight only", linear(None, fmt))
        add(f"{fmt} conv, activation only", conv(fmt, None), "one-operand")
        add(f"{fmt} conv, weight only", conv(None, fmt), "weight-only-form")
        channel = {"weight_scale": np.full(96, 0.01), "axis": 1}
        add(f"{fmt} channels", linear(fmt, fmt, **channel), "raw-sums")
        add(f"{fmt} channels, bf16", linear(fmt, fmt, base="bf16", **channel))
        add(
            f"{fmt} channels, axis -1",
            linear(fmt, fmt, weight_scale=np.full(96, 0.01), axis=-1),
            "raw-sums",
        )
        add(
            f"{fmt} inner axis",
            linear(fmt, fmt, weight_scale=np.full(64, 0.01), axis=0),
            "weight-axis",
        )
        add(
            f"{fmt} conv, inner axis",
            conv(fmt, fmt, scale=np.full(32, 0.01), axis=1),
            "weight-axis",
        )
        tokens = {"activation_scale": np.full(48, 0.03)}
        for axis, count in ((0, 2), (1, 48), (2, 64)):
            g = Graph()
            x = g.quantized(g.input("x", [2, 48, 64]), fmt, np.full(count, 0.03), axis=axis)
            add(
                f"{fmt} activation scales along {axis}",
                product(g, x, g.weight((64, 96), fmt)),
                "activation-channels",
            )
        del tokens
        blocks = {"weight_scale": np.full((2, 96), 0.01), "axis": 0, "block": 32}
        add(f"{fmt} blocks, 3-D", linear(fmt, fmt, **blocks), "blocked-weight")
        add(f"{fmt} blocks, 2-D", linear(fmt, fmt, rows=(48,), **blocks), "blocked-weight")
        add(f"{fmt} blocks, weight only", linear(None, fmt, **blocks), "weight-only-form")
        channel = {"weight_scale": np.full(96, 0.01), "axis": 1}
        add(f"{fmt} channels, weight only", linear(None, fmt, **channel))
        add(
            f"{fmt} channels, odd, weight only",
            linear(None, fmt, k=63, **channel),
            "weight-only-form",
        )
        add(f"{fmt} odd, weight only", linear(None, fmt, k=63))
        add(f"{fmt} one column, weight only", linear(None, fmt, n=1), "weight-only-form", "thin")
        add(
            f"{fmt} Neg, weight only",
            linear(None, fmt, right=then("Neg"), **channel),
            "weight-only-form",
        )
    add("int8 channels, fp32", linear(base="fp32", weight_scale=np.full(96, 0.01), axis=1))
    add("int8 x fp8", linear("int8", "fp8"), "mixed-formats")
    add("fp8 x int8 conv", conv("fp8", "int8"), "mixed-formats")
    add("fp8 x int4", linear("fp8", "int4"), "mixed-formats")
    add("int8 x int4, a scale", linear("int8", "int4"), "mixed-formats")
    add(
        "int8 x int4, channels",
        linear("int8", "int4", weight_scale=np.full(96, 0.01), axis=1),
        "mixed-formats",
        "raw-sums",
    )
    four = {"weight_scale": np.full((2, 96), 0.01), "axis": 0, "block": 32}
    add("int8 x int4 blocks, 3-D", linear("int8", "int4", **four), "blocked-weight")
    add(
        "int8 x int4 blocks, 2-D",
        linear("int8", "int4", rows=(48,), **four),
        "blocked-weight",
        "mixed-formats",
    )
    add("int4 x int4", linear("int4", "int4"), "int4-activation")
    add("int4 blocks", linear(None, "int4", **four))
    add(
        "int4 blocks, Transpose",
        linear(
            None,
            "int4",
            weight_scale=np.full((64, 6), 0.01),
            axis=1,
            block=16,
            right=lambda g, t: g.op("Transpose", [t], perm=[0, 1]),
        ),
    )
    add(
        "int4 blocks, Cast",
        linear(
            None, "int4", weight_type="fp32", right=then("Cast", to=TensorProto.FLOAT16), **four
        ),
        "weight-only-form",
    )
    add(
        "int4 one block",
        linear(None, "int4", weight_scale=np.full((1, 96), 0.01), axis=0, block=64),
        "weight-only-form",
    )
    add(
        "int4 channels",
        linear(None, "int4", weight_scale=np.full(96, 0.01), axis=1),
        "weight-only-form",
    )
    add("int4 conv", conv(None, "int4"), "weight-only-form")
    _w4a8()


def _w4a8() -> None:
    add(
        "int4 odd columns",
        linear(None, "int4", n=97, weight_scale=np.full((2, 97), 0.01), axis=0, block=32),
        "weight-only-form",
    )
    for k, rules in (
        (80, ("ragged-blocks",)),
        (81, ("ragged-blocks", "weight-only-form")),
        (128, ()),
    ):
        add(
            f"int4 blocks of 64 along {k}",
            linear(None, "int4", k=k, weight_scale=np.full((2, 96), 0.01), axis=0, block=64),
            *rules,
        )
    for fmt in EIGHT:
        g = Graph()
        w = g.weight((64, 96), "int4", np.full((2, 96), 0.01), axis=0, block_size=32)
        x = g.quantized(g.input("x", [2, 48, 64]), fmt)
        add(f"int4 blocks requantized to {fmt}", product(g, x, g.quantized(w, fmt, 0.01)))

    g = Graph(opset=23)
    made, blocks = ["codes", "scales"], {"axis": -1, "block_size": 32}
    fp8 = {**blocks, "output_dtype": TensorProto.FLOAT8E4M3FN}
    fp16 = {**blocks, "output_dtype": TensorProto.FLOAT16}
    g.op("TRT_MXFP8DynamicQuantize", [g.input("x", [48, 64])], None, "trt", made, **fp8)
    x = g.op("TRT_MXFP8DequantizeLinear", made, None, "trt", **fp16)
    add(
        "mxfp8 activation",
        product(g, x, g.floats(64, 96)),
        "mxfp8",
        "contrib-domain",
        target="sm120",
    )


def _between() -> None:
    moving = {
        "Transpose": then("Transpose", perm=[1, 0, 2]),
        "Reshape": then("Reshape", _ints(96, 64)),
        "Slice": then("Slice", _ints(0), _ints(8), _ints(1)),
        "Unsqueeze": then("Unsqueeze", _ints(0)),
        "Tile": then("Tile", _ints(1, 2, 1)),
        "Neg": then("Neg"),
        "a factor": then("Mul", _number(0.5)),
        "a divisor": then("Div", _number(2.0)),
        "Concat of itself": lambda g, t: g.op("Concat", [t, t], axis=1),
    }
    stopping = {
        "Relu": then("Relu"),
        "a vector": then("Mul", _number(np.full(64, 0.5))),
        "Add": then("Add", _number(0.5)),
        "Pad": then("Pad", _ints(0, 1, 0, 0, 0, 0)),
        "Clip": then("Clip", _number(0.0), _number(6.0)),
        "Concat with a float": lambda g, t: g.op("Concat", [t, g.input("z", [2, 48, 64])], axis=1),
        "Concat of two scales": lambda g, t: g.op(
            "Concat", [t, g.quantized(g.input("z", [2, 48, 64]), "int8", 0.05)], axis=1
        ),
    }
    for name, node in moving.items():
        portable = (
            ()
            if name in ("a factor", "a divisor", "Neg", "Concat of itself", "Tile")
            else ("onnxruntime-layout",)
        )
        add(f"{name} between", linear(left=node), *portable)
    for name, node in stopping.items():
        add(f"{name} between", linear(left=node), "in-between")
    add("Relu behind the weight", linear(right=then("Relu")), "in-between")
    add("Transpose behind the weight", linear(k=64, n=64, right=then("Transpose", perm=[1, 0])))
    for fmt in EIGHT:
        up = then("Cast", to=TensorProto.FLOAT)
        down = then("Cast", to=TensorProto.FLOAT16)
        add(f"{fmt} Cast to FP32", linear(fmt, fmt, left=up, right=up, output="fp32"), "in-between")
        wide = {"base": "fp32", "output": "fp16"}
        add(f"{fmt} Cast to FP16", linear(fmt, fmt, left=down, right=down, **wide))
        pool = then("MaxPool", kernel_shape=[2, 2])
        rules = ("onnxruntime-layout",) if fmt == "int8" else ("in-between",)
        add(f"{fmt} MaxPool between", conv(fmt, fmt, left=pool), *rules)
        average = then("AveragePool", kernel_shape=[2, 2])
        add(f"{fmt} AveragePool between", conv(fmt, fmt, left=average), "in-between")
        g = Graph()
        w = g.op("Concat", [g.weight((64, 48), fmt), g.weight((64, 48), fmt)], axis=1)
        x = g.quantized(g.input("x", [2, 48, 64]), fmt)
        add(f"{fmt} weight of two pieces", product(g, x, w), "concatenated-weight")
        g = Graph(opset=23)
        x = g.quantized(g.input("x", [2, 48, 64]), fmt)
        w = g.weight(
            (64, 96), fmt, np.full(96, 0.01), "fp32", axis=1, output_dtype=TensorProto.FLOAT16
        )
        add(f"{fmt} scales of two types", product(g, x, w), "scale-types", "raw-sums")


def _scales() -> None:
    for name, value in {"zero": 0.0, "negative": -0.03, "nan": np.nan, "underflown": 1e-9}.items():
        add(f"activation scale {name}", linear(activation_scale=value), "scale-value")
        add(f"weight scale {name}", linear(weight_scale=value), "scale-value")
    add("activation scale infinite", linear(activation_scale=np.inf), "scale-value")
    channels = np.full(96, 0.01)
    channels[7] = 0.0
    add(
        "one channel's scale zero",
        linear(base="fp32", weight_scale=channels, axis=1),
        "scale-value",
    )
    add("activation scale subnormal", linear(activation_scale=1e-7), "small-scale")
    add("fp32 scale of that size", linear(base="fp32", activation_scale=1e-7))
    add(
        "int4 scales of any sign",
        linear(None, "int4", weight_scale=np.full((2, 96), -0.01), axis=0, block=32),
    )
    add("scale of one element", linear(activation_scale=[0.03]))
    add("scale of rank 2", linear(activation_scale=[[0.03]]), "scale-shape")
    add(
        "too few scales", linear(base="fp32", weight_scale=np.full(95, 0.01), axis=1), "scale-shape"
    )
    add(
        "axis out of range",
        linear(base="fp32", weight_scale=np.full(96, 0.01), axis=2),
        "scale-shape",
    )
    add(
        "blocks along two axes",
        linear(None, "int4", weight_scale=np.full((2, 3), 0.01), axis=0, block=32),
        "scale-shape",
    )
    add(
        "odd number of int4",
        linear(None, "int4", k=63, n=95, weight_scale=np.full((1, 95), 0.01), axis=0, block=63),
        "odd-4-bit",
        "weight-only-form",
    )
    for name in ("computed", "an input", "folded"):
        g = Graph()
        x = g.input("x", [2, 48, 64])
        if name == "computed":
            peak = g.op("ReduceMax", [g.op("Abs", [x])], keepdims=0)
            scale = g.op("Mul", [peak, g.constant(1 / 127)])
        elif name == "an input":
            scale = g.input("s", [])
        else:
            scale = g.op("Mul", [g.constant(0.5), g.constant(0.06)])
        rules = () if name == "folded" else ("computed-scale",)
        add(f"scale {name}", product(g, g.quantized(x, "int8", scale), g.weight((64, 96))), *rules)
    for name in ("input", "constant"):
        g = Graph()
        x = g.op("Transpose", [g.quantized(g.input("x", [2, 64, 48]))], perm=[0, 2, 1])
        scale = g.input("s", []) if name == "input" else g.constant(0.05)
        rules = ("requantized", "computed-scale") if name == "input" else ()
        add(
            f"quantized twice, the second scale {name}",
            product(g, g.quantized(x, "int8", scale), g.weight((64, 96))),
            *rules,
        )
    for fmt in EIGHT:
        for base in ("fp16", "fp32"):
            g = Graph(base)
            x = g.quantized(g.input("x", [48, 64]), fmt, np.full(48, 0.03), axis=0)
            add(
                f"{fmt} scales of rows, {base}",
                product(g, x, g.weight((64, 96), fmt)),
                *(("raw-sums",) if base == "fp16" else ()),
                *(("onnxruntime-fp8",) if base == "fp32" and fmt == "fp8" else ()),
            )
    for base in ("fp16", "fp32"):
        for where in ("activation", "weight"):
            g = Graph(base)
            x = g.input("x", [2, 32, 8, 8])
            x = g.quantized(x, "int8", [0.03] if where == "activation" else 0.03)
            w = g.weight((64, 32, 3, 3), "int8", [0.01] if where == "weight" else 0.01)
            sound = base == "fp32" and where == "weight"
            add(
                f"conv, {where} scale of one element, {base}",
                product(g, x, w, "Conv"),
                *(() if sound else ("scale-of-one",)),
            )
    for fmt, word, rules in (
        ("int8", "fp16", ("scale-type",)),
        ("fp8", "fp16", ("scale-type",)),
        ("fp8", "fp32", ()),
    ):
        g = Graph("fp32", 23)
        x = g.quantized(g.input("x", [2, 48, 64]), fmt, 0.03, word)
        w = g.weight((64, 96), fmt, 0.01, word)
        portable = ("onnxruntime-fp8",) if word == "fp32" else ()
        if fmt == "int8":
            rules = ()  # ONNX has it from opset 23 on
        add(f"{fmt} {word} scale of fp32", product(g, x, w, kind=word), *rules, *portable)
    for base in ("bf16", "fp16"):
        g = Graph(base)
        x, w = g.input("x", [2, 32, 8, 8]), g.floats(32, 16, 3, 3)
        add(
            f"ConvTranspose of {base}",
            product(g, x, w, "ConvTranspose"),
            *(("type-of-operator",) if base == "bf16" else ()),
        )
    for where in ("activation", "weight"):
        g = Graph()
        x, s = g.input("x", [2, 32, 8, 8]), g.input("s", [])
        x = g.quantized(x, "int8", s if where == "activation" else 0.03)
        w = g.weight((64, 32, 3, 3), "int8", s if where == "weight" else 0.01)
        add(f"conv, {where} scale computed", product(g, x, w, "Conv"), "computed-scale")
    add("fp32 scale in an fp16 graph", linear(activation_type="fp32"), "mixed-types", "scale-type")
    add(
        "fp32 scales in an fp16 graph",
        linear(activation_type="fp32", weight_type="fp32", output="fp32"),
        "scale-type",
    )
    for target, fmt, rules in (
        ("sm80", "fp8", ("format-for-target",)),
        ("sm75", "int8", ()),
        ("sm80", "int8", ()),
        ("sm120", "fp8", ()),
    ):
        add(f"{fmt} for {target}", linear(fmt, fmt), *rules, target=target)
    blocks = {"weight_scale": np.full((2, 96), 0.01), "axis": 0, "block": 32}
    add(
        "int4 for sm75",
        linear(None, "int4", **blocks),
        "format-for-target",
        "weight-only-form",
        target="sm75",
    )
    add("int4 for sm80", linear(None, "int4", **blocks), target="sm80")


def _codes() -> None:
    for value in (0, 128):
        g = Graph()
        x, s, z = g.input("x", [2, 48, 64]), g.constant(0.03), g.constant(value, "uint8")
        q = g.op("QuantizeLinear", [x, s, z])
        x = g.op("DequantizeLinear", [q, s, z])
        add(
            f"uint8 activation, zero point {value}",
            product(g, x, g.weight((64, 96))),
            "zero-point" if value else "uint8",
        )
        g = Graph()
        x = g.quantized(g.input("x", [2, 48, 64]))
        w = g.weight((64, 96), "uint8", zero=g.constant(value, "uint8"))
        add(
            f"uint8 weight, zero point {value}",
            product(g, x, w),
            *(("zero-point",) if value else ("uint8",)),
            *(("type-of-operator",) if 0 else ()),
        )
    g = Graph()
    x, s = g.input("x", [2, 48, 64]), g.constant(0.03)
    x = g.op("DequantizeLinear", [g.op("QuantizeLinear", [x, s]), s])
    add("no zero point", product(g, x, g.weight((64, 96))), "uint8")
    g = Graph()
    x, s = g.input("x", [2, 48, 64]), g.constant(0.03)
    q = g.op("QuantizeLinear", [x, s], output_dtype=TensorProto.INT8)
    add(
        "no zero point, output_dtype",
        product(g, g.op("DequantizeLinear", [q, s]), g.weight((64, 96))),
    )
    g = Graph()
    x, s, z = g.input("x", [2, 48, 64]), g.constant(0.03), g.constant(3, "int8")
    x = g.op("DequantizeLinear", [g.op("QuantizeLinear", [x, s, z]), s, z])
    add("int8 zero point 3", product(g, x, g.weight((64, 96))), "zero-point")
    g = Graph("fp32")
    x = g.quantized(g.input("x", [2, 48, 64]))
    zero = g.constant([0] * 95 + [1], "int8")
    w = g.weight((64, 96), "int8", np.full(96, 0.01), zero=zero, axis=1)
    add("one channel's zero point", product(g, x, w), "zero-point")
    g = Graph()
    x, s, z = g.input("x", [2, 48, 64]), g.constant(0.03), g.input("z", [], "int8")
    x = g.op("DequantizeLinear", [g.op("QuantizeLinear", [x, s, z]), s, z])
    add("zero point at run time", product(g, x, g.weight((64, 96))), "zero-point")
    for kind in ("int16", "uint16", "e5m2"):
        add(f"{kind} codes", linear(kind, None, opset=21), "element-type", *(("one-operand",)))
    for bias in ("int32", "int8", "float"):
        add(f"{bias} bias", conv(bias=bias), *(("int32-codes",) if bias == "int32" else ()))
    for kind in ("int8", "fp8", "int4"):
        g = Graph()
        x = g.input("x", [48, 64])
        codes = g.op("Transpose", [g.codes((96, 64), kind)], perm=[1, 0])
        w = g.op("DequantizeLinear", [codes, g.constant(0.01)])
        left = g.quantized(x, kind) if kind in EIGHT else x
        add(
            f"{kind} codes transposed",
            product(g, left, w),
            "moved-codes",
            *(("weight-only-form",) if kind == "int4" else ()),
        )
        if kind == "int4":
            continue
        for op, extra in (("Transpose", {"perm": [1, 0]}), ("Slice", {})):
            g = Graph()
            s, z = g.constant(0.03), g.codes((), kind, zero=True)
            q = g.op("QuantizeLinear", [g.input("x", [64, 64]), s, z])
            more = [g.integers(0), g.integers(8), g.integers(0)] if op == "Slice" else []
            x = g.op("DequantizeLinear", [g.op(op, [q, *more], **extra), s, z])
            add(
                f"{kind} Q, {op}, DQ",
                product(g, x, g.weight((64, 96), kind)),
                *(("moved-codes",) if kind == "fp8" and op == "Slice" else ()),
            )
    for shape in ((), (1,)):
        g = Graph()
        number = g.op("DequantizeLinear", [g.codes(shape, "int8"), g.constant(0.01)])
        g.output(g.op("Mul", [g.input("x", [4, 16]), number]))
        add(f"a number as codes of shape {shape}", g.model(), *(() if shape else ("scalar-codes",)))
    for ids in (True, False):
        g = Graph()
        i = g.input("i", [4], "int64")
        table = g.codes((64, 96), "int8")
        if ids:
            w = g.op("DequantizeLinear", [g.op("Gather", [table, i]), g.constant(0.01)])
        else:
            w = g.op("Gather", [g.op("DequantizeLinear", [table, g.constant(0.01)]), i])
        g.output(w)
        add(
            f"Gather {'of codes' if ids else 'of a dequantized table'}",
            g.model(),
            *(("moved-codes",) if ids else ()),
        )


def _convolutions() -> None:
    for fmt in EIGHT:
        add(f"{fmt} ConvTranspose", conv(fmt, fmt, op="ConvTranspose"), "convolution")
        add(f"{fmt} ConvTranspose, weight only", conv(None, fmt, op="ConvTranspose"), "convolution")
        rules = ("convolution",) if fmt == "fp8" else ()
        add(f"{fmt} conv 7x7", conv(fmt, fmt, kernel=(7, 7)), *rules)
        add(f"{fmt} conv 5x5x3", conv(fmt, fmt, kernel=(5, 5, 3)), *rules)
        add(f"{fmt} conv 5x5", conv(fmt, fmt, kernel=(5, 5)))
        add(f"{fmt} conv of 3 channels", conv(fmt, fmt, channels=(3, 32)), "thin")
        add(f"{fmt} depthwise", conv(fmt, fmt, channels=(32, 32), group=32), "thin")
        add(f"{fmt} conv of 16 channels", conv(fmt, fmt, channels=(16, 16)))
        add(f"{fmt} thin product", linear(fmt, fmt, n=8), "thin")
        g = Graph()
        x = g.quantized(g.input("x", [2, 48, 64]), fmt)
        add(
            f"{fmt} Einsum",
            product(g, x, g.weight((96, 64), fmt), "Einsum", equation="bsk,nk->bsn"),
        )


def _attentions() -> None:
    add("fp16 attention", attention(None, None, None, None))
    add("fp8 attention", attention(), "onnxruntime-fp8")
    add("fp8 attention, masked", attention(mask="fp16"), "onnxruntime-fp8")
    add("fp8 attention, softmax in fp32", attention(soft32=True), "onnxruntime-fp8")
    add("fp8 attention, 32 keys", attention(length=32), "onnxruntime-fp8")
    add("fp8 attention, 31 keys", attention(length=31), "attention-size", "onnxruntime-fp8")
    add(
        "fp8 attention, 16 keys for 64 queries",
        attention(keys=16),
        "attention-size",
        "onnxruntime-fp8",
    )
    add("fp8 attention, 64 keys for 16 queries", attention(length=16, keys=64), "onnxruntime-fp8")
    add("fp8 attention, heads of 24", attention(head=24), "onnxruntime-fp8")
    add("fp8 attention, heads of 272", attention(head=272), "attention-size", "onnxruntime-fp8")
    add("fp8 attention in fp32", attention(base="fp32"), "attention-fp32", "onnxruntime-fp8")
    add("fp8 attention in bf16", attention(base="bf16"), "onnxruntime-fp8")
    add("int8 attention", attention(*["int8"] * 4), "attention-int8")
    add("int8 q and k", attention("int8", "int8", None, None), "attention-partly")
    add(
        "int8 q and k, fp8 behind",
        attention("int8", "int8", "fp8", "fp8"),
        "attention-partly",
        "onnxruntime-fp8",
    )
    whole = ["int8"] * 4
    add("int8 attention and context", attention(*whole, given="int8"))
    add("int8 attention, fp8 context", attention(*whole, given="fp8"), "attention-int8")
    add("int8 attention and context in fp32", attention(*whole, given="int8", base="fp32"))
    add("int8 attention, 512 keys", attention(*whole, given="int8", keys=512))
    add("int8 attention, 513 keys", attention(*whole, given="int8", keys=513), "attention-int8")
    add("int8 attention, heads of 128", attention(*whole, given="int8", head=128), "attention-int8")
    add(
        "int8 attention, one query",
        attention(*whole, given="int8", length=1, keys=64),
        "attention-int8",
    )
    add(
        "int8 attention, its scores too",
        attention(*whole, given="int8", scores="int8"),
        "attention-scores",
    )
    add("fp8 attention and context in fp32", attention(base="fp32", given="fp8"), "onnxruntime-fp8")
    add("fp8 scores too", attention(scores="fp8"), "attention-scores", "onnxruntime-fp8")
    for index, name in enumerate(("q", "k", "softmax", "v")):
        formats: list[str | None] = ["fp8"] * 4
        formats[index] = None
        rules = ("attention-partly", *(("onnxruntime-fp8",) if index < 2 else ()))
        add(f"fp8 attention without {name}", attention(*formats), *rules)
    add("fp8 q only", attention("fp8", None, None, None), "attention-partly")
    add(
        "fp16 attention, quantized mask",
        attention(None, None, None, None, mask="fp8"),
        "mask-quantized",
    )
    for quantized in (True, False):
        g = Graph(opset=23)
        tensors = [g.input(name, [2, 4, 64, 64]) for name in "qkv"]
        if quantized:
            tensors = [g.quantized(t, "fp8") for t in tensors]
        g.output(g.op("Attention", tensors, "attention"))
        add(
            f"Attention operator{', fp8' if quantized else ''}",
            g.model(),
            *(("attention-operator",) if quantized else ()),
        )
    for quantized in (True, False):
        g = Graph()
        x = g.input("x", [2, 48, 64])
        y = g.op("MatMul", [g.quantized(x), g.weight((64, 64))], "product")
        if quantized:
            x, y = g.quantized(x), g.quantized(y)
        y = g.op("Add", [x, y], "residual")
        g.output(g.op("LayerNormalization", [y, g.constant(np.ones(64))]))
        add(
            f"residual addition{', quantized' if quantized else ''}",
            g.model(),
            *(("residual-quantized",) if quantized else ()),
        )
    for fmt, scales, rules in (
        ("fp8", (0.01, 0.02, 0.03), ("merged-scales",)),
        ("fp8", (0.01, 0.01, 0.01), ()),
        ("int8", (0.01, 0.02, 0.03), ()),
    ):
        g = Graph()
        x = g.quantized(g.input("x", [2, 48, 64]), fmt)
        for index, scale in enumerate(scales):
            g.output(g.op("MatMul", [x, g.weight((64, 96), fmt, scale)], f"product_{index}"))
        same = "one scale" if len(set(scales)) == 1 else "a scale each"
        add(f"{fmt} q, k, v, {same}", g.model(), *rules)


def _graphs() -> None:
    for op in ("Add", "Concat", "MatMul", "Where", "Pow", "Less"):
        g = Graph()
        tensors = [g.input("x", [16, 16]), g.input("z", [16, 16], "fp32")]
        if op == "Where":
            tensors.insert(0, g.input("c", [16, 16], "bool"))
        out = g.op(op, tensors, **({"axis": 0} if op == "Concat" else {}))
        g.output(out, "bool" if op == "Less" else None)
        add(f"{op} of two types", g.model(), *(() if op == "Pow" else ("mixed-types",)))
    g = Graph()
    g.output(g.op("Concat", [g.input("x", [4, 16]), g.input("z", [4, 16])], axis=0))
    add("Concat of one type", g.model())
    for op, domain, rules in (
        ("Foo", "my.domain", ("operator",)),
        ("Gelu", "com.microsoft", ("contrib-domain",)),
        ("QuickGelu", "com.microsoft", ("operator", "contrib-domain")),
        ("BitwiseNot", "", ("operator",)),
        ("Gelu", "", ()),
    ):
        g = Graph("fp32")
        kind = "int32" if op == "BitwiseNot" else "fp32"
        g.output(g.op(op, [g.input("x", [4, 16], kind)], "node", domain), kind)
        add(f"{domain}::{op}", g.model(), *rules)
    add("com.microsoft Q/DQ", linear(domain="com.microsoft"), "contrib-domain")
    for kind in ("int32", "int64"):
        g = Graph()
        a, b = g.input("x", [16, 16], kind), g.input("z", [16, 16], kind)
        g.output(g.op("MatMul", [a, b]), kind)
        add(f"MatMul of {kind}", g.model(), "type-of-operator")
    for op in ("Cast", "Transpose"):
        g = Graph()
        out = g.op(
            op,
            [g.input("x", [4, 16], "uint8")],
            **({"to": TensorProto.FLOAT16} if op == "Cast" else {"perm": [1, 0]}),
        )
        g.output(out, "fp16" if op == "Cast" else "uint8")
        add(f"{op} of uint8", g.model(), *(() if op == "Cast" else ("type-of-operator",)))
    for base in ("fp16", "fp32"):
        g = Graph(base)
        g.output(g.op("Celu", [g.input("x", [4, 16])]))
        add(f"Celu of {base}", g.model(), *(("type-of-operator",) if base == "fp16" else ()))
    for dilation in (1, 2):
        g = Graph()
        x = g.input("x", [1, 4, 16, 16])
        g.output(g.op("MaxPool", [x], kernel_shape=[2, 2], dilations=[dilation] * 2))
        add(
            f"MaxPool, dilation {dilation}",
            g.model(),
            *(("operator-attribute",) if dilation > 1 else ()),
        )
    for constant in (True, False):
        g = Graph()
        x = g.input("x", [4, 16])
        axes = g.integers(1) if constant else g.input("axes", [1], "int64")
        g.output(g.op("ReduceMax", [x, axes]))
        add(
            f"axes {'constant' if constant else 'at run time'}",
            g.model(),
            *(() if constant else ("runtime-parameter",)),
        )
    g = Graph("fp32")
    x = g.op("Cast", [g.input("x", [4, 16])], to=TensorProto.DOUBLE)
    g.output(g.op("Cast", [g.op("Add", [x, x])], to=TensorProto.FLOAT))
    add("fp64 inside", g.model(), "fp64")
    _names()
    for opset, base, rules in (
        (13, "fp32", ()),
        (13, "fp16", ("opset",)),
        (19, "fp16", ()),
    ):
        add(f"int8 {base} in opset {opset}", linear(base=base, opset=opset), *rules)
    add("fp8 in opset 18", linear("fp8", "fp8", base="fp32", opset=18), "opset", "onnxruntime-fp8")
    add("fp8 fp32", linear("fp8", "fp8", base="fp32"), "onnxruntime-fp8")
    g = Graph()
    x = g.quantized(g.input("x", [2, 48, 64]))
    y = g.op("MatMul", [x, g.weight((64, 64))], "first")
    add(
        "int8, then fp8",
        product(g, g.quantized(y, "fp8"), g.weight((64, 64), "fp8")),
        "two-formats",
    )
    _bodies()


def _names() -> None:
    for op in ("Relu", "QuantizeLinear"):
        g = Graph()
        x = g.op("Relu", [g.input("x", [2, 48, 64])], "twin")
        if op == "Relu":
            x = g.quantized(g.op("Relu", [x], "twin"))
        else:
            s, z = g.constant(0.03), g.codes((), "int8", zero=True)
            x = g.op("DequantizeLinear", [g.op(op, [x, s, z], "twin"), s, z])
        add(f"a second node of one name, {op}", product(g, x, g.weight((64, 96))), "repeated-name")
    for length in (4095, 4096):
        g = Graph()
        x = g.op("Relu", [g.input("x", [4, 16])], "n" * length, outputs=["y"])
        g.output(g.op("Relu", [x], "last"))
        add(f"a name of {length}", g.model(), *(("long-name",) if length > 4095 else ()))


def _bodies() -> None:
    """A fault inside the branch of an If."""
    for op in ("Relu", "Foo"):
        g = Graph("fp32")
        x, c = g.input("x", [4, 16]), g.input("c", [], "bool")
        out = [helper.make_tensor_value_info("t", TensorProto.FLOAT, None)]
        branches = [
            helper.make_graph(
                [helper.make_node(kind, [x], ["t"], name=f"inner_{kind}")], kind, [], out
            )
            for kind in (op, "Sigmoid")
        ]
        g.output(g.op("If", [c], then_branch=branches[0], else_branch=branches[1]))
        add(f"{op} in an If", g.model(), *(("operator",) if op == "Foo" else ()))


_products()
_between()
_scales()
_codes()
_convolutions()
_attentions()
_graphs()
