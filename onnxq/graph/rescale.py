"""Constants multiplied by factors when they are read or written; nothing is loaded before.

A rescaled constant is a new one: codes made of the old one later (weights are quantized while the
model is written) still find what they were computed for.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.graph.dtypes import numpy_dtype, to_bytes
from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.query import ConstantOperand, constant_operand, label, type_number
from onnxq.graph.scaling import Scaling, padded, peaks
from onnxq.graph.weights import (
    Array,
    DerivedValues,
    InlineValues,
    constant_type,
    payload_bytes,
)
from onnxq.graph.wire import STRIP_THRESHOLD
from onnxq.products import Factors

FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)


class ScaledValues(DerivedValues):
    """A large rescaled constant. Quantization reads its float32 values, before 16 bits round them.

    Args:
        name, onnx_type: of the constant.
    """

    def __init__(self, name: str, onnx_type: int, scaling: Scaling) -> None:
        origin = None
        if onnx_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            origin = gs.Constant(name, ScaledValues(name, onnx.TensorProto.FLOAT, scaling))
        super().__init__(
            name, onnx_type, scaling.shape, lambda: _typed(name, onnx_type, scaling), origin
        )
        self.scaling = scaling


class ScaledInline(InlineValues):
    """A small rescaled constant: its bytes stay in the graph."""

    def __init__(self, name: str, onnx_type: int, scaling: Scaling) -> None:
        tensor = onnx.TensorProto(name=name, data_type=onnx_type, dims=scaling.shape)
        tensor.raw_data = bytes(to_bytes(_typed(name, onnx_type, scaling), onnx_type))
        super().__init__(tensor)
        self.scaling = scaling


def _typed(name: str, onnx_type: int, scaling: Scaling) -> Array:
    wide, dtype = scaling.compute(), numpy_dtype(onnx_type)
    if wide.dtype == dtype:
        return wide
    with np.errstate(over="ignore"):
        values = wide.astype(dtype)
    if not np.array_equal(np.isfinite(values), np.isfinite(wide)):
        raise OnnxqError(
            f"weight {name!r} leaves the range of its type when it is rescaled",
            "rescale by less: Fold.bounds gives the limits",
        )
    return values


def is_rescaled(constant: gs.Constant) -> bool:
    """Whether a constant is another one multiplied by factors."""
    return isinstance(getattr(constant._values, "scaling", None), Scaling)


def source(constant: gs.Constant) -> gs.Constant:
    """The constant that one is a mere cast of; itself if it is none."""
    values = constant._values
    if isinstance(values, DerivedValues) and values.origin is not None:
        return constant if is_rescaled(constant) else values.origin
    return constant


def check_float(node: gs.Node, index: int) -> str:
    """Why the constant behind an input cannot be rescaled; '' where it can."""
    operand = constant_operand(node, index)
    if operand is None:
        return f"input {index} of {node.op} {label(node)!r} is no constant of floats"
    if constant_type(operand.constant) not in FLOATS:
        word = onnx.TensorProto.DataType.Name(constant_type(operand.constant))
        return f"{operand.constant.name!r} holds {word} values"
    return ""


def rescale(editor: Editor, node: gs.Node, index: int, factor: Factors) -> str:
    """Multiply the constant behind an input by `factor`, for this input alone.

    A constant that nothing else reads keeps its name and place; otherwise this input gets a copy.

    Args:
        factor: broadcast against the constant as the node sees it.

    Returns:
        The name of the copy; '' where none was needed.

    Raises:
        OnnxqError: there is no constant of floats.
    """
    reason = check_float(node, index)
    operand = constant_operand(node, index)
    if reason or operand is None:
        raise OnnxqError(f"{reason}: it cannot be rescaled", "rescale before weights are quantized")
    shape = np.broadcast_shapes(operand.shape, factor.shape)
    own = is_own(editor.model, node, index, operand)
    if not own or shape != operand.shape:
        scaling = Scaling.of(operand.constant).transposed(operand.permutation).times(factor)
        onnx_type = type_number(node.inputs[index]) or constant_type(operand.constant)
        keeps_name = own and not operand.through
        name = operand.constant.name if keeps_name else _copy_name(editor, operand.constant.name)
        editor.replace_input(node, index, _constant(name, onnx_type, scaling))
        return "" if keeps_name else name
    if operand.permutation is not None:
        back = tuple(int(i) for i in np.argsort(operand.permutation))
        factor = factor.reshape(padded(factor.shape, len(back))).transpose(back)
    scaling = Scaling.of(operand.constant).times(factor)
    new = _constant(operand.constant.name, constant_type(operand.constant), scaling)
    if operand.through:
        editor.replace_input(operand.through[0], 0, new)
    else:
        editor.replace_input(node, index, new)
    return ""


def _copy_name(editor: Editor, name: str) -> str:
    return editor.unique(f"{name.removesuffix('_folded')}_folded")


def _constant(name: str, onnx_type: int, scaling: Scaling) -> gs.Constant:
    small = payload_bytes(onnx_type, scaling.shape) < STRIP_THRESHOLD
    values: Any = (ScaledInline if small else ScaledValues)(name, onnx_type, scaling)
    return gs.Constant(name, values)


def is_own(model: Model, node: gs.Node, index: int, operand: ConstantOperand) -> bool:
    """Whether nothing but this input reads the constant, or any node on the way to it."""
    kept = model.captured_names() | {t.name for t in model.graph.outputs}
    tensors = [operand.constant, *(t for n in operand.through for t in n.outputs)]
    if any(t.name in kept for t in tensors):
        return False
    return all(len(t.outputs) == 1 for t in tensors)


def largest(operand: ConstantOperand, index: NDArray[np.int64], size: int) -> Factors:
    """max |value| for each channel.

    Args:
        index: the channel of each value, broadcast against the operand; -1 for none.
        size: how many channels there are.

    Returns:
        float64 [size]; 0 for channels that no value has, NaN for those with one.
    """
    rank = len(operand.shape)
    index = index.reshape(padded(index.shape, rank))
    kept = tuple(d > 1 for d in index.shape[index.ndim - rank :])
    found = np.broadcast_to(peaks(operand, kept), index.shape)
    out = np.zeros(size + 1)
    with np.errstate(invalid="ignore"):  # NaN is the result then
        np.maximum.at(out, index.reshape(-1), found.reshape(-1))
    return out[:size]
