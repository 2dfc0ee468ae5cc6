"""Forms of layouts: activations transposed right before a product, q, k and v cut from one."""

from __future__ import annotations

import numpy as np
import onnx

from tools.lint_truth.building import Graph
from tools.lint_truth.cases import add

_VECTOR = np.linspace(0.005, 0.01, 192)


def _weights_alone(fmt: str, *steps: str) -> onnx.ModelProto:
    """x, the steps, times a quantized weight; `perm 0 2 1` is a Transpose."""
    g = Graph()
    spatial = "Conv" in steps or "perm 0 2 3 1" in steps
    sizes = [2, 64, 8, 8] if spatial else [2, 64, 48]
    if "perm 1 0 2" in steps or "perm 0 2 1 3" in steps:
        sizes = [2, 48, 64] if "perm 1 0 2" in steps else [2, 4, 48, 16]
    x = g.input("x", sizes)
    for step in steps:
        if step.startswith("perm"):
            x = g.op("Transpose", [x], perm=[int(n) for n in step.split()[1:]])
        elif step == "Conv":
            x = g.op("Conv", [x, g.floats(64, 64, 1, 1)])
        elif step.startswith("to"):
            x = g.op("Reshape", [x, g.integers(*map(int, step.split()[1:]))])
        else:
            x = g.op(step, [x])
    if fmt == "int4":
        w = g.weight((64, 192), fmt, np.full((2, 192), 0.01), axis=0, block_size=32)
    else:
        w = g.weight((64, 192), fmt, _VECTOR, axis=1)
    g.output(g.op("MatMul", [x, w], "product"))
    return g.model()


def _packed(
    fmt: str = "int8",
    *,
    alone: bool = False,
    base: str = "fp16",
    scale: object = _VECTOR,
    cut: str = "Gather",
    attention: bool = True,
    parts: int = 3,
    biases: int = 0,
) -> onnx.ModelProto:
    """q, k and v cut from one product, as many exporters write it."""
    g = Graph(base)
    x = g.input("x", [2, 48, 64])
    x = x if alone else g.quantized(x, fmt)
    w = g.weight((64, 192), fmt, scale, **({"axis": 1} if np.ndim(scale) else {}))  # type: ignore[arg-type]
    y = g.op("MatMul", [x, w], "product")
    for _ in range(biases):
        y = g.op("Add", [y, g.floats(192)])
    if cut == "Split":
        found = list("qkv")
        g.op("Split", [y, g.integers(64, 64, 64)], outputs=found, axis=-1)
        found = [g.op("Reshape", [t, g.integers(0, -1, 4, 16)]) for t in found]
        found = [g.op("Transpose", [t], perm=[0, 2, 1, 3]) for t in found]
    else:
        y = g.op("Reshape", [y, g.integers(0, -1, 3, 4, 16)])
        y = g.op("Transpose", [y], perm=[2, 0, 3, 1, 4])
        found = [g.op("Gather", [y, g.constant(i, "int64")], axis=0) for i in range(parts)]
    if not attention:
        for tensor in found:
            g.output(g.op("Relu", [tensor]))
        return g.model()
    q, k, v = found[0], found[1], found[-1]
    k = g.op("Transpose", [k], perm=[0, 1, 3, 2])
    q = g.op("Mul", [q, g.constant(0.25)])
    p = g.op("Softmax", [g.op("MatMul", [q, k], "scores")], axis=-1)
    g.output(g.op("MatMul", [p, v], "context"))
    return g.model()


def _with_bias(fmt: str) -> onnx.ModelProto:
    g = Graph()
    x = g.quantized(g.input("x", [2, 48, 64]), fmt)
    y = g.op("MatMul", [x, g.weight((64, 96), fmt)], "product")
    g.output(g.op("Add", [y, g.floats(96)]))
    return g.model()


def add_all() -> None:
    """Put them into the table."""
    for fmt in ("int8", "fp8", "int4"):
        for order in ("perm 0 2 1", "perm 1 0 2"):
            model = _weights_alone(fmt, "Relu", order)
            add(f"{fmt} weight alone, {order}", model, "weight-only-form")
        for steps in (("perm 0 2 1", "Relu"), ("perm 0 2 1 3", "to 2 48 64")):
            add(f"{fmt} weight alone, {', '.join(steps)}", _weights_alone(fmt, *steps))
        for steps in (("Relu", "perm 0 2 3 1"), ("Conv", "to 2 64 64", "perm 0 2 1")):
            add(f"{fmt} weight alone, {', '.join(steps)}", _weights_alone(fmt, *steps))
        rules = () if fmt == "int4" else ("weight-only-form",)
        steps = ("Conv", "Relu", "perm 0 2 3 1", "to 2 64 64")
        add(f"{fmt} weight alone, {', '.join(steps)}", _weights_alone(fmt, *steps), *rules)
    add("int8 linear with a bias", _with_bias("int8"), "onnxruntime-layout")
    add("fp8 linear with a bias", _with_bias("fp8"))
    for fmt in ("int8", "fp8"):
        add(f"{fmt} packed q, k, v", _packed(fmt), "packed-qkv")
        add(f"{fmt} packed q, k, v, one scale", _packed(fmt, scale=0.01))
        add(f"{fmt} packed q, k, v, weights alone", _packed(fmt, alone=True), "packed-qkv")
    add("int8 packed q, k, v, Split", _packed(cut="Split"), "packed-qkv")
    add("int8 packed q, k, v, fp32", _packed(base="fp32"), "packed-qkv")
    add("int8 packed, no attention", _packed(attention=False), "raw-sums")
    add("int8 packed q, k, v, bias", _packed(biases=1), "packed-qkv", "onnxruntime-layout")
    add(
        "int8 packed q, k, v, two biases",
        _packed(biases=2),
        *("raw-sums", "onnxruntime-layout"),
    )
    add("int8 packed q and k", _packed(parts=2), "raw-sums")
