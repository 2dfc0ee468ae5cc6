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
    """Whether a graphsurgeon dtype (numpy dtype, or TensorProto.DataType for BF16 and FP8) is real."""
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
    name = onnx.TensorProto.DataType.Name(number)
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
        scale_after: Mul or Div by a constant between `scores` and `softmax`.
        between: every node from `scores` to `values`, both left out.
    """

    scores: gs.Node
    softmax: gs.Node
    values: gs.Node
    scale_after: tuple[gs.Node, ...]
    between: tuple[gs.Node, ...]


_AFTER_SOFTMAX = ("Cast", "Where", "QuantizeLinear", "DequantizeLinear")
_SOFTMAX_TO_SCORES = ("Add", "Mul", "Div", "Where", "Cast", "Clip")


def attentions(model: Model) -> list[Attention]:
    """Every attention whose two products are MatMuls of computed operands, in graph order."""
    found = []
    for node in model.graph.nodes:
        if node.op == "Softmax":
            attention = _attention(node)
            if attention is not None:
                found.append(attention)
    return found


def _attention(softmax: gs.Node) -> Attention | None:
    values = softmax
    after = []
    while values.op != "MatMul":
        consumers = values.outputs[0].outputs
        if len(consumers) != 1 or (values is not softmax and values.op not in _AFTER_SOFTMAX):
            return None
        values = consumers[0]
        after.append(values)
    if values.inputs[0].inputs == [] or constant_operand(values, 1) is not None:
        return None
    path = _path_to_scores(softmax.inputs[0], 6)
    if path is None or constant_operand(path[0], 1) is not None:
        return None
    scores, before = path[0], path[1:]
    scale = tuple(n for n in before if n.op in ("Mul", "Div") and _by_constant(n))
    return Attention(scores, softmax, values, scale, (*before, softmax, *after[:-1]))


def _path_to_scores(tensor: gs.Tensor, depth: int) -> list[gs.Node] | None:
    """Nodes from the MatMul that makes the scores down to `tensor`, the MatMul first."""
    node = producer(tensor)
    if node is None or depth == 0:
        return None
    if node.op == "MatMul":
        return [node]
    if node.op in _SOFTMAX_TO_SCORES:
        for source in node.inputs:
            path = _path_to_scores(source, depth - 1)
            if path is not None:
                return [*path, node]
    return None


def _by_constant(node: gs.Node) -> bool:
    constants = [scalar(t) is not None for t in node.inputs]
    return constants[1] or (node.op == "Mul" and constants[0])
