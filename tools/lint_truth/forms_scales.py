"""Forms of scales, zero points and codes."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from tools.lint_truth.building import Graph, product
from tools.lint_truth.cases import (
    EIGHT,
    add,
    conv,
    linear,
)


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


def add_all() -> None:
    """Put them into the table."""
    _scales()
    _codes()
