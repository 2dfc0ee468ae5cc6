"""Activations in blocks: TensorRT computes the scales, by operators of its own.

NVFP4   x -> TRT_FP4DynamicQuantize(scale of the tensor) -> codes of 4 bits, scales in E4M3;
        DQ of the scales, DQ of the codes in blocks of 16, Cast back to the type of x
MXFP8   x -> TRT_MXFP8DynamicQuantize -> codes of 8 bits, scales in E8M0; TRT_MXFP8DequantizeLinear
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.formats import QuantFormat
from onnxq.graph.dtypes import graph_dtype, onnx_dtype, value_dtype
from onnxq.graph.edit import Editor
from onnxq.graph.emit_weight import TENSORRT

_FP32 = np.dtype(np.float32)


def fp4_blocks(
    editor: Editor, tensor: gs.Tensor, fmt: QuantFormat, unit: float, like: gs.Node
) -> gs.Tensor:
    """`tensor` as its NVFP4 codes stand for it.

    Args:
        unit: what the largest scale of a block is counted in.
    """
    name, kind = tensor.name, onnx.TensorProto.FLOAT8E4M3FN
    whole = editor.constant(f"{name}_unit", np.array(unit, np.float32))
    codes, scales = _quantized(
        editor, tensor, fmt, kind, [tensor, whole], "TRT_FP4DynamicQuantize", like, scale_type=kind
    )
    step = editor.node(
        "DequantizeLinear",
        f"{name}_scale_DequantizeLinear",
        [scales, whole],
        f"{name}_scale_dequantized",
        _FP32,
        None,
        like,
    )
    out = editor.node(
        "DequantizeLinear",
        f"{name}_DequantizeLinear",
        [codes, step],
        f"{name}_dequantized",
        _FP32,
        tensor.shape,
        like,
        axis=-1,
        block_size=fmt.block,
    )
    number = onnx_dtype(value_dtype(tensor.dtype))
    if number == onnx.TensorProto.FLOAT:
        return out
    return editor.node(
        "Cast", f"{name}_Cast", [out], f"{name}_cast", tensor.dtype, tensor.shape, like, to=number
    )


def mx_blocks(editor: Editor, tensor: gs.Tensor, fmt: QuantFormat, like: gs.Node) -> gs.Tensor:
    """`tensor` as its MXFP8 codes stand for it."""
    number = int(getattr(onnx.TensorProto, fmt.onnx_type))
    codes, scales = _quantized(
        editor,
        tensor,
        fmt,
        onnx.TensorProto.UINT8,
        [tensor],
        "TRT_MXFP8DynamicQuantize",
        like,
        output_dtype=number,
    )
    return editor.node(
        "TRT_MXFP8DequantizeLinear",
        f"{tensor.name}_DequantizeLinear",
        [codes, scales],
        f"{tensor.name}_dequantized",
        tensor.dtype,
        tensor.shape,
        like,
        domain=TENSORRT,
        axis=-1,
        block_size=fmt.block,
        output_dtype=onnx_dtype(value_dtype(tensor.dtype)),
    )


def _quantized(
    editor: Editor,
    tensor: gs.Tensor,
    fmt: QuantFormat,
    scale_number: int,
    inputs: list[gs.Tensor],
    op: str,
    like: gs.Node,
    **attrs: int,
) -> tuple[gs.Tensor, gs.Tensor]:
    """Codes and scales of `tensor` in blocks along its last axis."""
    number = int(getattr(onnx.TensorProto, fmt.onnx_type))
    codes = editor.variable(f"{tensor.name}_quantized", graph_dtype(number), tensor.shape)
    scales = editor.variable(f"{tensor.name}_scales", graph_dtype(scale_number), None)
    attrs = {"axis": -1, "block_size": fmt.block, **attrs}
    node = gs.Node(op, f"{tensor.name}_{op}", attrs, inputs, [codes, scales], domain=TENSORRT)
    editor.add(node, like)
    return codes, scales
