"""Dimensions of tensors, followed through layout and shape arithmetic where inference gave up.

A dimension is a number, or a name: equal names are equal dimensions. Inference names what it does
not know anew behind every node; here such a name is that of the tensor the dimension comes from.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph.query import constant_operand, perm_of, producer
from onnxq.graph.weights import array

Dim = int | str
Shape = tuple[Dim, ...]

_DEEPEST = 24
"""Nodes followed upwards; a name that comes from further away is a name of its own."""

_SAME_SHAPE = frozenset(
    (
        *("Identity", "Cast", "Dropout", "Softmax", "Relu", "LeakyRelu", "Gelu", "Sigmoid", "Tanh"),
        *("Erf", "Sqrt", "Neg", "Abs", "Exp", "HardSigmoid", "HardSwish", "Clip", "Reciprocal"),
        *("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "Swish"),
        *("SkipLayerNormalization", "SkipSimplifiedLayerNormalization", "BatchNormalization"),
        *("GroupNormalization", "InstanceNormalization", "PRelu", "QuantizeLinear"),
    )
)
BROADCAST = frozenset(("Add", "Sub", "Mul", "Div", "Where", "Pow", "Min", "Max", "Sum"))


class Dims:
    """Shapes of one graph's tensors, each worked out once."""

    def __init__(self) -> None:
        self._known: dict[int, Shape | None] = {}
        self._joins: dict[tuple[str, ...], str] = {}
        self._alive: list[gs.Tensor] = []  # ids name tensors only while they live

    def of(self, tensor: gs.Tensor, depth: int = _DEEPEST) -> Shape | None:
        """The tensor's dimensions; None where not even their number is known."""
        if isinstance(tensor, gs.Constant):
            return tuple(int(d) for d in tensor.shape)
        if id(tensor) not in self._known:
            self._alive.append(tensor)
            self._known[id(tensor)] = self._find(tensor, depth)
        return self._known[id(tensor)]

    def assume(self, tensor: gs.Tensor, axis: int, length: int) -> None:
        """Let a dimension be what the tensor's reader proves it to be; axes count from the end."""
        shape = self.of(tensor)
        if shape is not None and len(shape) >= axis:
            self._known[id(tensor)] = (
                *shape[: len(shape) - axis],
                length,
                *shape[len(shape) - axis + 1 :],
            )

    def values(self, tensor: gs.Tensor, depth: int = _DEEPEST) -> list[Dim] | None:
        """The content of a tensor of whole numbers of rank 0 or 1: a shape or a part of one."""
        if isinstance(tensor, gs.Constant):
            content = array(tensor) if math.prod(tensor.shape) <= 64 else None
            whole = content is not None and content.dtype.kind in "iub"
            return [int(v) for v in content.reshape(-1)] if whole and content is not None else None
        node = producer(tensor)
        rule = _VALUES.get(node.op) if node is not None and not node.domain else None
        return rule(self, node, depth - 1) if rule is not None and depth else None

    def _find(self, tensor: gs.Tensor, depth: int) -> Shape | None:
        own = _own(tensor)
        node = producer(tensor)
        if (own is not None and all(map(_is_sure, own))) or node is None or not depth:
            return own
        found = self._made(node, tensor, depth - 1)
        if own is None or found is None or len(own) != len(found):
            return found if own is None else own
        return tuple(a if _is_sure(a) else b for a, b in zip(own, found, strict=True))

    def _made(self, node: gs.Node, tensor: gs.Tensor, depth: int) -> Shape | None:
        if node.op in _SAME_SHAPE:
            return self.of(node.inputs[0], depth) if node.outputs[0] is tensor else None
        if node.op in BROADCAST:
            return self.broadcast([self.of(t, depth) for t in node.inputs])
        rule = _SHAPES.get(node.op)
        return rule(self, node, depth) if rule is not None and not node.domain else None

    def broadcast(self, shapes: Sequence[Shape | None]) -> Shape | None:
        """The shape that several broadcast to."""
        if any(s is None for s in shapes):
            return None
        known = [s for s in shapes if s is not None]
        rank = max(map(len, known))
        padded = [(1,) * (rank - len(s)) + s for s in known]
        return tuple(self._joined(dims) for dims in zip(*padded, strict=True))

    def _joined(self, dims: Sequence[Dim]) -> Dim:
        """Of dimensions that broadcast together: the number that is not 1, or the one name."""
        numbers = [d for d in dims if isinstance(d, int) and d != 1]
        names = tuple(sorted({d for d in dims if isinstance(d, str)}))
        if numbers:
            return numbers[0]
        if len(names) < 2:
            return names[0] if names else 1
        # A name of its own, or names of names would double in length from layer to layer.
        return self._joins.setdefault(names, f"?joined.{len(self._joins)}")


def _own(tensor: gs.Tensor) -> Shape | None:
    """What inference found; each dimension it did not find gets a name."""
    if tensor.shape is None:
        return None
    return tuple(_named(d, tensor.name, i) for i, d in enumerate(tensor.shape))


