"""Element types as TensorRT derives them: from inputs, weights, Casts and scales, node by node.

ONNX's own inference refuses graphs whose types disagree, and a file may declare what it likes;
TensorRT believes neither. So this reader never fails: what it cannot tell is '?'.
"""

from __future__ import annotations

from typing import Any

import onnx
import onnx_graphsurgeon as gs

from onnxq.graph.dtypes import onnx_number
from onnxq.graph.model import Model
from onnxq.graph.query import type_word

_BOOL = frozenset(
    (
        *("And", "Or", "Xor", "Not", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"),
        *("IsNaN", "IsInf"),
    )
)
_INT64 = frozenset(("Shape", "Size", "ArgMax", "ArgMin", "NonZero", "NonMaxSuppression"))
_THEN = {"Where": 1, "OneHot": 2, "CastLike": 1}
"""Operators whose output has the type of another input than the first."""
_UNKNOWN = frozenset(("If", "Loop", "Scan", "RandomNormal", "RandomUniform", "EyeLike"))
_SECOND = {"TopK": "int64", "Dropout": "bool", "MaxPool": "int64"}


class Elements(dict[str, str]):
    """Tensor name -> type word (`fp16`, `int8`, ...; `query.type_word`), '?' where unknown.

    Attributes:
        fixed: names of tensors that depend on constants alone, known when an engine is built.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fixed: set[str] = {""}


def element_types(model: Model) -> Elements:
    """The types of a model's tensors, and which of them are fixed.

    Nodes must stand in topological order, else what is read before it is made stays as declared.
    """
    types = Elements()
    for tensor in model.graph.inputs:
        types[tensor.name] = type_word(tensor)
    for node in model.graph.nodes:
        for tensor in node.inputs:
            if isinstance(tensor, gs.Constant):
                types.setdefault(tensor.name, type_word(tensor))
                types.fixed.add(tensor.name)
        words = [types.get(t.name, "?") for t in node.inputs]
        for index, tensor in enumerate(node.outputs):
            types[tensor.name] = _output(node, index, words, tensor)
        if _is_fixed(node, types.fixed):
            types.fixed |= {t.name for t in node.outputs}
    return types


def _is_fixed(node: gs.Node, fixed: set[str]) -> bool:
    if node.op == "Constant":
        return True
    if node.op == "Shape":
        shape = node.inputs[0].shape
        return shape is not None and all(isinstance(d, int) for d in shape)
    if node.op.startswith("Random") or node.op in _UNKNOWN:
        return False
    return bool(node.inputs) and all(t.name in fixed for t in node.inputs)


def code_word(node: gs.Node, types: dict[str, str]) -> str:
    """The type of the codes a QuantizeLinear makes or a DequantizeLinear reads.

    A QuantizeLinear without zero point makes UINT8 unless `output_dtype` says otherwise.
    """
    zero = types.get(node.inputs[2].name, "?") if len(node.inputs) > 2 else "?"
    if zero != "?":
        return zero
    if node.op == "DequantizeLinear":
        return types.get(node.inputs[0].name, "?")
    return attribute_word(node, "output_dtype") or "uint8"


def attribute_word(node: gs.Node, name: str) -> str:
    """The type word an attribute such as `to` names; '' where it is absent or 0."""
    number = onnx_number(node.attrs.get(name))
    return type_word(gs.Variable("", dtype=number)) if number else ""


def _output(node: gs.Node, index: int, words: list[str], tensor: gs.Tensor) -> str:
    op = node.op
    if op == "QuantizeLinear":
        return _read_as_int8(node, words)
    if op == "DequantizeLinear":
        return attribute_word(node, "output_dtype") or (words[1] if len(words) > 1 else "?")
    if op == "DynamicQuantizeLinear":
        return ("uint8", "fp32", "uint8")[min(index, 2)]
    if index and op in _SECOND:
        return _SECOND[op]
    if op == "Cast":
        return attribute_word(node, "to") or "?"
    if op in _BOOL:
        return "bool"
    if op in _INT64:
        return "int64"
    if op in ("ConstantOfShape", "Constant"):
        return _constant_word(node.attrs, tensor)
    if op in _UNKNOWN or (node.domain and op not in ("QuantizeLinear", "DequantizeLinear")):
        return type_word(tensor)
    source = _THEN.get(op, 0)
    return words[source] if source < len(words) else type_word(tensor)


def _read_as_int8(node: gs.Node, words: list[str]) -> str:
    """TensorRT's parser makes INT8 of UINT8 codes whose zero point is 0."""
    zero = words[2] if len(words) > 2 else attribute_word(node, "output_dtype") or "uint8"
    return "int8" if zero == "uint8" else zero


def _constant_word(attrs: dict[str, Any], tensor: gs.Tensor) -> str:
    value = attrs.get("value")
    if isinstance(value, gs.Constant):
        return type_word(value)
    declared = type_word(tensor)
    return declared if declared != "?" else "fp32"


def is_importable(word: str) -> bool:
    """Whether TensorRT has the element type at all (tensorrt-rtx 1.7.1; FP64 it reads as FP32)."""
    return word in _IMPORTABLE


_IMPORTABLE = frozenset(
    (
        *("fp32", "fp16", "bf16", "fp64", "fp8", "fp4"),
        *("int4", "int8", "uint8", "int32", "int64", "bool", "?"),
    )
)


def minimum_opset(word: str) -> int:
    """First opset whose QuantizeLinear and DequantizeLinear know codes of this type; 0: none."""
    if word in ("int8", "uint8", "int32"):
        return 10
    if word in ("fp8", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz"):
        return 19
    if word in ("int4", "uint4", "int16", "uint16"):
        return 21
    return 23 if word == "fp4" else 0


def newest_opset() -> int:
    """The newest standard opset that the installed onnx package knows."""
    return int(onnx.defs.onnx_opset_version())
