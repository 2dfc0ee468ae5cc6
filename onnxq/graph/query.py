"""Read-only questions about a graph."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.graph.model import Model
from onnxq.graph.weights import Array, array, constant_type, onnx_dtype, original

NAME_SCOPES = "pkg.torch.onnx.name_scopes"
"""Node metadata in which torch's exporter writes the module path."""


def label(node: gs.Node) -> str:
    """The node's name, or what identifies it where the exporter gave none."""
    if node.name:
        return str(node.name)
    return f"{node.op}:{node.outputs[0].name}" if node.outputs else str(node.op)


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node whose output `tensor` is; None for inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def module_path(model: Model, node: gs.Node) -> str:
    """Module path such as `model.layers.0.mlp.down_proj`, from torch's node metadata; or ''."""
    text = model.metadata(node).get(NAME_SCOPES, "")
    try:
        scopes = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError):
        return ""
    if not isinstance(scopes, list):
        return ""
    named = [s for s in scopes[:-1] if isinstance(s, str) and s]
    return named[-1] if named else ""


@dataclass(frozen=True)
class ConstantOperand:
    """A constant that reaches a node's input, through layout-only nodes at most.

    Attributes:
        constant: the initializer.
        permutation: axes of the Transpose between, None for none.
        through: the nodes between, nearest to the constant first.
    """

    constant: gs.Constant
    permutation: tuple[int, ...] | None
    through: tuple[gs.Node, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as the node sees it."""
        shape = tuple(int(d) for d in self.constant.shape)
        return shape if self.permutation is None else tuple(shape[i] for i in self.permutation)

    def load(self) -> Array:
        """Values as the node sees them, before any cast of the base precision."""
        values = original(self.constant)
        return values if self.permutation is None else values.transpose(self.permutation)


def constant_operand(node: gs.Node, index: int) -> ConstantOperand | None:
    """The constant behind input `index`, seen through Identity, Cast and Transpose."""
    if index >= len(node.inputs):
        return None
    tensor, through = node.inputs[index], []
    permutation: tuple[int, ...] | None = None
    while not isinstance(tensor, gs.Constant):
        source = producer(tensor)
        if source is None or source.op not in ("Identity", "Cast", "Transpose"):
            return None
        if source.op == "Transpose":
            rank = len(source.attrs.get("perm", ())) or 2
            step = tuple(source.attrs.get("perm") or reversed(range(rank)))
            permutation = step if permutation is None else tuple(step[i] for i in permutation)
        through.append(source)
        tensor = source.inputs[0]
    if permutation is not None and len(permutation) != len(tensor.shape):
        return None
    return ConstantOperand(tensor, permutation, tuple(reversed(through)))


def scalar(tensor: gs.Tensor) -> float | None:
    """The value of a constant with one element; None for anything else."""
    if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape or (1,))) != 1:
        return None
    values = array(tensor).reshape(-1)
    return (
        float(values[0]) if np.issubdtype(np.asarray(values, np.float64).dtype, np.number) else None
    )


def is_floating(onnx_or_numpy: object) -> bool:
    """Whether a graphsurgeon dtype is real: a numpy dtype, or the ONNX number of BF16 or FP8."""
    if isinstance(onnx_or_numpy, int):
        return True
    return onnx_or_numpy is not None and np.dtype(onnx_or_numpy).kind == "f"  # type: ignore[call-overload]


_WORDS = {
    "FLOAT": "fp32",
    "FLOAT16": "fp16",
    "BFLOAT16": "bf16",
    "DOUBLE": "fp64",
    "FLOAT8E4M3FN": "fp8",
    "FLOAT4E2M1": "fp4",
}


def type_word(tensor: gs.Tensor) -> str:
    """A tensor's type in short: `fp32`, `fp16`, `fp8`, `int8`, ...; `?` where it is unknown."""
    if isinstance(tensor, gs.Constant):
        number = constant_type(tensor)
    elif tensor.dtype is None:
        return "?"
    else:
        number = tensor.dtype if isinstance(tensor.dtype, int) else onnx_dtype(tensor.dtype)
    name = str(onnx.TensorProto.DataType.Name(number))
    return _WORDS.get(name, name.lower())


def float_tensors(model: Model) -> list[str]:
    """Names of computed floating-point tensors, in graph order (unknown types count as such)."""
    return [
        t.name
        for node in model.graph.nodes
        for t in node.outputs
        if t.name and (t.dtype is None or is_floating(t.dtype))
    ]


def captured_names(model: Model) -> set[str]:
    """Names of outer tensors that If, Loop and Scan bodies read."""
    return set(_captured(model.graph, nested=False))


def _captured(graph: gs.Graph, nested: bool) -> Iterator[str]:
    for node in graph.nodes:
        if nested:
            yield from (t.name for t in node.inputs)
        for attribute in node.attrs.values():
            if isinstance(attribute, gs.Graph):
                yield from (t.name for t in attribute.outputs)
                yield from _captured(attribute, nested=True)


def has_subgraph(node: gs.Node) -> bool:
    """Whether a node carries a body (If, Loop, Scan)."""
    return any(isinstance(a, gs.Graph) for a in node.attrs.values())


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

    @property
    def nodes(self) -> tuple[gs.Node, ...]:
        """The two products and what lies between them."""
        return (self.scores, *self.between, self.values)


_TO_VALUES = (
    "Cast",
    "Where",
    "Reshape",
    "Dropout",
    "Identity",
    "QuantizeLinear",
    "DequantizeLinear",
)
"""What may stand between the softmax and the second product: a Where clears masked rows."""

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
        consumers = [c for c in tensor.outputs if c.op != "Shape"]
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


def _factor(node: gs.Node, tensor: gs.Tensor) -> float | None:
    """What a Mul or Div by one constant number multiplies `tensor` by, finite and positive."""
    constant = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
    value, rank = scalar(constant), len(tensor.shape or ())
    if value is None or not 0 < value < np.inf or len(constant.shape) > rank:
        return None
    if node.op == "Mul":
        return value
    return None if constant is node.inputs[0] else 1 / value
