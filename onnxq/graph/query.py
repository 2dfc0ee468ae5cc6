"""Read-only questions about a graph."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
            step = _permutation(source)
            if step is None:
                return None
            permutation = step if permutation is None else tuple(step[i] for i in permutation)
        through.append(source)
        tensor = source.inputs[0]
    if permutation is not None and len(permutation) != len(tensor.shape):
        return None
    return ConstantOperand(tensor, permutation, tuple(reversed(through)))


def _permutation(transpose: gs.Node) -> tuple[int, ...] | None:
    """Its axes; without the attribute they are reversed, for which the rank must be known."""
    if transpose.attrs.get("perm") is not None:
        return tuple(transpose.attrs["perm"])
    shape = transpose.inputs[0].shape
    return None if shape is None else tuple(reversed(range(len(shape))))


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


def type_number(tensor: gs.Tensor) -> int:
    """A tensor's TensorProto.DataType; 0 where it is unknown."""
    if isinstance(tensor, gs.Constant):
        return constant_type(tensor)
    if tensor.dtype is None:
        return 0
    return tensor.dtype if isinstance(tensor.dtype, int) else onnx_dtype(tensor.dtype)


def type_word(tensor: gs.Tensor) -> str:
    """A tensor's type in short: `fp32`, `fp16`, `fp8`, `int8`, ...; `?` where it is unknown."""
    number = type_number(tensor)
    name = str(onnx.TensorProto.DataType.Name(number)) if number else "?"
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


def inner_nodes(node: gs.Node) -> Iterator[gs.Node]:
    """Every node of the bodies of an If, Loop or Scan, nested ones too."""
    for attribute in node.attrs.values():
        if isinstance(attribute, gs.Graph):
            for inner in attribute.nodes:
                yield inner
                yield from inner_nodes(inner)


def live_nodes(model: Model) -> set[int]:
    """Ids of the nodes that lead to an output; of the others nothing will be written."""
    stack = [producer(t) for t in model.graph.outputs]
    stack += [n for n in model.graph.nodes if not n.outputs]
    found: set[int] = set()
    while stack:
        node = stack.pop()
        if node is None or id(node) in found:
            continue
        found.add(id(node))
        stack.extend(producer(t) for t in node.inputs)
        for body in (a for a in node.attrs.values() if isinstance(a, gs.Graph)):
            stack.extend(producer(t) for t in body.outputs)
        stack.extend(producer(t) for inner in inner_nodes(node) for t in inner.inputs)
    return found


def known_shapes(model: Model, tensors: Iterable[gs.Tensor]) -> dict[str, Sequence[Any] | None]:
    """Shapes by name; shape arithmetic is followed where a last dimension is no number."""
    shapes = {t.name: t.shape for t in tensors}
    if all(shape and isinstance(shape[-1], int) for shape in shapes.values()):
        return shapes
    try:
        inferred = onnx.shape_inference.infer_shapes(model.export(), data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError):
        return shapes
    for value in inferred.graph.value_info:
        dims = value.type.tensor_type.shape.dim
        if value.name in shapes and dims:
            shapes[value.name] = [d.dim_value or d.dim_param or None for d in dims]
    return shapes
