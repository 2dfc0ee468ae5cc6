"""Attention as exporters spell it: one function, the differences as options."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from core_graphs import Net

HEADS, KV_HEADS, HEAD, MODEL = 4, 2, 16, 64


@dataclass(frozen=True)
class Spelling:
    """How one exporter writes softmax(q k^T / sqrt(d) + mask) v.

    Attributes:
        scale: where the factor is: `q`, `qk`, `mul`, `mul-first` (the constant as first operand),
            `div`, `after-mask` or `none`.
        mask: `add`, `where`, `none`.
        fp32: Casts to FP32 around the softmax, of an FP16 net.
        gqa: half as many keys and values as queries, expanded.
        transpose: `heads` (one Transpose to [b, h, d, s]) or `key` (a second one).
        wrapped: the softmax in the form of opset 12, flattened.
        dropout: Dropout in inference, behind the softmax.
        cleared: a Where behind the softmax clears fully masked rows, as torch's sdpa does.
    """

    scale: str = "mul"
    mask: str = "add"
    fp32: bool = False
    gqa: bool = False
    transpose: str = "heads"
    wrapped: bool = False
    dropout: bool = False
    cleared: bool = False

    def __str__(self) -> str:
        extra = ("fp32", "gqa", "wrapped", "dropout", "cleared")
        flags = [name for name in extra if getattr(self, name)]
        return "-".join((self.scale, self.mask, self.transpose, *flags))


def attention_net(how: Spelling, opset: int = 21, head: int = HEAD) -> Net:
    """Inputs x [b, s, 64] and mask [b, 1, s, s] (bool), output [b, s, heads x head]."""
    net = Net(opset, np.float16 if how.fp32 else np.float32)
    x = net.input("x", ["b", "s", MODEL])
    kv = KV_HEADS if how.gqa else HEADS
    q = _heads(net, x, "q", HEADS, head, [0, 2, 1, 3])
    key_axes = [0, 2, 3, 1] if how.transpose == "heads" else [0, 2, 1, 3]
    k = _heads(net, x, "k", kv, head, key_axes)
    v = _heads(net, x, "v", kv, head, [0, 2, 1, 3])
    if how.gqa:
        k, v = _expand(net, k, "k"), _expand(net, v, "v")
    if how.transpose == "key":
        k = net.op("Transpose", k, perm=[0, 1, 3, 2], name="/key")
    factor = head**-0.5
    if how.scale in ("q", "qk"):
        root = net.const("root", factor if how.scale == "q" else factor**0.5)
        q = net.op("Mul", q, root, name="/q_scale")
        k = net.op("Mul", k, root, name="/k_scale") if how.scale == "qk" else k
    scores = net.op("MatMul", q, k, name="/scores")
    dtype = np.float32 if how.fp32 else None
    if how.fp32:
        scores = net.op("Cast", scores, to=1, name="/up")
    if how.scale == "mul":
        scores = net.op("Mul", scores, net.const("c", factor, dtype), name="/scale")
    elif how.scale == "mul-first":
        scores = net.op("Mul", net.const("c", factor, dtype), scores, name="/scale")
    elif how.scale == "div":
        scores = net.op("Div", scores, net.const("c", 1 / factor, dtype), name="/scale")
    if how.mask != "none":
        scores = _masked(net, scores, how, dtype)
    if how.scale == "after-mask":
        scores = net.op("Mul", scores, net.const("c", factor, dtype), name="/scale")
    probabilities = _softmax(net, scores, how)
    if how.fp32:
        probabilities = net.op("Cast", probabilities, to=10, name="/down")
    values = net.op("MatMul", probabilities, v, name="/values")
    joined = net.op("Transpose", values, perm=[0, 2, 1, 3], name="/join")
    shape = net.const("joined", np.array([0, 0, HEADS * head], np.int64))
    net.output(net.op("Reshape", joined, shape, name="/out"))
    return net


def _heads(net: Net, x: str, name: str, count: int, head: int, perm: list[int]) -> str:
    y = net.op("MatMul", x, net.weight(f"{name}.weight", MODEL, count * head), name=f"/{name}")
    shape = net.const(f"{name}.shape", np.array([0, 0, count, head], np.int64))
    y = net.op("Reshape", y, shape, name=f"/{name}/split")
    return net.op("Transpose", y, perm=perm, name=f"/{name}/heads")


def _expand(net: Net, x: str, name: str) -> str:
    """[b, kv, ...] -> [b, heads, ...]: each key serves two queries."""
    y = net.op("Unsqueeze", x, net.const(f"{name}.two", np.array([2], np.int64)))
    times = net.const(f"{name}.times", np.array([1, 1, HEADS // KV_HEADS, 1, 1], np.int64))
    y = net.op("Expand", y, times, name=f"/{name}/expand")
    dims = net.op("Shape", x, start=2, name=f"/{name}/dims")
    batch = net.op("Shape", x, end=1, name=f"/{name}/batch")
    count = net.const(f"{name}.count", np.array([HEADS], np.int64))
    full = net.op("Concat", batch, count, dims, axis=0, name=f"/{name}/full")
    return net.op("Reshape", y, full, name=f"/{name}/repeat")


def _masked(net: Net, scores: str, how: Spelling, dtype: object) -> str:
    mask = net.input("mask", ["b", 1, "s", "s"], bool)
    fill = net.const("fill", -10000.0 if how.fp32 else np.finfo(np.float32).min, dtype)
    if how.mask == "where":
        return net.op("Where", mask, scores, fill, name="/mask")
    zero = net.const("zero", 0.0, dtype)
    return net.op("Add", scores, net.op("Where", mask, zero, fill, name="/bias"), name="/mask")


def _softmax(net: Net, scores: str, how: Spelling) -> str:
    if how.wrapped:
        flat = net.op("Flatten", scores, axis=3, name="/flat")
        y = net.op("Softmax", flat, axis=-1, name="/softmax")
        y = net.op("Reshape", y, net.op("Shape", scores, name="/shape"), name="/unflat")
    else:
        y = net.op("Softmax", scores, axis=-1, name="/softmax")
    if how.dropout:
        y = net.op("Dropout", y, name="/dropout")
    if how.cleared:
        dtype = np.float32 if how.fp32 else None
        nothing = net.op("IsNaN", y, name="/nothing")
        y = net.op("Where", nothing, net.const("clear", 0.0, dtype), y, name="/clear")
    return y


SPELLINGS = [
    Spelling(),  # BERT
    Spelling("div", "add"),
    Spelling("mul-first", "where"),
    Spelling("q", "where", transpose="key"),
    Spelling("qk", "none", transpose="key"),  # SDXL
    Spelling("none", "none"),
    Spelling("after-mask", "add"),
    Spelling("mul", "add", gqa=True, transpose="key"),  # LLaMA
    Spelling("mul", "add", fp32=True),
    Spelling("div", "where", fp32=True, gqa=True),
    Spelling("q", "none", wrapped=True),  # PaddleOCR at opset 12
    Spelling("mul", "add", dropout=True),
    Spelling("mul", "add", cleared=True),
]
