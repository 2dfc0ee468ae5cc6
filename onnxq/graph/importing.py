"""ModelProto -> graphsurgeon graph, without what graphsurgeon cannot carry or fails on.

graphsurgeon decodes every string, knows few element types and computes the type of every value, at
any depth; an optional, a binary attribute or a new element type ends its import. Passes edit the
main graph and need no more of a body than what it reads. The rest stays in the NodeProto each node
came from, which is what is exported.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxq.graph.dtypes import is_known
from onnxq.graph.names import made
from onnxq.graph.operators import knows_attribute
from onnxq.graph.reading import is_external
from onnxq.graph.weights import InlineValues, SparseValues, Values, stored

_PLAIN = {
    onnx.AttributeProto.INT,
    onnx.AttributeProto.INTS,
    onnx.AttributeProto.FLOAT,
    onnx.AttributeProto.FLOATS,
}
_TEXT = {onnx.AttributeProto.STRING, onnx.AttributeProto.STRINGS}


def import_graph(proto: onnx.ModelProto, folder: Path) -> gs.Graph:
    """The main graph; its weights are `Values`, checked against the files they lie in.

    Args:
        folder: what the locations of EXTERNAL tensors are relative to.

    Raises:
        OnnxqError: external data that does not fit.
    """
    with quiet():
        graph = gs.import_onnx(_importable(proto))
    values: dict[str, Values] = {t.name: _values(t, folder) for t in proto.graph.initializer}
    values |= {s.values.name: SparseValues(s) for s in proto.graph.sparse_initializer}
    for constant in _constants(graph):
        constant._values = values[constant.name]
    for node, origin in zip(graph.nodes, proto.graph.node, strict=True):
        node.domain = "" if node.domain == "ai.onnx" else node.domain
        for attribute in _readable(origin, _version(proto)):
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.HasField("t"):
                tensor = gs.Constant(attribute.t.name, _values(attribute.t, folder))
                node.attrs[attribute.name] = tensor
    return graph


def initializers(proto: onnx.ModelProto, graph: gs.Graph, folder: Path) -> dict[str, gs.Constant]:
    """Every initializer of the file, in its order, also what no node of the main graph reads."""
    found = {c.name: c for c in _constants(graph)}
    for tensor in proto.graph.initializer:
        if tensor.name not in found:
            found[tensor.name] = gs.Constant(tensor.name, _values(tensor, folder))
    for sparse in proto.graph.sparse_initializer:
        if sparse.values.name not in found:
            found[sparse.values.name] = gs.Constant(sparse.values.name, SparseValues(sparse))
    order = [t.name for t in proto.graph.initializer]
    order += [s.values.name for s in proto.graph.sparse_initializer]
    return {name: found[name] for name in order}


def _values(tensor: onnx.TensorProto, folder: Path) -> Values:
    return stored(tensor, folder) if is_external(tensor) else InlineValues(tensor)


def _constants(graph: gs.Graph) -> Iterable[gs.Constant]:
    """Constants that nodes, bodies or outputs of the graph refer to."""
    graphs = [graph, *graph.subgraphs(recursive=True)]
    found = {id(t): t for t in graph.outputs}
    for part in graphs:
        for node in part.nodes:
            found.update((id(t), t) for t in node.inputs)
    return [t for t in found.values() if isinstance(t, gs.Constant)]


def _importable(proto: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto(ir_version=proto.ir_version)
    bare.opset_import.extend(proto.opset_import)
    graph, source = bare.graph, proto.graph
    for name in ("input", "output", "value_info"):
        getattr(graph, name).extend(_plain_value(v) for v in getattr(source, name))
    weights = [t.name for t in source.initializer]
    weights += [s.values.name for s in source.sparse_initializer]
    for name in weights:
        # Stands for the real one: a value and a type that graphsurgeon can take in.
        graph.initializer.add(name=name, data_type=onnx.TensorProto.FLOAT, raw_data=b"\0" * 4)
    for node in source.node:
        attributes = _readable(node, _version(proto))
        _add_node(graph, node, [a for a in attributes if a.type in _PLAIN or _is_text(a)])
    return bare


def _version(proto: onnx.ModelProto) -> int:
    return max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)


def _readable(node: onnx.NodeProto, version: int) -> list[onnx.AttributeProto]:
    """The attributes that passes may see: what an operator does not have, it does not obey."""
    if node.domain not in ("", "ai.onnx") or not version:
        return list(node.attribute)
    return [a for a in node.attribute if knows_attribute(node.op_type, version, a.name)]


def _plain_value(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """A value with its type where that is a tensor; graphsurgeon fails on some others."""
    kept = onnx.ValueInfoProto(name=value.name)
    if value.type.HasField("tensor_type") and is_known(value.type.tensor_type.elem_type):
        kept.type.CopyFrom(value.type)
    return kept


def _add_node(
    graph: onnx.GraphProto, node: onnx.NodeProto, attributes: Iterable[onnx.AttributeProto] = ()
) -> None:
    """Add a node's operator, its ends, its bodies as far as passes read them, and `attributes`."""
    added = graph.node.add(name=node.name, op_type=node.op_type, input=node.input)
    added.output.extend(node.output)
    if node.HasField("domain"):
        added.domain = node.domain
    added.attribute.extend(attributes)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            body = added.attribute.add(name=attribute.name, type=attribute.type).g
            _add_body(body, attribute.g)


def _add_body(body: onnx.GraphProto, source: onnx.GraphProto) -> None:
    """What passes ask of a body: its operators, and what each reads."""
    for name in ("input", "output"):
        getattr(body, name).extend(onnx.ValueInfoProto(name=v.name) for v in getattr(source, name))
    for node in source.node:
        _add_node(body, node)
    # Its initializers, as inputs: made here, not read from outside.
    known = {v.name for v in source.input} | {n for node in source.node for n in node.output}
    body.input.extend(onnx.ValueInfoProto(name=n) for n in made(source) if n not in known)


def _is_text(attribute: onnx.AttributeProto) -> bool:
    if attribute.type not in _TEXT:
        return False
    try:
        for text in (attribute.s, *attribute.strings):
            text.decode()
    except UnicodeDecodeError:
        return False
    return True


class quiet:  # noqa: N801  (used as a function)
    """graphsurgeon logs what it drops; here nothing it drops is lost."""

    def __enter__(self) -> None:
        self.severity = G_LOGGER.severity
        G_LOGGER.severity = G_LOGGER.CRITICAL

    def __exit__(self, *exc: object) -> None:
        G_LOGGER.severity = self.severity