def _named(dim: Any, name: str, axis: int) -> Dim:
    if isinstance(dim, int) and dim >= 0:
        return dim
    return dim if isinstance(dim, str) and dim not in ("", "?") else f"?{name}.{axis}"


def _is_sure(dim: Dim) -> bool:
    """Neither unknown nor one of inference's makeshift names."""
    return isinstance(dim, int) or not dim.startswith(("?", "unk__"))


def _transpose(dims: Dims, node: gs.Node, depth: int) -> Shape | None:
    shape, perm = dims.of(node.inputs[0], depth), perm_of(node)
    if perm is None:
        return None
    if shape is None:
        return tuple(f"?{node.outputs[0].name}.{i}" for i in range(len(perm)))
    return tuple(shape[i] for i in perm) if len(perm) == len(shape) else None


def _reshape(dims: Dims, node: gs.Node, depth: int) -> Shape | None:
    target, shape = dims.values(node.inputs[1], depth), dims.of(node.inputs[0], depth)
    if target is None:
        return None
    out = list(target)
    for axis, dim in enumerate(target):
        if dim == 0 and not node.attrs.get("allowzero", 0):
            if shape is None or axis >= len(shape):
                return None
            out[axis] = shape[axis]
    if -1 in out:
        axis = out.index(-1)
        rest = None if shape is None else quotient(shape, out[:axis] + out[axis + 1 :])
        out[axis] = f"?{node.outputs[0].name}.{axis}" if rest is None else rest
    return tuple(out)


def quotient(shape: Sequence[Dim], others: Sequence[Dim]) -> Dim | None:
    """What `others` must be multiplied by to hold as much as `shape`, if that is one dimension."""
    names = Counter(d for d in shape if isinstance(d, str))
    names.subtract(Counter(d for d in others if isinstance(d, str)))
    left = [name for name, count in names.items() for _ in range(count)]
    have, want = (math.prod(d for d in s if isinstance(d, int)) for s in (others, shape))
    if min(names.values(), default=0) < 0 or len(left) > 1 or not have or want % have:
        return None
    number = want // have
    if left:
        return left[0] if number == 1 else None
    return number


def _matmul(dims: Dims, node: gs.Node, depth: int) -> Shape | None:
    a, b = dims.of(node.inputs[0], depth), dims.of(node.inputs[1], depth)
    if b is None or len(b) < 2 or (a is not None and len(a) < 2):
        return None
    if a is None:
        return None
    batch = dims.broadcast([a[:-2], b[:-2]])
    return None if batch is None else (*batch, a[-2], b[-1])


def _gemm(dims: Dims, node: gs.Node, depth: int) -> Shape | None:
    a, b = dims.of(node.inputs[0], depth), dims.of(node.inputs[1], depth)
    if a is None or b is None or len(a) != 2 or len(b) != 2:
        return None
    return a[1 if node.attrs.get("transA", 0) else 0], b[0 if node.attrs.get("transB", 0) else 1]


def _conv(dims: Dims, node: gs.Node, depth: int) -> Shape | None:
    weight = constant_operand(node, 1)
    if weight is None:
        return None
    name = node.outputs[0].name
    return (f"?{name}.0", weight.shape[0], *(f"?{name}.{i}" for i in range(2, len(weight.shape))))


def _expand(dims: Dims, node: gs.Node, depth: int) -> Shape | None:
    target = dims.values(node.inputs[1], depth)
    return dims.broadcast(
        [dims.of(node.inputs[0], depth), None if target is None else tuple(target)]
    )


def axes_of(dims: Dims, node: gs.Node) -> list[int] | None:
    """The axes of a Squeeze or Unsqueeze: an attribute before opset 13, an input since."""
    if node.attrs.get("axes") is not None:
        return [int(a) for a in node.attrs["axes"]]
    values = dims.values(node.inputs[1]) if len(node.inputs) > 1 else None
    if values is None or not all(isinstance(v, int) for v in values):
        return None
    return [int(v) for v in values]


def _unsqueeze(dims: Dims, node: gs.Node, depth: int) -> Shape | None:
    shape, axes = dims.of(node.inputs[0], depth), axes_of(dims, node)
    if shape is None or axes is None:
        return None
    rank = len(shape) + len(axes)
    new = {a % rank for a in axes}
    rest = iter(shape)
    return tuple(1 if i in new else next(rest) for i in range(rank))


def _squeeze(dims: Dims, node: gs.Node, depth: int) -> Shape | None:
    shape, axes = dims.of(node.inputs[0], depth), axes_of(dims, node)
    if shape is None or axes is None:
        return None
    gone = {a % len(shape) for a in axes}
    return tuple(d for i, d in enumerate(shape) if i not in gone)


