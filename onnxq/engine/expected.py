"""What a model file asks the compiler to multiply in which format, read from its Q/DQ."""

from __future__ import annotations

from onnxq.engine.coverage import WEIGHTS_ALONE, WeightedNode
from onnxq.graph.ir import Node, Tensor
from onnxq.graph.model import Model
from onnxq.graph.query import producer, type_word
from onnxq.placement import Site, find_sites

_KINDS = {"linear": "gemm", "conv": "conv", "product": "gemm"}


def expected_products(model: Model) -> list[WeightedNode]:
    """Every MatMul, Gemm, Conv and attention of the main graph, in graph order."""
    return [_expected(site) for site in find_sites(model)]


def _expected(site: Site) -> WeightedNode:
    if site.attention is not None:
        attention = site.attention
        parts = (attention.scores, attention.softmax, attention.values)
        names = tuple(engine_name(node) for node in parts)
        return WeightedNode(names[0], "attention", _wanted(attention.scores), names)
    kind = _KINDS[site.kind]
    return WeightedNode(engine_name(site.node), kind, _wanted(site.node))  # type: ignore[arg-type]


def engine_name(node: Node) -> str:
    """The name TensorRT's parser gives the node's layer."""
    return str(node.name) or f"node_of_{node.outputs[0].name}"


def _wanted(node: Node) -> str:
    """The format of the second operand's codes, or its plain type."""
    source = _dequantizer(node.inputs[1])
    if source is None:
        return type_word(node.inputs[1])
    word = type_word(source.inputs[0])
    return word if _dequantizer(node.inputs[0]) is not None else f"{word}{WEIGHTS_ALONE}"


def _dequantizer(tensor: Tensor) -> Node | None:
    """The node that dequantizes an operand, None where it has no codes."""
    source = producer(tensor)
    while source is not None and source.op in ("Transpose", "Reshape", "Identity", "Cast"):
        source = producer(source.inputs[0])
    return source if source is not None and source.op.endswith("DequantizeLinear") else None
