"""Small graphs in which a layer's input can be divided by a factor per channel, and some others.

Each is a model of one input `x` (or `ids`) whose layers `MatMul(t, w...)` (or Gemm, Conv) read the
tensor named `t`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graph_models as g
import numpy as np
import onnx
from onnx import numpy_helper as nh

Pattern = Callable[[], onnx.ModelProto]

FOLDS: dict[str, Pattern] = {}
"""Patterns in which something takes the factor."""


def _pattern(name: str, text: str, weights: dict[str, tuple[int, ...]], **more: Any) -> None:
    """Register a pattern: `weights` are random, `more` are given arrays."""

    def build() -> onnx.ModelProto:
        rng = np.random.default_rng(len(name))
        made = []
        for key, shape in weights.items():
            dtype = more.get("dtype", np.float32)
            # Multiples of 1/64 stay normal numbers in FP16 when they are divided by 8.
            values = np.round(rng.standard_normal(shape) * 64) / 64
            made.append(nh.from_array(values.astype(dtype), key))
        given = {k: v for k, v in more.items() if k not in ("dtype", "opset", "ir")}
        made += [nh.from_array(np.asarray(v), k) for k, v in given.items()]
        opsets = f'["": {more.get("opset", 18)}, "com.microsoft": 1]'
        header = f"<ir_version: {more.get('ir', 10)}, opset_import: {opsets}>"
        return g.parsed(f"{header} {text}", *made)

    FOLDS[name] = build


_X = "(float[n, seq, 32] x) => (float[n, seq, p] y)"
EPS, TWO = np.float32(1e-5), np.float32(2)

_pattern(
    "LayerNormalization, two readers",
    f"""g {_X} {{
        t = LayerNormalization <axis = -1> (x, gain, bias)
        a = MatMul(t, w1)   b = MatMul(t, w2)   y = Add(a, b)
    }}""",
    {"gain": (32,), "bias": (32,), "w1": (32, 48), "w2": (32, 48)},
)
_pattern(
    "LayerNormalization without bias, its shape asked for",
    f"""g {_X} {{
        t = LayerNormalization <axis = 2> (x, gain)
        s = Shape(t)   a = MatMul(t, w)   y = Reshape(a, s2)
    }}""",
    {"gain": (32,), "w": (32, 48)},
    s2=np.array([0, 0, -1], np.int64),
)
_pattern(
    "LayerNorm in parts",
    f"""g {_X} {{
        mean = ReduceMean <keepdims = 1> (x, last)   d = Sub(x, mean)   sq = Pow(d, two)
        var = ReduceMean <keepdims = 1> (sq, last)   ve = Add(var, eps)   root = Sqrt(ve)
        norm = Div(d, root)   m = Mul(norm, gain)   t = Add(m, bias)   y = MatMul(t, w)
    }}""",
    {"gain": (32,), "bias": (32,), "w": (32, 48)},
    last=np.array([-1], np.int64),
    two=TWO,
    eps=EPS,
)
for _name, _tail in {
    "Reciprocal": "r = Reciprocal(root)   norm = Mul(x, r)",
    "Div": "norm = Div(x, root)",
    "one Div": "r = Div(one, root)   norm = Mul(r, x)",
}.items():
    _pattern(
        f"RMSNorm in parts, {_name}",
        f"""g {_X} {{
            sq = Pow(x, two)   ms = ReduceMean <keepdims = 1> (sq, last)   me = Add(ms, eps)
            root = Sqrt(me)   {_tail}   t = Mul(gain, norm)   y = MatMul(t, w)
        }}""",
        {"gain": (32,), "w": (32, 48)},
        last=np.array([-1], np.int64),
        two=TWO,
        eps=EPS,
        one=np.float32(1),
    )
_pattern(
    "RMSNorm in parts, Casts to FP32 between",
    """g (float16[n, seq, 32] x) => (float16[n, seq, p] y) {
        wide = Cast <to = 1> (x)   sq = Mul(wide, wide)   ms = ReduceMean <keepdims = 1> (sq, last)
        me = Add(ms, eps)   root = Sqrt(me)   r = Reciprocal(root)   norm = Mul(wide, r)
        half = Cast <to = 10> (norm)   t = Mul(half, gain)   y = MatMul(t, w)
    }""",
    {"gain": (32,), "w": (32, 48)},
    dtype=np.float16,
    last=np.array([-1], np.int64),
    eps=EPS,
)
_pattern(
    "RMSNorm in FP32 whose gain is too, cast behind",
    """g (float16[n, seq, 32] x) => (float16[n, seq, p] y) {
        wide = Cast <to = 1> (x)   sq = Mul(wide, wide)   ms = ReduceMean <keepdims = 1> (sq, last)
        me = Add(ms, eps)   root = Sqrt(me)   norm = Div(wide, root)   full = Mul(norm, gain)
        t = Cast <to = 10> (full)   y = MatMul(t, w)
    }""",
    {"w": (32, 48)},
    dtype=np.float16,
    gain=np.linspace(0.5, 2, 32, dtype=np.float32),
    last=np.array([-1], np.int64),
    eps=EPS,
)
_pattern(
    "RMSNormalization",
    f"g {_X} {{ t = RMSNormalization <axis = -1> (x, gain)   y = MatMul(t, w) }}",
    {"gain": (32,), "w": (32, 48)},
    opset=23,
    ir=11,
)
_pattern(
    "SimplifiedLayerNormalization",
    f"g {_X} {{ t = SimplifiedLayerNormalization <axis = -1> (x, gain)   y = MatMul(t, w) }}",
    {"gain": (32,), "w": (32, 48)},
)
_pattern(
    "SkipSimplifiedLayerNormalization, its sum read too",
    f"""g {_X} {{
        k = Relu(x)
        t, m, v, sum = com.microsoft.SkipSimplifiedLayerNormalization (x, k, gain)
        a = MatMul(t, w)   b = MatMul(sum, w2)   y = Add(a, b)
    }}""",
    {"gain": (32,), "w": (32, 48), "w2": (32, 48)},
)
_pattern(
    "SkipLayerNormalization",
    f"""g {_X} {{
        k = Relu(x)   t = com.microsoft.SkipLayerNormalization (x, k, gain, beta, before)
        y = MatMul(t, w)
    }}""",
    {"gain": (32,), "beta": (32,), "before": (32,), "w": (32, 48)},
)
_pattern(
    "GroupNormalization a channel, into tokens",
    """g (float[n, 32, 4, 4] x) => (float[n, q, p] y) {
        c = GroupNormalization <num_groups = 8> (x, gain, bias)
        l = Transpose <perm = [0, 2, 3, 1]> (c)   t = Reshape(l, tokens)   y = MatMul(t, w)
    }""",
    {"gain": (32,), "bias": (32,), "w": (32, 48)},
    opset=21,
    tokens=np.array([0, -1, 32], np.int64),
)
_pattern(
    "BatchNormalization, Relu, pooling, a Conv in groups reads",
    """g (float[n, 32, 8, 8] x) => (float[n, 16, 6, 6] y) {
        c = BatchNormalization (x, gain, bias, mean, var)   r = Relu(c)
        t = MaxPool <kernel_shape = [2, 2], strides = [1, 1], pads = [0, 0, 1, 1]> (r)
        y = Conv <group = 4> (t, w)
    }""",
    {"gain": (32,), "bias": (32,), "mean": (32,), "w": (16, 8, 3, 3)},
    var=np.linspace(0.5, 2, 32, dtype=np.float32),
)
_pattern(
    "InstanceNormalization, a depthwise Conv reads",
    """g (float[n, 32, 8, 8] x) => (float[n, 32, 6, 6] y) {
        t = InstanceNormalization (x, gain, bias)   y = Conv <group = 32> (t, w)
    }""",
    {"gain": (32,), "bias": (32,), "w": (32, 1, 3, 3)},
)
_pattern(
    "MatMul and bias before, Relu between",
    f"g {_X} {{ a = MatMul(x, w1)   b = Add(bias, a)   t = Relu(b)   y = MatMul(t, w) }}",
    {"w1": (32, 40), "bias": (40,), "w": (40, 48)},
)
_pattern(
    "a bias for all channels, a factor for all, Sub",
    f"""g {_X} {{
        a = MatMul(x, w1)   b = Sub(one, a)   c = Div(b, three)   d = LeakyRelu(c)
        t = Where(yes, d, one)   y = MatMul(t, w)
    }}""",
    {"w1": (32, 40), "w": (40, 48)},
    one=np.float32(1),
    three=np.array([3], np.float32),
    yes=np.arange(40) % 3 > 0,
)
_pattern(
    "Gemm transB with bias before, Gemm transB reads",
    """g (float[n, 32] x) => (float[n, 48] y) {
        a = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w1, bias)   t = Clip(a, zero)
        y = Gemm <transB = 1> (t, w, bias2)
    }""",
    {"w1": (40, 32), "bias": (1, 40), "w": (48, 40), "bias2": (48,)},
    zero=np.float32(0),
)
_pattern(
    "Gemm with one bias for all",
    """g (float[n, 32] x) => (float[n, 48] y) {
        t = Gemm (x, w1, one)   y = Gemm (t, w)
    }""",
    {"w1": (32, 40), "w": (40, 48)},
    one=np.array([2], np.float32),
)
_pattern(
    "Conv with bias before, a Conv reads",
    """g (float[n, 8, 8, 8] x) => (float[n, 16, 4, 4] y) {
        c = Conv <group = 2> (x, w1, bias)   t = AveragePool <kernel_shape = [2, 2]> (c)
        y = Conv (t, w)
    }""",
    {"w1": (32, 4, 2, 2), "bias": (32,), "w": (16, 32, 3, 3)},
)
_pattern(
    "ConvTranspose before, resized",
    """g (float[n, 8, 4, 4] x) => (float[n, 16, a, b] y) {
        c = ConvTranspose (x, w1, bias)   t = Resize <mode = "linear"> (c, , scales)
        y = Conv (t, w)
    }""",
    {"w1": (8, 32, 2, 2), "bias": (32,), "w": (16, 32, 3, 3)},
    scales=np.array([1, 1, 2, 2], np.float32),
)
_pattern(
    "MatMul from the left, a Conv of one axis reads",
    """g (float[n, 8, 12] x) => (float[n, 16, 10] y) {
        a = MatMul(w1, x)   t = Add(a, bias)   y = Conv(t, w)
    }""",
    {"w1": (32, 8), "bias": (32, 1), "w": (16, 32, 3)},
)
_pattern(
    "a CNN's head: pooled, flattened",
    """g (float[n, 8, 8, 8] x) => (float[n, 48] y) {
        c = Conv (x, w1)   r = PRelu(c, slope)   p = GlobalAveragePool(r)
        t = Flatten <axis = 1> (p)   y = Gemm (t, w)
    }""",
    {"w1": (32, 8, 2, 2), "slope": (32, 1, 1), "w": (32, 48)},
)
_pattern(
    "a CNN's head: squeezed, Dropout, Sum",
    """g (float[n, 8, 8, 8] x) => (float[n, 48] y) {
        c = Conv (x, w1)   p = GlobalMaxPool(c)   q = Squeeze(p, spatial)   d = Dropout(q)
        t = Sum(d, bias, one)   y = MatMul(t, w)
    }""",
    {"w1": (32, 8, 2, 2), "bias": (32,), "w": (32, 48)},
    spatial=np.array([2, 3], np.int64),
    one=np.float32(1),
)
_pattern(
    "gated MLP",
    f"""g {_X} {{
        gate = MatMul(x, wg)   up = MatMul(x, wu)   s = Sigmoid(gate)   act = Mul(gate, s)
        t = Mul(act, up)   y = MatMul(t, w)
    }}""",
    {"wg": (32, 40), "wu": (32, 40), "w": (40, 48)},
)
_pattern(
    "GEGLU, both halves of one layer",
    f"""g {_X} {{
        a = MatMul(x, wu)   b = Add(a, bias)
        gate, up = Split <axis = -1, num_outputs = 2> (b)   s = Tanh(gate)
        t = Mul(up, s)   y = MatMul(t, w)
    }}""",
    {"wu": (32, 80), "bias": (80,), "w": (40, 48)},
)
_pattern(
    "gated MLP, halves by Slice",
    f"""g {_X} {{
        a = MatMul(x, wu)   gate = Slice(a, zero, half, last)   up = Slice(a, half, end, last)
        s = Sigmoid(gate)   t = Mul(s, up)   y = MatMul(t, w)
    }}""",
    {"wu": (32, 80), "w": (40, 48)},
    zero=np.array([0], np.int64),
    half=np.array([40], np.int64),
    end=np.array([2**62], np.int64),
    last=np.array([2], np.int64),
)
_pattern(
    "two layers side by side",
    f"""g {_X} {{
        a = MatMul(x, wa)   b = MatMul(x, wb)   r = Relu(b)   t = Concat <axis = 2> (a, r)
        y = MatMul(t, w)
    }}""",
    {"wa": (32, 24), "wb": (32, 16), "w": (40, 48)},
)
_pattern(
    "an embedding",
    """g (int64[n, seq] ids) => (float[n, seq, 48] y) {
        t = Gather(table, ids)   y = MatMul(t, w)
    }""",
    {"table": (100, 32), "w": (32, 48)},
)
_pattern(
    "weights behind Transpose, Identity and Cast",
    """g (float[n, seq, 32] x) => (float[n, seq, 48] y) {
        h = Identity(w1)   i = Transpose <perm = [1, 0]> (h)   j = Cast <to = 1> (i)
        t = MatMul(x, j)   k = Transpose(w2)   l = Cast <to = 1> (k)   y = MatMul(t, l)
    }""",
    {"w1": (40, 32), "w2": (48, 40)},
    dtype=np.float16,
)


def _attention(kv: int, spelling: str) -> str:
    """4 heads of 8 over `kv` heads of keys and values."""
    repeat = {
        "none": "v = Identity(vt)",
        "Expand": """vu = Unsqueeze(vt, two1)   ve = Expand(vu, wide)   v = Reshape(ve, joined)""",
        "computed": """vu = Unsqueeze(vt, two1)   vs = Shape <start = 0, end = 1> (vt)
            vl = Shape <start = 2, end = 3> (vt)
            target = Concat <axis = 0> (vs, kvs, reps, vl, eight)   ve = Expand(vu, target)
            flat = Concat <axis = 0> (vs, four, vl, eight)   v = Reshape(ve, flat)""",
    }[spelling]
    return f"""g (float[n, seq, 32] x) => (float[n, seq, 48] y) {{
        q = MatMul(x, wq)   qr = Reshape(q, heads)   qt = Transpose <perm = [0, 2, 1, 3]> (qr)
        k = MatMul(x, wk)   kr = Reshape(k, heads)   kt = Transpose <perm = [0, 2, 3, 1]> (kr)
        va = MatMul(x, wv)   vb = Add(va, bv)   vr = Reshape(vb, kvheads)
        vt = Transpose <perm = [0, 2, 1, 3]> (vr)   {repeat}
        a = MatMul(qt, kt)   p = Softmax <axis = -1> (a)   o = MatMul(p, v)
        ot = Transpose <perm = [0, 2, 1, 3]> (o)   t = Reshape(ot, model)   y = MatMul(t, w)
    }}"""


for _kv, _spelling in ((4, "none"), (2, "Expand"), (2, "computed"), (1, "computed")):
    _pattern(
        f"values of attention, {_kv} heads of 4, {_spelling}",
        _attention(_kv, _spelling),
        {
            "wq": (32, 32),
            "wk": (32, 32),
            "wv": (32, 8 * _kv),
            "bv": (8 * _kv,),
            "w": (32, 48),
        },
        heads=np.array([0, 0, 4, 8], np.int64),
        kvheads=np.array([0, -1, _kv, 8], np.int64),
        model=np.array([0, 0, -1], np.int64),
        two1=np.array([2], np.int64),
        wide=np.array([1, 1, 4 // _kv, 1, 1], np.int64),
        joined=np.array([0, 4, -1, 8], np.int64),
        kvs=np.array([_kv], np.int64),
        reps=np.array([4 // _kv], np.int64),
        four=np.array([4], np.int64),
        eight=np.array([8], np.int64),
    )
_pattern(
    "values of attention, one product for q, k and v, by Gather",
    """g (float[n, seq, 32] x) => (float[n, seq, 48] y) {
        c = MatMul(x, wqkv)   cb = Add(c, bqkv)   r = Reshape(cb, parts)
        s = Transpose <perm = [2, 0, 3, 1, 4]> (r)
        q = Gather(s, i0)   k = Gather(s, i1)   v = Gather(s, i2)
        kt = Transpose <perm = [0, 1, 3, 2]> (k)   a = MatMul(q, kt)   p = Softmax <axis = -1> (a)
        o = MatMul(p, v)   ot = Transpose <perm = [0, 2, 1, 3]> (o)   t = Reshape(ot, model)
        y = MatMul(t, w)
    }""",
    {"wqkv": (32, 96), "bqkv": (96,), "w": (32, 48)},
    parts=np.array([0, 0, 3, 4, 8], np.int64),
    model=np.array([0, 0, 32], np.int64),
    i0=np.array(0, np.int64),
    i1=np.array(1, np.int64),
    i2=np.array(2, np.int64),
)
_pattern(
    "values broadcast over the heads by the product itself",
    """g (float[n, seq, 32] x) => (float[n, seq, 48] y) {
        q = MatMul(x, wq)   qr = Reshape(q, heads)   qt = Transpose <perm = [0, 2, 1, 3]> (qr)
        k = MatMul(x, wk)   ku = Unsqueeze(k, one)   kt = Transpose <perm = [0, 1, 3, 2]> (ku)
        v = MatMul(x, wv)   vu = Unsqueeze(v, one)
        a = MatMul(qt, kt)   p = Softmax <axis = -1> (a)   o = MatMul(p, vu)
        ot = Transpose <perm = [0, 2, 1, 3]> (o)   t = Reshape(ot, model)   y = MatMul(t, w)
    }""",
    {"wq": (32, 32), "wk": (32, 8), "wv": (32, 8), "w": (32, 48)},
    heads=np.array([0, 0, 4, 8], np.int64),
    model=np.array([0, 0, 32], np.int64),
    one=np.array([1], np.int64),
)
