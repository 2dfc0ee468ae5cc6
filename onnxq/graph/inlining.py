"""Model-local functions into the graphs that call them, so that passes see inside.

onnx's inliner does the work. It drops default values of attributes, loses an output that is an
input, leaves out functions of another opset and imports no domain: these are seen to here.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import inliner, shape_inference

from onnxq.errors import OnnxqError
from onnxq.graph.check import TOOL_ERRORS, tool_reason
from onnxq.graph.exporting import open_negative
from onnxq.graph.names import nested_nodes


def inline(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions.

    Raises:
        OnnxqError: a function that cannot be inlined; the message says why.
    """
    for function in proto.functions:
        _separate_outputs(function)
    _fill_defaults(proto)
    _import_domains(proto)
    try:
        if any(_opset(f) != _opset(proto) for f in proto.functions):
            # Converting a function takes the types of what it is called with.
            open_negative(proto.graph)
            proto = shape_inference.infer_shapes(proto)
            inlined = inliner.inline_local_functions(proto, convert_version=True)
        else:
            inlined = inliner.inline_local_functions(proto)
    except TOOL_ERRORS as error:
        raise _refused(tool_reason(error)) from None
    if inlined.functions:
        names = ", ".join(f.name for f in inlined.functions[:3])
        raise _refused(f"{names} is left: it uses another opset than the model")
    return inlined


def _refused(why: str) -> OnnxqError:
    return OnnxqError(
        f"its functions cannot be inlined: {why}", "export the model without functions"
    )


def _opset(holder: onnx.ModelProto | onnx.FunctionProto) -> int:
    return max((o.version for o in holder.opset_import if o.domain in ("", "ai.onnx")), default=0)


def _calls(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    yield from nested_nodes(proto.graph.node)
    for function in proto.functions:
        yield from nested_nodes(function.node)


def _fill_defaults(proto: onnx.ModelProto) -> None:
    """Give each call the attributes it leaves to the function's defaults."""
    defaults = {(f.domain, f.name, f.overload): f.attribute_proto for f in proto.functions}
    for node in _calls(proto):
        given = {a.name for a in node.attribute}
        for attribute in defaults.get((node.domain, node.op_type, node.overload), ()):
            if attribute.name not in given:
                node.attribute.add().CopyFrom(attribute)


def _separate_outputs(function: onnx.FunctionProto) -> None:
    """An output that is an input gets a node of its own."""
    used = {*function.input, *(name for node in function.node for name in node.output)}
    for index, name in enumerate(function.output):
        if name in function.input:
            fresh = name
            while fresh in used:
                fresh += "_out"
            used.add(fresh)
            function.output[index] = fresh
            function.node.add(op_type="Identity", input=[name], output=[fresh])


def _import_domains(proto: onnx.ModelProto) -> None:
    """Name the domains that only functions imported; those of the functions go with them."""
    known = {entry.domain for entry in proto.opset_import}
    for function in proto.functions:
        for entry in function.opset_import:
            if entry.domain not in known and entry.domain != "ai.onnx":
                known.add(entry.domain)
                proto.opset_import.add().CopyFrom(entry)
