"""What a model file asks the compiler to multiply in which format, read from its Q/DQ."""

from __future__ import annotations

from dataclasses import replace

from onnxq import record
from onnxq.engine.coverage import WEIGHTS_ALONE, Kind, WeightedNode
from onnxq.graph.ir import Node, Tensor
from onnxq.graph.model import Model
from onnxq.graph.query import producer, type_word
from onnxq.placement import Site, find_sites

_UNRECORDED = "no codes in the file, which does not say why"
_KINDS: dict[str, Kind] = {
    "attention": "attention",
    "linear": "gemm",
    "conv": "conv",
    "product": "gemm",
}


def expected_products(model: Model) -> list[WeightedNode]:
    """Every MatMul, Gemm, Conv and attention of the main graph, in graph order."""
    reasons = record.left(model)
    return [_expected(site, reasons.get(site.name, _UNRECORDED)) for site in find_sites(model)]


def _expected(site: Site, left: str) -> WeightedNode:
    names = tuple(engine_name(node) for node in site.nodes)
    parts = names if site.attention is not None else ()
    node = WeightedNode(names[0], _KINDS[site.kind], _wanted(site.node), parts)
    return node if node.narrow else replace(node, left=left)


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
