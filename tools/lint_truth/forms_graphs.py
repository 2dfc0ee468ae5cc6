"""Forms of convolutions, attention, names, types and bodies."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper

from tools.lint_truth.building import Graph, product
from tools.lint_truth.cases import (
    EIGHT,
    add,
    attention,
    conv,
    linear,
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


def add_all() -> None:
    """Put them into the table."""
    _convolutions()
    _attentions()
    _graphs()