def _concat(dims: Dims, node: gs.Node, depth: int) -> Shape | None:
    shapes = [dims.of(t, depth) for t in node.inputs]
    known = [s for s in shapes if s is not None]
    if len(known) != len(shapes) or len({len(s) for s in known}) != 1:
        return None
    out, axis = list(known[0]), int(node.attrs["axis"]) % len(known[0])
    along = [s[axis] for s in known]
    numbers = [d for d in along if isinstance(d, int)]
    out[axis] = sum(numbers) if len(numbers) == len(along) else f"?{node.outputs[0].name}.{axis}"
    return tuple(out)


_SHAPES: dict[str, Callable[[Dims, gs.Node, int], Shape | None]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "MatMul": _matmul,
    "Gemm": _gemm,
    "Conv": _conv,
    "Expand": _expand,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
}


def _shape_values(dims: Dims, node: gs.Node, depth: int) -> list[Dim] | None:
    shape = dims.of(node.inputs[0], depth)
    if shape is None:
        return None
    return list(shape[node.attrs.get("start", 0) : node.attrs.get("end", None)])


def _passed(dims: Dims, node: gs.Node, depth: int) -> list[Dim] | None:
    return dims.values(node.inputs[0], depth)


def _gathered(dims: Dims, node: gs.Node, depth: int) -> list[Dim] | None:
    data, at = dims.values(node.inputs[0], depth), dims.values(node.inputs[1], depth)
    if data is None or at is None or node.attrs.get("axis", 0) != 0:
        return None
    return [data[i] for i in at if isinstance(i, int) and -len(data) <= i < len(data)]


def _sliced(dims: Dims, node: gs.Node, depth: int) -> list[Dim] | None:
    data = dims.values(node.inputs[0], depth)
    limits = [dims.values(t, depth) for t in node.inputs[1:3]]
    steps = dims.values(node.inputs[4], depth) if len(node.inputs) > 4 else [1]
    if data is None or steps is None or len(limits) != 2:
        return None
    start, end = (v[0] if v else None for v in limits)
    if not isinstance(start, int) or not isinstance(end, int) or not isinstance(steps[0], int):
        return None
    return data[slice(start, end, steps[0])]


def _concatenated(dims: Dims, node: gs.Node, depth: int) -> list[Dim] | None:
    parts = [dims.values(t, depth) for t in node.inputs]
    known = [p for p in parts if p is not None]
    return [v for p in known for v in p] if len(known) == len(parts) else None


def _filled(dims: Dims, node: gs.Node, depth: int) -> list[Dim] | None:
    length = dims.values(node.inputs[0], depth)
    if length is None or len(length) != 1 or not isinstance(length[0], int) or length[0] > 64:
        return None
    value = node.attrs.get("value")
    content = array(value) if value is not None else np.zeros(1)
    return [int(content.reshape(-1)[0])] * length[0]


def _compared(dims: Dims, node: gs.Node, depth: int) -> list[Dim] | None:
    pair = _pair(dims, node, depth)
    if pair is None:
        return None
    # A named dimension is some length. It is itself, and it is not -1; no more is known.
    if any(str in (type(a), type(b)) and a != b and -1 not in (a, b) for a, b in pair):
        return None
    return [int(a == b) for a, b in pair]


def _chosen(dims: Dims, node: gs.Node, depth: int) -> list[Dim] | None:
    condition, *rest = (dims.values(t, depth) for t in node.inputs)
    if condition is None or any(r is None or len(r) != len(condition) for r in rest):
        return None
    first, second = (r for r in rest if r is not None)
    return [a if c else b for c, a, b in zip(condition, first, second, strict=True)]


def _calculated(dims: Dims, node: gs.Node, depth: int) -> list[Dim] | None:
    pair = _pair(dims, node, depth)
    if pair is None:
        return None
    out: list[Dim] = []
    for a, b in pair:
        if not isinstance(a, int) or not isinstance(b, int) or (node.op == "Div" and b <= 0):
            return None
        out.append({"Add": a + b, "Sub": a - b, "Mul": a * b}.get(node.op, a // max(b, 1)))
    return out


def _pair(dims: Dims, node: gs.Node, depth: int) -> list[tuple[Dim, Dim]] | None:
    a, b = (dims.values(t, depth) for t in node.inputs)
    if not a or not b or (len(a) != len(b) and 1 not in (len(a), len(b))):
        return None
    length = max(len(a), len(b))
    a, b = (v * length if len(v) == 1 else v for v in (a, b))
    return list(zip(a, b, strict=True))


_VALUES: dict[str, Callable[[Dims, gs.Node, int], list[Dim] | None]] = {
    "Shape": _shape_values,
    **dict.fromkeys(("Identity", "Cast", "Unsqueeze", "Squeeze"), _passed),
    "Gather": _gathered,
    "Slice": _sliced,
    "Concat": _concatenated,
    "ConstantOfShape": _filled,
    "Equal": _compared,
    "Where": _chosen,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _calculated),
}
