"""Constant nodes into initializers, so that weights read alike wherever the exporter put them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from onnxq.report import Edit

if TYPE_CHECKING:
    from onnxq.graph.model import Model


def hoist_constants(model: Model, only: Callable[[gs.Node], bool] = lambda n: True) -> list[Edit]:
    """Turn Constant nodes of the main graph into initializers, so that they read alike."""
    edits = []
    for node in model.graph.nodes:
        if node.op != "Constant" or not only(node) or len(node.outputs) != 1:
            continue
        value = node.attrs.get("value")
        if not isinstance(value, gs.Constant):
            continue
        old = node.outputs[0]
        if any(t is old for t in model.graph.outputs):
            continue
        node.outputs.clear()
        values = value._values
        values.tensor.name = old.name
        new = gs.Constant(old.name, values)
        _replace_everywhere(old, new)
        edits.append(Edit("load", "hoist", old.name, "Constant node into an initializer"))
        node.op = "onnxq::dead"
    model.graph.nodes = [n for n in model.graph.nodes if n.op != "onnxq::dead"]
    return edits


def _replace_everywhere(old: gs.Tensor, new: gs.Tensor) -> None:
    for consumer in list(old.outputs):
        for index, tensor in enumerate(consumer.inputs):
            if tensor is old:
                consumer.inputs[index] = new
