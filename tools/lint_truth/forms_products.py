"""Forms of products: operands, what stands between, W4A8."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from tools.lint_truth.building import Graph, product
from tools.lint_truth.cases import (
    EIGHT,
    add,
    conv,
    ints,
    linear,
    number,
    then,
)


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
    add("uint8 x fp8", linear("uint8", "fp8"), "mixed-formats", "uint8")
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
        "Reshape": then("Reshape", ints(96, 64)),
        "Slice": then("Slice", ints(0), ints(8), ints(1)),
        "Unsqueeze": then("Unsqueeze", ints(0)),
        "Tile": then("Tile", ints(1, 2, 1)),
        "Neg": then("Neg"),
        "a factor": then("Mul", number(0.5)),
        "a divisor": then("Div", number(2.0)),
        "Concat of itself": lambda g, t: g.op("Concat", [t, t], axis=1),
    }
    stopping = {
        "Relu": then("Relu"),
        "a vector": then("Mul", number(np.full(64, 0.5))),
        "Add": then("Add", number(0.5)),
        "Pad": then("Pad", ints(0, 1, 0, 0, 0, 0)),
        "Clip": then("Clip", number(0.0), number(6.0)),
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


def add_all() -> None:
    """Put them into the table."""
    _products()
    _between()
