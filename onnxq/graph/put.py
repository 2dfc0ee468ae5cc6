"""Another weight in the place of one, in the same type."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.graph.dtypes import Array, numpy_dtype, payload_bytes, to_bytes
from onnxq.graph.edit import Editor
from onnxq.graph.query import constant_operand, type_number
from onnxq.graph.rescale import is_own
from onnxq.graph.weights import DerivedValues, InlineValues, constant_type
from onnxq.graph.wire import STRIP_THRESHOLD


def put_weight(editor: Editor, node: gs.Node, index: int, values: Callable[[], Array]) -> None:
    """Let input `index` of `node` be `values()`, computed when the model is written.

    A constant that nothing else reads keeps its name and place; otherwise this input gets one of
    its own.

    Args:
        values: gives the weight as the node sees it.
    """
    operand = constant_operand(node, index)
    assert operand is not None
    if not is_own(editor.model, node, index, operand):
        name = editor.unique(f"{operand.constant.name}_pruned")
        kind = type_number(node.inputs[index]) or constant_type(operand.constant)
        editor.replace_input(node, index, _constant(name, kind, operand.shape, values))
        return
    back = None if operand.permutation is None else tuple(np.argsort(operand.permutation))
    shape = tuple(int(d) for d in operand.constant.shape)

    def laid_out() -> Array:
        found = values()
        return found if back is None else found.transpose(back)

    new = _constant(operand.constant.name, constant_type(operand.constant), shape, laid_out)
    if operand.through:
        editor.replace_input(operand.through[0], 0, new)
    else:
        editor.replace_input(node, index, new)


def _constant(
    name: str, kind: int, shape: tuple[int, ...], values: Callable[[], Array]
) -> gs.Constant:
    def typed() -> Array:
        return values().astype(numpy_dtype(kind))

    if payload_bytes(kind, shape) >= STRIP_THRESHOLD:
        return gs.Constant(name, DerivedValues(name, kind, shape, typed))
    tensor = onnx.TensorProto(
        name=name, data_type=kind, dims=shape
    )  # inference looks at small ones
    tensor.raw_data = bytes(to_bytes(typed(), kind))
    return gs.Constant(name, InlineValues(tensor))
