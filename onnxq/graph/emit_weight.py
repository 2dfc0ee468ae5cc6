"""Weights as their codes: the DequantizeLinear forms TensorRT reads, one for each kind of scale.

one, or one a channel or block   codes -> DQ(scale)
NVFP4                            block scales in E4M3 -> DQ(scale of the tensor)
                                 codes -> DQ(those, in blocks of 16) -> Cast to the type of x
MXFP8                            codes, scales as E8M0 bytes -> TRT_MXFP8DequantizeLinear

All of it is computed when the model is written: what is kept until then is how, not what.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.formats import Granularity, PerBlock, PerTensor, QuantFormat, dtype_named
from onnxq.graph.dtypes import Array, graph_dtype, onnx_dtype
from onnxq.graph.edit import Editor
from onnxq.graph.query import ConstantOperand
from onnxq.numerics import scale_shape

TENSORRT = "trt"
"""The domain of TensorRT's own operators."""

_E8M0 = "float8_e8m0fnu"


@dataclass(frozen=True, eq=False)
class CodedWeight:
    """A weight as it will be stored; written once for all layers that are given the same object.

    Attributes:
        granularity: of the scales that DequantizeLinear gets.
        scale_type: their dtype.
        codes: gives the codes, laid out as the node sees the weight, when they are written.
        scale: those scales, or what gives them when they are written.
        unit: gives the scale of the tensor, for formats of two levels.
        zero: gives the zero points, shaped like the scales, of asymmetric formats.
        behind: what the product is to be multiplied by, a number or one a channel.
        expanded: a format of 8 bits, and its scale, that the weight is quantized to once more
            before it is multiplied.
    """

    format: QuantFormat
    granularity: Granularity
    scale_type: str
    codes: Callable[[], Array]
    scale: Array | Callable[[], Array]
    unit: Callable[[], Array] | None = None
    zero: Callable[[], Array] | None = None
    behind: Any = None
    expanded: tuple[QuantFormat, Any] | None = None


def dequantized(
    editor: Editor, operand: ConstantOperand, coded: CodedWeight, dtype: Any, like: gs.Node
) -> gs.Tensor:
    """The weight in the type `dtype` of the activations, behind the nodes that dequantize it."""
    if coded.scale_type == _E8M0:
        return _mx(editor, operand, coded, dtype, like)
    name, shape = operand.constant.name, operand.shape
    scale = _scale(editor, operand, coded)
    made = coded.scale_type
    if coded.unit is not None:
        made = "float32"
        unit = editor.derived(f"{name}_unit", onnx_dtype(np.float32), (), coded.unit)
        scale = editor.node(
            "DequantizeLinear",
            f"{name}_scale_DequantizeLinear",
            [scale, unit],
            f"{name}_scale_dequantized",
            np.dtype(np.float32),
            scale_shape(shape, coded.granularity),
            like,
        )
    out = editor.node(
        "DequantizeLinear",
        f"{name}_DequantizeLinear",
        [_codes(editor, operand, coded), scale, *_zeros(editor, operand, coded)],
        f"{name}_dequantized",
        graph_dtype(onnx_dtype(dtype_named(made))),
        shape,
        like,
        **_where(coded.granularity),
    )
    if np.dtype(dtype).name == made:
        return out
    number = onnx_dtype(dtype)
    return editor.node(
        "Cast", f"{name}_Cast", [out], f"{name}_cast", graph_dtype(number), shape, like, to=number
    )


def _mx(
    editor: Editor, operand: ConstantOperand, coded: CodedWeight, dtype: Any, like: gs.Node
) -> gs.Tensor:
    """TensorRT imports no E8M0 tensor: the scales are bytes to it."""
    name, number = operand.constant.name, onnx_dtype(dtype)
    scale = _scale(editor, operand, coded)
    return editor.node(
        "TRT_MXFP8DequantizeLinear",
        f"{name}_DequantizeLinear",
        [_codes(editor, operand, coded), scale],
        f"{name}_dequantized",
        graph_dtype(number),
        operand.shape,
        like,
        domain=TENSORRT,
        output_dtype=number,
        **_where(coded.granularity),
    )


def _codes(editor: Editor, operand: ConstantOperand, coded: CodedWeight) -> gs.Constant:
    fmt = coded.format
    number = int(getattr(onnx.TensorProto, fmt.onnx_type))
    name = f"{operand.constant.name}_{fmt.name}"
    return editor.derived(name, number, operand.shape, coded.codes)


def _zeros(editor: Editor, operand: ConstantOperand, coded: CodedWeight) -> list[gs.Constant]:
    if coded.zero is None:
        return []
    number = int(getattr(onnx.TensorProto, coded.format.onnx_type))
    shape = scale_shape(operand.shape, coded.granularity)
    return [editor.derived(f"{operand.constant.name}_zero", number, shape, coded.zero)]


def _scale(editor: Editor, operand: ConstantOperand, coded: CodedWeight) -> gs.Constant:
    name, given = f"{operand.constant.name}_scale", coded.scale
    if not callable(given):
        return editor.constant(name, given)
    shape = scale_shape(operand.shape, coded.granularity)
    if coded.scale_type == _E8M0:
        return editor.derived(name, onnx.TensorProto.UINT8, shape, lambda: given().view(np.uint8))
    return editor.derived(name, onnx_dtype(dtype_named(coded.scale_type)), shape, given)


def _where(granularity: Granularity) -> dict[str, Any]:
    if isinstance(granularity, PerTensor):
        return {}
    if isinstance(granularity, PerBlock):
        return {"axis": granularity.axis, "block_size": granularity.size}
    return {"axis": granularity.axis}
