"""The graphsurgeon graph -> ModelProto: from what was imported, with what was edited put in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxq.graph.dtypes import onnx_dtype, onnx_number
from onnxq.graph.names import graphs_of
from onnxq.graph.weights import SparseValues
from onnxq.graph.wire import STRIP_THRESHOLD

if TYPE_CHECKING:
    from onnxq.graph.model import Model


def export(model: Model, *, bare: bool = False) -> onnx.ModelProto:
    """The model as a ModelProto; weights that lie outside stay EXTERNAL placeholders.

    Args:
        bare: for the inference of types only: without metadata and doc strings of nodes, most of
            the bytes of a torch export, and without large weights in bodies.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.header)
    for node in model.graph.nodes:
        _export_node(model, node, proto.graph.node.add(), bare)
    live = list(live_constants(model))
    for constant in live:
        if isinstance(constant._values, SparseValues):
            proto.graph.sparse_initializer.add().CopyFrom(constant._values.sparse)
        else:
            proto.graph.initializer.add().CopyFrom(_constant_proto(constant))
    _export_values(model, proto.graph, {c.name for c in live})
    if bare:
        open_negative(proto.graph)
    return proto


def open_negative(graph: onnx.GraphProto) -> None:
    """Leave dimensions open that are said to be negative; some exporters mean that by -1.

    onnx's shape inference takes them for sizes, and ends the process (Slice, onnx 1.23).
    """
    for part in graphs_of(graph):
        for value in (*part.input, *part.output, *part.value_info):
            for dim in value.type.tensor_type.shape.dim:
                if dim.HasField("dim_value") and dim.dim_value < 0:
                    dim.ClearField("dim_value")


def live_constants(model: Model) -> Iterator[gs.Constant]:
    """Initializers that something reads: those of the file in its order, then those added."""
    wanted = read_names(model) | model.unread
    now = {t.name: t for n in model.graph.nodes for t in n.inputs if isinstance(t, gs.Constant)}
    now |= {t.name: t for t in model.graph.outputs if isinstance(t, gs.Constant)}
    for name, constant in model.initializers.items():
        if name in wanted:
            yield now.pop(name, constant)
    yield from now.values()


def read_names(model: Model) -> set[str]:
    """Names of what nodes, their bodies and the graph's outputs read."""
    names = {t.name for node in model.graph.nodes for t in node.inputs}
    return names | {t.name for t in model.graph.outputs} | model.captured_names()


def value_types(model: Model) -> dict[str, onnx.ValueInfoProto]:
    """Types and shapes of the main graph's computed tensors and inputs, as far as known."""
    return {
        name: _value(name, onnx_number(t.dtype), t.shape)
        for name, t in model.graph.tensors().items()
        if isinstance(t, gs.Variable) and t.type == "tensor_type" and t.dtype is not None
    }


def _export_node(model: Model, node: gs.Node, out: onnx.NodeProto, bare: bool) -> None:
    origin = model.origins.get(id(node))
    if origin is None:
        out.CopyFrom(onnx.helper.make_node(node.op, (), (), domain=node.domain or None))
        out.attribute.extend(_attribute(name, value) for name, value in node.attrs.items())
        if id(node) in model.added:
            out.metadata_props.extend(model.added[id(node)][1].metadata_props)
    else:
        if bare:
            _copy_bare(origin, out)
        else:
            out.CopyFrom(origin)
        for name in sorted(model.edited.get(id(node), ())):
            _replace_attribute(out, name, node.attrs.get(name))
    out.op_type = node.op
    for field, tensors in (("input", node.inputs), ("output", node.outputs)):
        names = [t.name for t in tensors]
        if list(getattr(out, field)) != names:
            out.ClearField(field)
            getattr(out, field).extend(names)
    if out.name != node.name:
        out.name = node.name


def _copy_bare(node: onnx.NodeProto, out: onnx.NodeProto) -> None:
    """The node without its names, metadata and doc string, and bodies without large weights."""
    out.domain, out.overload = node.domain, node.overload
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH and attribute.HasField("g"):
            added = out.attribute.add(name=attribute.name, type=attribute.type)
            _copy_bare_graph(attribute.g, added.g)
        else:
            out.attribute.add().CopyFrom(attribute)


