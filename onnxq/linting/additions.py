"""Rules on Q/DQ at additions: masks and residual streams lose more than a kernel could gain."""

from __future__ import annotations

from collections.abc import Iterator

from onnxq.graph.ir import Constant, Node
from onnxq.graph.qdq import readers
from onnxq.graph.query import label
from onnxq.linting.finding import Found, Rule, Severity
from onnxq.linting.subject import Subject


def mask(subject: Subject) -> Iterator[Found]:
    """Q/DQ on an attention's mask."""
    for attention in subject.attentions:
        before = attention.between[: attention.between.index(attention.softmax)]
        for node in before:
            if node.op not in ("Add", "Sub", "Where"):
                continue
            for tensor in node.inputs:
                source = tensor.inputs[0] if tensor.inputs else None
                if source is not None and source.op == "DequantizeLinear" and source not in before:
                    yield Found(
                        source,
                        f"the mask of {label(attention.scores)!r} is quantized: its range of "
                        "minus infinity leaves no codes for the rest, or overflows the scale",
                    )


def residual(subject: Subject) -> Iterator[Found]:
    """Q/DQ on the residual additions of a transformer."""
    for node in subject.nodes:
        if node.op != "Add" or any(isinstance(t, Constant) for t in node.inputs):
            continue
        found = [subject.operand(t) for t in node.inputs]
        if all(o.source is not None and not o.path for o in found) and _is_residual(node):
            yield Found(node, "both of its operands are quantized, and a norm follows")


def _is_residual(add: Node) -> bool:
    """Whether a layer norm follows, spelled out or not, with Q/DQ between at most."""
    stack, seen = list(readers(add.outputs[0])), 0
    while stack and seen < 12:
        node, seen = stack.pop(), seen + 1
        if node.op in ("LayerNormalization", "RMSNormalization", "ReduceMean"):
            return True
        if node.op in ("QuantizeLinear", "DequantizeLinear", "Cast"):
            stack.extend(readers(node.outputs[0]))
    return False


RULES = (
    Rule(
        "mask-quantized",
        Severity.NUMBERS,
        mask,
        "take the Q/DQ off the mask",
        fixable=True,
    ),
    Rule(
        "residual-quantized",
        Severity.NUMBERS,
        residual,
        "take the Q/DQ off residual additions: in a transformer they carry what every later block "
        "reads, and no kernel is gained",
        fixable=True,
    ),
)
