"""Forms of 4 bits, of weights alone and of blocks, as tiny ONNX graphs: to be written, and not to.

Beside what each is compiled into, `kept` are constants whose bytes the plan must hold: scales that
the compiler moved somewhere else, or folded into others, are not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from engine_graphs import NUMPY_TYPE, ONNX_TYPE, QMAX, Form, Graph, amax
from onnx import TensorProto, helper

from onnxq.engine.coverage import WeightedNode

Array = np.ndarray[Any, np.dtype[Any]]
E4M3, E2M1, INT4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn, ml_dtypes.int4
K, N = 128, 96


@dataclass
class Narrow(Form):
    """A form whose scales are looked for in the plan."""

    kept: list[bytes] = field(default_factory=list)


class Blocks(Graph):
    """A graph of operators in blocks, TensorRT's own among them."""

    def __init__(self, base: str, opset: int, k: int, n: int) -> None:
        super().__init__(base, opset)
        self.k, self.n = k, n
        self.kept: list[bytes] = []
        self.own = False

    def stored(self, values: Array, onnx_type: int) -> str:
        """An initializer of any type; two to a byte where they have 4 bits."""
        name = f"stored_{len(self.constants)}"
        raw = values.tobytes()
        if values.dtype in (np.dtype(INT4), np.dtype(E2M1)):
            nibbles = values.view(np.uint8).reshape(-1)
            raw = (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8).tobytes()
        self.constants.append(helper.make_tensor(name, onnx_type, values.shape, raw, raw=True))
        return name

    def trt(self, kind: str, inputs: list[str], outputs: list[str], **attrs: int) -> None:
        """An operator of TensorRT's domain."""
        self.own = True
        node = helper.make_node(kind, inputs, outputs, f"/{outputs[0]}", domain="trt", **attrs)
        self.nodes.append(node)

    def weights(self, index: int) -> Array:
        """[K, N], every consumer's larger than the last one's."""
        spread = self.random.uniform(0.02, 0.3, self.n)
        w = self.random.normal(size=(self.k, self.n)) * spread * (1 + 0.9 * index)
        return np.asarray(w.astype(np.float32))

    def scale(self, values: Array, base: str | None = None) -> str:
        """A constant of many scales, to be found again."""
        typed = np.ascontiguousarray(values.astype(NUMPY_TYPE[base or self.base]))
        self.kept.append(typed.tobytes())
        return self.constant(typed, base)

    def int4(self, w: Array, block: int, transposed: bool, base: str | None = None) -> str:
        """DequantizeLinear of INT4 codes in blocks along K, [K, N] or [N, K]."""
        rows = np.concatenate([w, np.zeros((-self.k % block, self.n), np.float32)])
        peaks = np.abs(rows.reshape(-1, block, self.n)).max(1)
        scale = (peaks / 7).astype(NUMPY_TYPE[base or self.base])
        steps = np.repeat(scale.astype(np.float32), block, 0)[: self.k]
        codes = np.clip(np.rint(w / steps), -8, 7).astype(INT4)
        if transposed:
            codes, scale = np.ascontiguousarray(codes.T), scale.T
        stored = self.stored(codes, TensorProto.INT4)
        given = self.scale(scale, base)
        axis = int(transposed)
        return self.op("DequantizeLinear", [stored, given], axis=axis, block_size=block)

    def per_channel(self, w: Array, fmt: str, transposed: bool) -> str:
        scale = np.abs(w).max(0) / QMAX[fmt]
        codes: Array = w / scale
        codes = np.rint(codes).astype(np.int8) if fmt == "int8" else codes.astype(E4M3)
        stored = self.codes(np.ascontiguousarray(codes.T) if transposed else codes, fmt)
        return self.op("DequantizeLinear", [stored, self.scale(scale)], axis=1 - int(transposed))

    def two_level(self, codes: str, scales: str, unit: str, axis: int, typed: bool = False) -> str:
        """NVFP4's DequantizeLinear on DequantizeLinear, in the base type."""
        step = self.op("DequantizeLinear", [scales, unit])
        attrs = {"output_dtype": ONNX_TYPE[self.base]} if typed else {}
        wide = self.op("DequantizeLinear", [codes, step], axis=axis, block_size=16, **attrs)
        if typed or self.base == "fp32":
            return wide
        return self.op("Cast", [wide], to=ONNX_TYPE[self.base])

    def nvfp4(self, w: Array, transposed: bool, typed: bool = False) -> str:
        unit = np.float32(np.abs(w).max() / (6 * 448))
        scale = (np.abs(w.reshape(-1, 16, self.n)).max(1) / 6 / unit).astype(E4M3)
        codes = (w / np.repeat(scale.astype(np.float32) * unit, 16, 0)).astype(E2M1)
        if transposed:
            codes, scale = np.ascontiguousarray(codes.T), np.ascontiguousarray(scale.T)
        stored = self.stored(codes, TensorProto.FLOAT4E2M1)
        scales = self.stored(scale, TensorProto.FLOAT8E4M3FN)
        return self.two_level(stored, scales, self.constant(unit, "fp32"), int(transposed), typed)

    def mxfp8(self, w: Array, transposed: bool) -> str:
        exponent = np.ceil(np.log2(np.abs(w.reshape(-1, 32, self.n)).max(1) / 448))
        codes = (w / np.repeat(2.0**exponent, 32, 0)).astype(E4M3)
        scale = (exponent + 127).astype(np.uint8)
        if transposed:
            codes, scale = np.ascontiguousarray(codes.T), np.ascontiguousarray(scale.T)
        stored = self.stored(codes, TensorProto.FLOAT8E4M3FN)
        out = f"expanded_{len(self.nodes)}"
        self.trt(
            "TRT_MXFP8DequantizeLinear",
            [stored, self.stored(scale, TensorProto.UINT8)],
            [out],
            axis=int(transposed),
            block_size=32,
            output_dtype=ONNX_TYPE[self.base],
        )
        return out

    def fp4_activation(self, x: str, unit: float) -> str:
        whole = self.constant(unit, "fp32")
        self.trt(
            "TRT_FP4DynamicQuantize",
            [x, whole],
            ["x_codes", "x_scales"],
            axis=-1,
            block_size=16,
            scale_type=TensorProto.FLOAT8E4M3FN,
        )
        return self.two_level("x_codes", "x_scales", whole, -1)

    def mx_activation(self, x: str) -> str:
        self.trt(
            "TRT_MXFP8DynamicQuantize",
            [x],
            ["x_codes", "x_scales"],
            axis=-1,
            block_size=32,
            output_dtype=TensorProto.FLOAT8E4M3FN,
        )
        self.trt(
            "TRT_MXFP8DequantizeLinear",
            ["x_codes", "x_scales"],
            ["x_again"],
            axis=-1,
            block_size=32,
            output_dtype=ONNX_TYPE[self.base],
        )
        return "x_again"

    def finish(self, outputs: list[str], wanted: str, gemm: bool, static_shapes: bool) -> Narrow:
        x: list[int | str] = ["M", self.k] if gemm else ["B", "S", self.k]
        if static_shapes:
            x = [32, self.k] if gemm else [2, 48, self.k]
        model = self.model({"x": (self.base, x)}, {y: [*x[:-1], self.n] for y in outputs})
        if self.own:
            model.opset_import.add(domain="trt", version=1)
        model.ir_version = 11 if self.opset >= 23 else 10
        k = self.k
        shapes = [f"x:1x{k},16x{k},64x{k}" if gemm else f"x:1x1x{k},2x32x{k},4x64x{k}"]
        nodes = [WeightedNode(f"/product_{i}", "gemm", wanted) for i in range(len(outputs))]
        return Narrow(model, nodes, [] if static_shapes else shapes, kept=self.kept)


