"""A few nodes of a graph as a model of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import onnx

from onnxq.graph.reading import is_external
from onnxq.graph.wire import STRIP_THRESHOLD

IR_VERSION = 8
"""Of the excerpts; onnx's converter refuses old ones."""

Types = MutableMapping[str, onnx.TypeProto]
Constants = MutableMapping[str, onnx.TensorProto]


def is_standard(node: onnx.NodeProto) -> bool:
    """Whether the node's operator is one of ONNX's own domain."""
    return node.domain in ("", "ai.onnx")


def types_of(graph: onnx.GraphProto) -> Types:
    """Types of the graph's tensors."""
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {v.name: v.type for v in values if v.type.HasField("tensor_type")}
    for tensor in graph.initializer:
        info = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        types[tensor.name] = info.type
    return types


def small_constants(graph: onnx.GraphProto) -> Constants:
    """Constants an adapter may want to read: small and inline, in whatever form."""
    tensors = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and is_standard(node) and len(node.output) == 1:
            tensors.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return {
        name: tensor
        for name, tensor in tensors.items()
        if not is_external(tensor) and tensor.ByteSize() <= 2 * STRIP_THRESHOLD
    }


def excerpt(
    nodes: list[onnx.NodeProto],
    types: Mapping[str, onnx.TypeProto],
    constants: Mapping[str, onnx.TensorProto],
    opset: int,
) -> onnx.ModelProto:
    """Just these nodes; what they read from elsewhere are inputs and initializers."""
    small = onnx.ModelProto(ir_version=IR_VERSION)
    small.opset_import.add(version=opset)
    small.graph.name = "nodes"
    for node in nodes:
        added = small.graph.node.add(name=node.name, op_type=node.op_type, input=node.input)
        added.output.extend(node.output)
        added.attribute.extend(node.attribute)
    made = {name: None for node in nodes for name in node.output if name}
    read = {name: None for node in nodes for name in node.input if name and name not in made}
    for name in read:
        if name in constants:
            small.graph.initializer.add().CopyFrom(constants[name])
            small.graph.initializer[-1].name = name
    known = {n: onnx.ValueInfoProto(name=n, type=types.get(n)) for n in (*read, *made)}
    _add_inputs(small.graph, [n for n in read if n not in constants], known.values())
    small.graph.output.extend(known[name] for name in made)
    return small


def only(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.ModelProto:
    """One node of an excerpt: what the others made is an input."""
    alone = onnx.ModelProto()
    alone.CopyFrom(model)
    alone.graph.ClearField("node")
    alone.graph.node.add().CopyFrom(node)
    made = {name for n in model.graph.node for name in n.output}
    _add_inputs(alone.graph, [n for n in node.input if n in made], model.graph.output)
    outputs = [v for v in alone.graph.output if v.name in node.output]
    alone.graph.ClearField("output")
    alone.graph.output.extend(outputs)
    return alone


def _add_inputs(
    graph: onnx.GraphProto, names: list[str], known: Iterable[onnx.ValueInfoProto]
) -> None:
    values = {v.name: v for v in known}
    graph.input.extend(values[name] for name in dict.fromkeys(names))
