"""Attention spelled out as two products and a softmax, in the forms exporters write."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph.model import Model
from onnxq.graph.query import constant_operand, producer, scalar


@dataclass(frozen=True)
class Attention:
    """softmax(q k^T scale + mask) v, as exporters spell it.

    Attributes:
        scores: the MatMul of q and k^T.
        softmax: the Softmax.
        values: the MatMul of the probabilities and v.
        between: every node from `scores` to `values`, both left out.
    """

    scores: gs.Node
    softmax: gs.Node
    values: gs.Node
    between: tuple[gs.Node, ...]


_TO_VALUES = (
    "Cast",
    "Where",
    "Reshape",
    "Dropout",
    "Identity",
    "QuantizeLinear",
    "DequantizeLinear",
)
"""What may stand between the softmax and the second product: IsNaN and Where clear masked rows."""

_TO_SCORES = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Where",
    "Cast",
    "Clip",
    "Flatten",
    "Reshape",
    "Identity",
    "QuantizeLinear",
    "DequantizeLinear",
)
_LONGEST = 10
"""Nodes between the scores and the softmax, at most."""


def attentions(model: Model) -> list[Attention]:
    """Every attention whose two products are MatMuls of computed operands, in graph order.

    One whose scores or probabilities are read elsewhere too is none: no kernel can fuse it.
    """
    outputs = {id(t) for t in model.graph.outputs}
    found = [_attention(n) for n in model.graph.nodes if n.op == "Softmax"]
    return [a for a in found if a is not None and not outputs & _inside(a)]


def _attention(softmax: gs.Node) -> Attention | None:
    if not _is_over_last_axis(softmax):
        return None
    after = _path_to_values(softmax)
    before = _path_to_scores(softmax.inputs[0], _LONGEST)
    if after is None or before is None:
        return None
    scores, values = before[0], after[-1]
    return Attention(scores, softmax, values, (*before[1:], softmax, *after[:-1]))


def _inside(attention: Attention) -> set[int]:
    """Ids of the tensors that a fused kernel never writes."""
    return {id(t) for n in (attention.scores, *attention.between) for t in n.outputs}


def _is_over_last_axis(softmax: gs.Node) -> bool:
    axis, shape = softmax.attrs.get("axis", -1), softmax.inputs[0].shape
    return bool(axis == -1 or (shape is not None and axis == len(shape) - 1))


def _path_to_values(softmax: gs.Node) -> list[gs.Node] | None:
    """Nodes from the softmax, left out, down to the MatMul that reads it as its first operand."""
    path: list[gs.Node] = []
    tensor = softmax.outputs[0]
    while len(path) < _LONGEST:
        consumers = [c for c in tensor.outputs if c.op not in ("Shape", "IsNaN")]
        if len(consumers) != 1:
            return None
        node = consumers[0]
        path.append(node)
        if node.op == "MatMul":
            computed = node.inputs[0] is tensor and constant_operand(node, 1) is None
            return path if computed else None
        if node.op not in _TO_VALUES:
            return None
        tensor = node.outputs[0]
    return None


def _path_to_scores(tensor: gs.Tensor, depth: int) -> list[gs.Node] | None:
    """Nodes from the MatMul that makes the scores down to `tensor`, the MatMul first."""
    node = producer(tensor)
    if node is None or depth == 0:
        return None
    if node.op == "MatMul":
        computed = all(constant_operand(node, i) is None for i in (0, 1))
        return [node] if computed else None
    if node.op in _TO_SCORES and _keeps_rows(node):
        inputs = node.inputs if node.op not in ("Reshape", "QuantizeLinear") else node.inputs[:1]
        for source in inputs:
            path = _path_to_scores(source, depth - 1)
            if path is not None:
                return [*path, node]
    return None


def _keeps_rows(node: gs.Node) -> bool:
    """Whether the last axis stays the last: a Flatten around a softmax may join others to it."""
    shape = node.inputs[0].shape
    last = (-1,) if shape is None else (-1, len(shape) - 1)
    return node.op != "Flatten" or node.attrs.get("axis", 1) in last


def factors_behind(model: Model, scores: gs.Node) -> list[tuple[gs.Node, float]]:
    """The Mul and Div by a constant that follow a product at once, Casts seen through.

    Each with the factor it stands for. What is read elsewhere too ends the row.
    """
    outputs = {id(t) for t in model.graph.outputs}
    found = []
    tensor = scores.outputs[0]
    while len(tensor.outputs) == 1 and id(tensor) not in outputs:
        node = tensor.outputs[0]
        if node.op in ("Mul", "Div"):
            value = _factor(node, tensor)
            if value is None:
                break
            found.append((node, value))
        elif node.op != "Cast":
            break
        tensor = node.outputs[0]
    return found


def factors_before(tensor: gs.Tensor) -> list[tuple[gs.Node, float]]:
    """The Mul and Div by a constant between the layer that makes q, k or v and their product.

    Each with the factor it stands for, nearest to the product first. Only what nobody else reads:
    the factors can be moved to the other operand.
    """
    found: list[tuple[gs.Node, float]] = []
    for _ in range(_LONGEST):
        node = producer(tensor)
        if node is None or len(tensor.outputs) != 1:
            break
        if node.op in ("Mul", "Div"):
            data = next((t for t in node.inputs if scalar(t) is None), None)
            value = _factor(node, data) if data is not None else None
            if data is None or value is None:
                break
            found.append((node, value))
            tensor = data
        elif node.op in ("Reshape", "Transpose", "Identity", "Cast"):
            tensor = node.inputs[0]
        else:
            break
    return found


def _factor(node: gs.Node, tensor: gs.Tensor) -> float | None:
    """What a Mul or Div by one constant number multiplies `tensor` by, finite and positive."""
    constant = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
    value, rank = scalar(constant), len(tensor.shape or ())
    if value is None or not 0 < value < np.inf or len(constant.shape) > rank:
        return None
    if node.op == "Mul":
        return value
    return None if constant is node.inputs[0] else 1 / value
