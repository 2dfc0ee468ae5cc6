"""The part of a graph that a few of its tensors need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx

from onnxq.graph.names import captured


def cut(
    graph: onnx.GraphProto, outputs: Sequence[str], types: Mapping[str, onnx.ValueInfoProto]
) -> None:
    """Make `outputs` the graph's outputs and drop the nodes and weights nobody needs then."""
    nodes, reached = _needed(graph, outputs)
    known = {**types, **{v.name: v for v in (*graph.value_info, *graph.input, *graph.output)}}
    kept = {
        "node": [graph.node[i] for i in nodes],
        "initializer": [t for t in graph.initializer if t.name in reached],
        "sparse_initializer": [s for s in graph.sparse_initializer if s.values.name in reached],
        "output": [known.get(name) or onnx.ValueInfoProto(name=name) for name in outputs],
        "value_info": [],
        "quantization_annotation": [],
    }
    for field, content in kept.items():
        copies = [type(c).FromString(c.SerializeToString()) for c in content]
        graph.ClearField(field)
        getattr(graph, field).extend(copies)
    graph.value_info.extend(inner_values(graph, types))


def inner_values(
    graph: onnx.GraphProto, types: Mapping[str, onnx.ValueInfoProto]
) -> list[onnx.ValueInfoProto]:
    """What is known of the tensors between the graph's inputs and outputs.

    How ONNX Runtime fuses nodes depends on the shapes it knows, and it infers less than onnx does:
    parts of a model must be told as much inside as they are told at their ends, or they compute
    with other roundings than the whole.
    """
    known = {value.name for value in (*graph.input, *graph.output)}
    made = dict.fromkeys(name for node in graph.node for name in node.output)
    return [types[name] for name in made if name in types and name not in known]


def _needed(graph: onnx.GraphProto, outputs: Sequence[str]) -> tuple[list[int], set[str]]:
    """Indices of the nodes that lead to `outputs`, in graph order, and every name on the way."""
    maker = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    waiting, reached, nodes = list(outputs), set(outputs), set()
    while waiting:
        index = maker.get(waiting.pop(), -1)
        if index < 0 or index in nodes:
            continue
        nodes.add(index)
        node = graph.node[index]
        for name in {*node.input, *captured(node)} - reached:
            reached.add(name)
            waiting.append(name)
    return sorted(nodes), reached
