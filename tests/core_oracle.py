"""What onnx itself says: its reference evaluator, and nothing of the code under test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto
from onnx import helper as h
from onnx.reference import ReferenceEvaluator

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
        return [np.asarray(v) for v in ReferenceEvaluator(model).run(None, dict(feeds))]


def _run(node: onnx.NodeProto, feeds: Mapping[str, Array], *constants: onnx.TensorProto) -> Array:
    untyped = [onnx.ValueInfoProto(name=name) for name in (*feeds, *node.output)]
    graph = h.make_graph([node], "g", untyped[:-1], untyped[-1:], list(constants))
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 23)])
    return evaluate(model, feeds)[0]
