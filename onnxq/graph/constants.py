"""Constant nodes into initializers, so that weights read alike wherever the exporter put them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.graph.reading import can_hoist
from onnxq.graph.weights import InlineValues, Values
from onnxq.report import Edit

if TYPE_CHECKING:
    from onnxq.graph.model import Model

# Attribute -> its type, the field it is in, and the dtype it stands for.
_NUMBERS = {
    "value_float": (onnx.AttributeProto.FLOAT, "f", np.float32),
    "value_floats": (onnx.AttributeProto.FLOATS, "floats", np.float32),
    "value_int": (onnx.AttributeProto.INT, "i", np.int64),
    "value_ints": (onnx.AttributeProto.INTS, "ints", np.int64),
}


def hoist_constants(model: Model, only: Callable[[gs.Node], bool] = lambda n: True) -> list[Edit]:
    """Turn Constant nodes of the main graph into initializers, so that they read alike.

    Those whose output is an output of the graph stay, and those of strings or sparse values.
    """
    outputs = {t.name for t in model.graph.outputs}
    hoisted: list[gs.Node] = []
    for node in model.graph.nodes:
        origin = model.origins.get(id(node))
        if origin is None or not can_hoist(origin, outputs) or not only(node):
            continue
        values = _values(node, origin)
        if values is not None:
            model.initializers[origin.output[0]] = _hoist(node, values)
            hoisted.append(node)
    if not hoisted:
        return []
    gone = {id(node) for node in hoisted}
    model.graph.nodes = [n for n in model.graph.nodes if id(n) not in gone]
    what = f"{len(hoisted)} Constant nodes" if len(hoisted) > 1 else "1 Constant node"
    return [Edit("load", "hoist", what, "into initializers")]


def _values(node: gs.Node, origin: onnx.NodeProto) -> Values | None:
    """What the node gives, or None for strings and sparse values."""
    value = node.attrs.get("value")
    if isinstance(value, gs.Constant):
        return value._values if isinstance(value._values, Values) else None
    for attribute in origin.attribute:
        kind, field, dtype = _NUMBERS.get(attribute.name, (None, "", None))
        if attribute.type == kind:
            content = np.asarray(getattr(attribute, field), dtype)
            return InlineValues(onnx.numpy_helper.from_array(content))
    return None


def _hoist(node: gs.Node, values: Values) -> gs.Constant:
    """The node's output as a constant that its readers read instead."""
    old = node.outputs[0]
    node.outputs.clear()
    constant = gs.Constant(old.name, values)
    for consumer in list(old.outputs):
        for index, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[index] = constant
    return constant
