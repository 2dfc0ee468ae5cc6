"""Nodes against the definitions of their operators: what every pass takes on trust.

The rules are those of onnx's checker, which ONNX Runtime runs too: what fails here loads nowhere.
The checker itself wants the weights, and refuses attributes it does not know.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import onnx

from onnxq.errors import OnnxqError
from onnxq.graph.names import bodies

_SINGLE = onnx.defs.OpSchema.FormalParameterOption.Single
_VARIADIC = onnx.defs.OpSchema.FormalParameterOption.Variadic


def knows_attribute(operator: str, version: int, name: str) -> bool:
    """Whether an operator of ONNX's has this attribute; of one that is unknown, it may have any."""
    definition = _definition(operator, version)
    return definition is None or name in definition.attributes


def check_operators(proto: onnx.ModelProto) -> None:
    """Refuse nodes of ONNX's own operators whose inputs, outputs or attributes do not fit them.

    Operators that the installed onnx does not know, and those of other domains, pass.

    Raises:
        OnnxqError: which node, and what of it.
    """
    versions = [o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")]
    if not versions:
        return
    known = onnx.defs.onnx_opset_version()
    version = max(versions)
    if not 0 < version <= known:
        raise OnnxqError(
            f"it uses version {version} of ONNX's operators; the installed onnx {onnx.__version__} "
            f"knows 1 to {known}",
            "update the package onnx, or export for an older version",
        )
    _check_nodes(proto.graph, int(version))


def _check_nodes(graph: onnx.GraphProto, version: int) -> None:
    for index, node in enumerate(graph.node):
        if node.domain in ("", "ai.onnx"):
            definition = _definition(node.op_type, version)
            if definition is not None and not definition.deprecated:
                wrong = _wrong(node, definition)
                if wrong:
                    raise OnnxqError(f"{_label(node, index)} {wrong}", "export the model again")
        for body in bodies(node):
            _check_nodes(body, version)


@cache
def _definition(operator: str, version: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(operator, version, "")
    except onnx.defs.SchemaError:
        return None


def _wrong(node: onnx.NodeProto, definition: onnx.defs.OpSchema) -> str:
    """What does not fit the definition, or ''."""
    for what, names, formal, least, most in (
        ("inputs", node.input, definition.inputs, definition.min_input, definition.max_input),
        ("outputs", node.output, definition.outputs, definition.min_output, definition.max_output),
    ):
        if not least <= len(names) <= most:
            takes = least if least == most else f"{least} or more"
            return f"has {len(names)} {what}; the operator has {takes}"
        missing = _missing(names, formal)
        if missing is not None:
            return f"leaves out one of its {what}, which the operator needs: {missing}"
    return _wrong_attribute(node, definition)


def _missing(names: Sequence[str], formal: Sequence[Any]) -> str | None:
    """Name of a parameter that must be there and is left out by an empty name."""
    for index, name in enumerate(names):
        parameter = formal[min(index, len(formal) - 1)]
        if not name and parameter.option == _SINGLE:
            return str(parameter.name)
    return None


def _wrong_attribute(node: onnx.NodeProto, definition: onnx.defs.OpSchema) -> str:
    given = {a.name: a for a in node.attribute}
    if len(given) < len(node.attribute):
        return "has an attribute twice"
    attributes: Mapping[str, Any] = definition.attributes
    for name, attribute in attributes.items():
        if name not in given:
            if attribute.required:
                return f"lacks the attribute {name!r}"
        elif given[name].type != int(attribute.type.value) and not given[name].ref_attr_name:
            return f"has the attribute {name!r} of another type than the operator's"
    return ""


def _label(node: onnx.NodeProto, index: int) -> str:
    return f"node {node.name!r} ({node.op_type})" if node.name else f"node {index} ({node.op_type})"
