"""A form: one small graph, and which rules it must trip; what forms are made of.

Every case was compiled with tensorrt-rtx 1.7.1 before its rule was written; `python -m
tools.lint_truth` compiles them again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx
from onnx import TensorProto

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


def ints(*values: int) -> Callable[[Graph], str]:
    return lambda g: g.integers(*values)


def number(value: object) -> Callable[[Graph], str]:
    return lambda g: g.constant(value)
