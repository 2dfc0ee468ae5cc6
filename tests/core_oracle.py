"""What onnx itself says: its reference evaluator, and nothing of the code under test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from onnx import helper as h
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

Array = NDArray[Any]
CODES = {
    "int8": TensorProto.INT8,
    "fp8": TensorProto.FLOAT8E4M3FN,
    "int4": TensorProto.INT4,
    "uint4": TensorProto.UINT4,
    "nvfp4": TensorProto.FLOAT4E2M1,
    "mxfp8": TensorProto.FLOAT8E4M3FN,
}


def quantize_linear(x: Array, scale: Array, fmt: str, axis: int = 1) -> Array:
    """QuantizeLinear with a zero point of 0, of the format's type."""
    node = h.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], axis=axis)
    zero = h.make_tensor("z", CODES[fmt], np.shape(scale), np.zeros(np.size(scale)))
    return _run(node, {"x": x, "s": np.asarray(scale)}, zero)


def dequantize_linear(codes: Array, scale: Array, axis: int = 1, block: int = 0) -> Array:
    """DequantizeLinear without a zero point."""
    attrs = {"axis": axis, **({"block_size": block} if block else {})}
    node = h.make_node("DequantizeLinear", ["x", "s"], ["y"], **attrs)
    return _run(node, {"x": codes, "s": np.asarray(scale)})


def evaluate(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """Outputs of a whole model, each operator computed in the type the file gives it.

    ONNX Runtime's CPU computes chains of FP16 operators in FP32, where nothing overflows.
    """
    with np.errstate(all="ignore"):
        found = ReferenceEvaluator(model, new_ops=TENSORRT).run(None, dict(feeds))
        return [np.asarray(v) for v in found]


def in_blocks(x: Array, axis: int, size: int) -> Array:
    """Largest magnitude of each block along `axis`, repeated for each element."""
    rows = np.moveaxis(np.abs(x.astype(np.float32)), axis, -1)
    parts = [rows[..., i : i + size] for i in range(0, rows.shape[-1], size)]
    peaks = [np.broadcast_to(p.max(-1, keepdims=True), p.shape) for p in parts]
    return np.moveaxis(np.concatenate(peaks, -1), -1, axis)


def e4m3(x: Array) -> Array:
    return np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)


class TRT_FP4DynamicQuantize(OpRun):  # type: ignore[misc]  # noqa: N801
    """TensorRT's operator: scales of blocks of 16 in E4M3, counted in `unit`; codes in E2M1."""

    op_domain = "trt"

    def _run(self, x: Array, unit: Array, axis: int, block_size: int, scale_type: int) -> Any:
        assert (axis, block_size, scale_type) == (-1, 16, TensorProto.FLOAT8E4M3FN)
        assert unit.dtype == np.float32 and unit.shape == ()
        scale = e4m3(in_blocks(x, -1, 16) / np.float32(6) / unit)
        step = scale.astype(np.float32) * unit
        quotients = np.divide(x, step, out=np.zeros_like(step), where=step > 0)
        return np.clip(quotients, -6, 6).astype(ml_dtypes.float4_e2m1fn), scale[..., ::16]


class TRT_MXFP8DynamicQuantize(OpRun):  # type: ignore[misc]  # noqa: N801
    """TensorRT's operator: the power of two at or above amax / 448, for blocks of 32."""

    op_domain = "trt"

    def _run(self, x: Array, axis: int, block_size: int, output_dtype: int) -> Any:
        assert (axis, block_size, output_dtype) == (-1, 32, TensorProto.FLOAT8E4M3FN)
        peak = np.maximum(in_blocks(x, -1, 32).astype(np.float64) / 448, 2.0**-127)
        exponent = np.ceil(np.log2(peak))
        codes = e4m3((x.astype(np.float64) / 2.0**exponent).astype(np.float32))
        return codes, (exponent[..., ::32] + 127).astype(np.uint8)


class TRT_MXFP8DequantizeLinear(OpRun):  # type: ignore[misc]  # noqa: N801
    op_domain = "trt"

    def _run(
        self, codes: Array, scale: Array, axis: int, block_size: int, output_dtype: int
    ) -> Any:
        assert block_size == 32 and scale.dtype == np.uint8
        steps = 2.0 ** (np.repeat(scale.astype(np.float64), 32, axis) - 127)
        dtype = h.tensor_dtype_to_np_dtype(output_dtype)
        return ((codes.astype(np.float64) * steps).astype(dtype),)


TENSORRT = [TRT_FP4DynamicQuantize, TRT_MXFP8DynamicQuantize, TRT_MXFP8DequantizeLinear]


def _run(node: onnx.NodeProto, feeds: Mapping[str, Array], *constants: onnx.TensorProto) -> Array:
    untyped = [onnx.ValueInfoProto(name=name) for name in (*feeds, *node.output)]
    graph = h.make_graph([node], "g", untyped[:-1], untyped[-1:], list(constants))
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 23)])
    return evaluate(model, feeds)[0]