def _copy_bare_graph(graph: onnx.GraphProto, out: onnx.GraphProto) -> None:
    for field, value in graph.ListFields():
        if field.name == "node":
            for node in graph.node:
                added = out.node.add(op_type=node.op_type, name=node.name)
                added.input.extend(node.input)
                added.output.extend(node.output)
                _copy_bare(node, added)
        elif field.name == "initializer":
            for tensor in graph.initializer:
                _copy_bare_tensor(tensor, out.initializer.add())
        elif field.message_type is not None:
            getattr(out, field.name).extend(value)


def _copy_bare_tensor(tensor: onnx.TensorProto, out: onnx.TensorProto) -> None:
    if len(tensor.raw_data) < STRIP_THRESHOLD:
        out.CopyFrom(tensor)
        return
    out.name, out.data_type = tensor.name, tensor.data_type
    out.dims.extend(tensor.dims)
    out.data_location = onnx.TensorProto.EXTERNAL


def _replace_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    node.ClearField("attribute")
    node.attribute.extend(kept)
    if value is not None:
        node.attribute.append(_attribute(name, value))


def _attribute(name: str, value: Any) -> onnx.AttributeProto:
    if isinstance(value, gs.Constant):
        value = _constant_proto(value)
    elif isinstance(value, (type, np.dtype)):
        value = onnx_dtype(value)
    return onnx.helper.make_attribute(name, value)


def _constant_proto(constant: gs.Constant) -> onnx.TensorProto:
    values = constant._values
    tensor = onnx.TensorProto()
    if isinstance(values, LazyValues):
        tensor.CopyFrom(values.tensor)
    else:
        tensor.CopyFrom(onnx.numpy_helper.from_array(values))
    tensor.name = constant.name
    return tensor


def _export_values(model: Model, graph: onnx.GraphProto, live: set[str]) -> None:
    """Inputs, outputs and value_info: those of the file, retyped where a pass changed the type."""
    tensors = model.graph.tensors()
    before = {v.name: v for f in ("value_info", "input", "output") for v in getattr(graph, f)}
    gone = model.values - set(tensors) - live  # what was never there, a file may still describe
    inputs = {t.name for t in model.graph.inputs}
    fields = {
        "input": [v for v in graph.input if v.name in inputs or v.name in live],
        "output": [before.get(t.name) or _new_value(t) for t in model.graph.outputs],
        "value_info": [v for v in graph.value_info if v.name not in gone] + _foreign(model),
    }
    for field, values in fields.items():
        exported = [_retyped(value, tensors) for value in values]
        graph.ClearField(field)
        getattr(graph, field).extend(exported)
    annotations = [a for a in graph.quantization_annotation if a.tensor_name not in gone]
    if len(annotations) < len(graph.quantization_annotation):
        graph.ClearField("quantization_annotation")
        graph.quantization_annotation.extend(annotations)


def _foreign(model: Model) -> list[onnx.ValueInfoProto]:
    """Types of what added nodes of other domains make: whoever reads the file cannot infer them."""
    added = (n for n in model.graph.nodes if n.domain and id(n) not in model.origins)
    return [_new_value(t) for node in added for t in node.outputs if t.dtype is not None]


def _retyped(value: onnx.ValueInfoProto, tensors: Mapping[str, gs.Tensor]) -> onnx.ValueInfoProto:
    """The value, with the element type its tensor has now."""
    out = onnx.ValueInfoProto()
    out.CopyFrom(value)
    tensor = tensors.get(value.name)
    if tensor is not None and value.type.HasField("tensor_type"):
        number = onnx_number(tensor.dtype)
        if number and value.type.tensor_type.elem_type:
            out.type.tensor_type.elem_type = number
    return out


def _new_value(tensor: gs.Tensor) -> onnx.ValueInfoProto:
    return _value(tensor.name, onnx_number(tensor.dtype), tensor.shape)


def _value(name: str, number: int, shape: Any) -> onnx.ValueInfoProto:
    if not number:
        return onnx.ValueInfoProto(name=name)
    return onnx.helper.make_tensor_value_info(name, number, shape)
