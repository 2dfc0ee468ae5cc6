"""Read-only questions about a graph."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq.graph.check import TOOL_ERRORS
from onnxq.graph.exporting import export
from onnxq.graph.model import Model
from onnxq.graph.names import bodies, nested_nodes
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


def joined_permutation(
    transpose: gs.Node, behind: tuple[int, ...] | None
) -> tuple[int, ...] | None:
    """A Transpose and those behind it as one; None where its own is unknown, or of another rank."""
    step = perm_of(transpose)
    if step is None or behind is None:
        return step
    return tuple(step[i] for i in behind) if len(step) == len(behind) else None


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
            permutation = joined_permutation(source, permutation)
            if permutation is None:
                return None
        through.append(source)
        tensor = source.inputs[0]
    if permutation is not None and len(permutation) != len(tensor.shape):
        return None
    return ConstantOperand(tensor, permutation, tuple(reversed(through)))


def perm_of(transpose: gs.Node) -> tuple[int, ...] | None:
    """Its axes; without the attribute they are reversed, for which the rank must be known."""
    if transpose.attrs.get("perm") is not None:
        return tuple(transpose.attrs["perm"])
    shape = transpose.inputs[0].shape
    return None if shape is None else tuple(reversed(range(len(shape))))


_NO_REAL_NUMBERS = (
    onnx.TensorProto.STRING,
    onnx.TensorProto.COMPLEX64,
    onnx.TensorProto.COMPLEX128,
)


def scalar(tensor: gs.Tensor) -> float | None:
    """The value of a constant that is one real number; None for anything else."""
    if not isinstance(tensor, gs.Constant) or int(np.prod(tensor.shape or (1,))) != 1:
        return None
    if constant_type(tensor) in _NO_REAL_NUMBERS:
        return None
    return float(array(tensor).reshape(-1)[0])


_WORDS = {
    "FLOAT": "fp32",
    "FLOAT16": "fp16",
    "BFLOAT16": "bf16",
    "DOUBLE": "fp64",
    "FLOAT8E4M3FN": "fp8",
    "FLOAT4E2M1": "fp4",
}


def type_number(tensor: gs.Tensor) -> int:
    """A tensor's TensorProto.DataType; 0 where it is unknown."""
    if isinstance(tensor, gs.Constant):
        return constant_type(tensor)
    if tensor.dtype is None:
        return 0
    return tensor.dtype if isinstance(tensor.dtype, int) else onnx_dtype(tensor.dtype)


def type_word(tensor: gs.Tensor) -> str:
    """A tensor's type in short: `fp32`, `fp16`, `fp8`, `int8`, ...; `?` where it is unknown."""
    number, known = type_number(tensor), onnx.TensorProto.DataType
    name = str(known.Name(number)) if number and number in known.values() else "?"
    return _WORDS.get(name, name.lower())


def has_subgraph(model: Model, node: gs.Node) -> bool:
    """Whether a node carries a body (If, Loop, Scan)."""
    return any(True for _ in bodies(_origin(model, node)))


def inner_nodes(model: Model, node: gs.Node) -> Iterator[gs.Node]:
    """Every node of the bodies of an If, Loop or Scan, nested ones too.

    Their operators and the names of what they read and make; types are not known.
    """
    outermost = [inner for body in bodies(_origin(model, node)) for inner in body.node]
    for inner in nested_nodes(outermost):
        read, made = ([gs.Variable(n) for n in names] for names in (inner.input, inner.output))
        domain = "" if inner.domain == "ai.onnx" else inner.domain
        yield gs.Node(inner.op_type, inner.name, {}, read, made, domain)


def _origin(model: Model, node: gs.Node) -> onnx.NodeProto:
    return model.origins.get(id(node)) or onnx.NodeProto()


def makers(model: Model) -> dict[str, gs.Node]:
    """Tensor name -> the node that makes it. By name, which is how bodies read."""
    return {t.name: node for node in model.graph.nodes for t in node.outputs if t.name}


def needed_nodes(model: Model, node: gs.Node, made_by: Mapping[str, gs.Node]) -> list[gs.Node]:
    """Makers of the node's inputs, and of what its bodies read."""
    names = [*(t.name for t in node.inputs), *sorted(model.captures.get(id(node), ()))]
    return [made_by[name] for name in names if name in made_by]


def live_nodes(model: Model) -> set[int]:
    """Ids of the nodes that lead to an output; of the others nothing will be written.

    A node without outputs acts in some other way: it lives, with what it needs.
    """
    outputs, made_by = {t.name for t in model.graph.outputs}, makers(model)
    nodes = model.graph.nodes
    waiting = [n for n in nodes if not n.outputs or any(t.name in outputs for t in n.outputs)]
    alive = {id(n) for n in waiting}
    while waiting:
        for needed in needed_nodes(model, waiting.pop(), made_by):
            if id(needed) not in alive:
                alive.add(id(needed))
                waiting.append(needed)
    return alive


def known_shapes(model: Model, tensors: Iterable[gs.Tensor]) -> dict[str, Sequence[Any] | None]:
    """Shapes by name; shape arithmetic is followed where a last dimension is no number."""
    shapes = {t.name: t.shape for t in tensors}
    if all(shape and isinstance(shape[-1], int) for shape in shapes.values()):
        return shapes
    try:
        inferred = onnx.shape_inference.infer_shapes(export(model, bare=True), data_prop=True)
    except TOOL_ERRORS:
        return shapes
    for value in inferred.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if value.name in shapes and dims:
            shapes[value.name] = [d.dim_value or d.dim_param or None for d in dims]
    return shapes
