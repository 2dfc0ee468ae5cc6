"""Names in ONNX graphs: what a graph makes, and what the bodies of If, Loop and Scan take from it.

Bodies pass through onnxq untouched and name outer tensors as text, so an outer tensor they read
must keep its name and stay, whatever graphsurgeon's own links say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx


def bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def nested_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those of their bodies at any depth."""
    for node in nodes:
        yield node
        for body in bodies(node):
            yield from nested_nodes(body.node)


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph, and those of its bodies at any depth."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from graphs_of(body)


def attribute_tensors(
    node: onnx.NodeProto,
) -> Iterator[tuple[onnx.AttributeProto, onnx.TensorProto]]:
    """(attribute, tensor) of the node itself, the parts of sparse ones included."""
    for attribute in node.attribute:
        found = [attribute.t] if attribute.HasField("t") else []
        found += attribute.tensors
        sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
        for parts in (*sparse, *attribute.sparse_tensors):
            found += (parts.values, parts.indices)
        yield from ((attribute, tensor) for tensor in found)


def nested_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Tensors in the bodies of these nodes, at any depth."""
    for node in nodes:
        for body in bodies(node):
            yield from body.initializer
            yield from tensors_of(body.node)


def tensors_of(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Tensors in the attributes of these nodes and in their bodies, at any depth."""
    for node in nodes:
        yield from (tensor for _, tensor in attribute_tensors(node))
        yield from nested_tensors([node])


def made(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name the graph itself gives a value: inputs, initializers, node outputs."""
    for value in graph.input:
        yield value.name
    for tensor in graph.initializer:
        yield tensor.name
    for sparse in graph.sparse_initializer:
        yield sparse.values.name
    for node in graph.node:
        yield from (name for name in node.output if name)


def captured(node: onnx.NodeProto) -> frozenset[str]:
    """Names that the node's bodies read from the graphs around them."""
    found: set[str] = set()
    for body in bodies(node):
        read = {value.name for value in body.output}
        for inner in body.node:
            read.update(name for name in inner.input if name)
            read |= captured(inner)
        found |= read.difference(made(body))
    return frozenset(found)


def taken(graph: onnx.GraphProto) -> Iterator[str]:
    """Every name in use in the graph or below it, of nodes as of values."""
    yield from made(graph)
    for node in graph.node:
        yield node.name
        for body in bodies(node):
            yield from taken(body)