def narrow(
    weight: str,
    activation: str = "none",
    *,
    base: str = "fp16",
    block: int = 64,
    k: int = K,
    n: int = N,
    gemm: bool = False,
    transposed: bool = False,
    dynamic: bool = False,
    consumers: int = 1,
    bias: bool = False,
    scale_base: str | None = None,
    shared: bool = True,
    direct: bool = False,
    typed: bool = False,
    static_shapes: bool = False,
) -> Narrow:
    """x [B, S, K] (or [M, K] for Gemm) times one or several weights.

    Args:
        weight, activation: int4, int8, fp8, nvfp4, mxfp8; `none` leaves the activation.
        transposed: the weight is [N, K]: Gemm with transB, or MatMul behind a Transpose.
        dynamic: activations under a scale computed per token.
        scale_base: INT4 scales of another type than x, and a Cast behind.
        shared: W4A8: one scale of 8 bits for all consumers, and a power of two a channel behind.
        direct: W4A8: no step of 8 bits between the INT4 codes and the product.
        typed: NVFP4: `output_dtype` instead of a Cast.
    """
    blocks = {"nvfp4", "mxfp8"} & {weight, activation}
    g = Blocks(base, 23 if blocks else 21, k, n)
    x, factors = "x", []
    if dynamic:
        m = amax(g, "x", [-1])
        x, factors = g.op("Div", ["x", m]), [m]
    peak = 1.0 if dynamic else 4.0
    if activation in QMAX:
        x = g.quantized(x, activation, peak / QMAX[activation])
    elif activation == "nvfp4":
        x = g.fp4_activation(x, peak / (6 * 448))
    elif activation == "mxfp8":
        x = g.mx_activation(x)
    outputs = []
    for index in range(consumers):
        w = g.weights(index)
        behind = list(factors)
        if weight == "int4":
            d = g.int4(w, block, transposed, scale_base)
            if scale_base:
                d = g.op("Cast", [d], to=ONNX_TYPE[base])
        elif weight == "nvfp4":
            d = g.nvfp4(w, transposed, typed)
        elif weight == "mxfp8":
            d = g.mxfp8(w, transposed)
        else:
            d = g.per_channel(w, weight, transposed)
        if weight == "int4" and activation != "none" and not direct:
            d = g.quantized(d, activation, 2.0**-9 * (1 if shared else 1 + index))
            behind = [g.constant(g.random.choice([1.0, 2.0, 4.0], n)), *factors]
        if gemm:
            product = g.op("Gemm", [x, d], f"product_{index}", transB=int(transposed))
        else:
            d = g.op("Transpose", [d], perm=[1, 0]) if transposed else d
            product = g.op("MatMul", [x, d], f"product_{index}")
        for factor in behind:
            product = g.op("Mul", [product, factor])
        if bias:
            product = g.op("Add", [product, g.constant(np.ones(n))])
        outputs.append(product)
    word = {"nvfp4": "fp4"}.get(weight, weight)
    wanted = {"none": f"{word} weights", "nvfp4": "fp4", "mxfp8": "fp8"}
    return g.finish(outputs, wanted.get(activation, activation), gemm, static_shapes)


def convolution(fmt: str) -> Form:
    """FP16 x and a weight of 8 bits: what no convolution has a kernel for."""
    g = Blocks("fp16", 21, 16, 32)
    w = g.random.normal(size=(32, 16, 3, 3)).astype(np.float32)
    codes: Array = w / (np.abs(w).max() / QMAX[fmt])
    codes = np.rint(codes).astype(np.int8) if fmt == "int8" else codes.astype(E4M3)
    scale = g.scale(np.full(32, 0.01))
    d = g.op("DequantizeLinear", [g.codes(codes, fmt), scale], axis=0)
    g.op("Conv", ["x", d], "product_0", pads=[1] * 4)
    g.op("Identity", ["product_0"], "y0")
    model = g.model({"x": ("fp16", [2, 16, 8, 8])}, {"y0": [2, 32, 8, 8]})
    return Form(model, [WeightedNode("/product_0", "conv", f"{fmt} weights")], [])


def saved(form: Form) -> onnx.ModelProto:
    """The model, checked as far as onnx knows its operators."""
    onnx.checker.check_model(form.model)
    return form.model
