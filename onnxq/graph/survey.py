"""A model made ready to be looked at, as far as it can be: for reading only, it never refuses."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_graphsurgeon as gs

from onnxq.errors import OnnxqError
from onnxq.graph.constants import hoist_constants
from onnxq.graph.edit import is_sorted, sort_nodes
from onnxq.graph.exporting import value_types
from onnxq.graph.model import Model
from onnxq.graph.names import bodies, captured
from onnxq.graph.prepare import infer_types, inline_functions
from onnxq.graph.query import label
from onnxq.graph.weights import InlineValues


def survey(model: Model) -> tuple[Model, list[str]]:
    """Functions inlined, Constant nodes hoisted, nodes sorted, shapes inferred.

    Returns:
        The model to look at, and what could not be done, for people.
    """
    notes = []
    if model.header.functions:
        try:
            model, _ = inline_functions(model)
        except OnnxqError as error:
            notes.append(f"its functions were not looked into: {error.message}")
    hoist_constants(model)
    if not is_sorted(model):
        sort_nodes(model)
    try:
        infer_types(model)
    except OnnxqError as error:
        notes.append(f"{error.message}; rules that need shapes say less")
    return model, notes


def body_models(model: Model) -> Iterator[tuple[str, Model]]:
    """The bodies of If, Loop and Scan, each as a model of its own, and the node each is part of.

    What a body reads from outside is an input of it, or a constant where it is a small one.
    """
    pairs = [(n, model.origins[id(n)]) for n in model.graph.nodes if id(n) in model.origins]
    with_bodies = [(n, origin) for n, origin in pairs if any(True for _ in bodies(origin))]
    types = value_types(model) if with_bodies else {}
    outer = {**model.graph.tensors(), **model.initializers} if with_bodies else {}
    for node, origin in with_bodies:
        for body in bodies(origin):
            proto = onnx.ModelProto(ir_version=model.header.ir_version)
            proto.opset_import.extend(model.header.opset_import)
            proto.graph.CopyFrom(body)
            for name in sorted(captured(origin)):
                _give(proto.graph, name, outer.get(name), types)
            try:
                yield f"{node.op} {label(node)!r}", Model.from_proto(proto, model.path)
            except OnnxqError:
                continue


def _give(
    graph: onnx.GraphProto,
    name: str,
    tensor: gs.Tensor | None,
    types: dict[str, onnx.ValueInfoProto],
) -> None:
    """Let the body's graph know a tensor from outside."""
    if isinstance(tensor, gs.Constant) and isinstance(tensor._values, InlineValues):
        graph.initializer.add().CopyFrom(tensor._values.tensor)
        graph.initializer[-1].name = name
    elif name in types:
        graph.input.add().CopyFrom(types[name])
    else:
        graph.input.add(name=name)
