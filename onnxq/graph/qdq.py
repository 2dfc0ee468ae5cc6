"""Reading Q/DQ: what quantizes a tensor, and what stands between a product and its codes.

Read-only, and without the weights: only shapes and types of what is large are looked at. The
parser of TensorRT looks at an operator's name alone, so com.microsoft's Q/DQ count here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph.elements import Elements, attribute_word, code_word
from onnxq.graph.query import producer, scalar
from onnxq.graph.weights import Array, array

MOVING = frozenset(
    (
        *("Identity", "Dropout", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"),
        *("Expand", "Tile", "Slice", "Gather", "Split", "DepthToSpace", "SpaceToDepth", "Neg"),
    )
)
"""Operators the compiler moves a DequantizeLinear across (tensorrt-rtx 1.7.1)."""

_SEEN_THROUGH = frozenset(
    (
        *("Relu", "LeakyRelu", "PRelu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh"),
        *("Elu", "Add", "Sub", "Mul", "Div", "Abs", "Max", "Min", "Pad", "Where", "Resize"),
        *("Upsample", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Swish"),
    )
)
"""What ends that movement. Looked through, so that a finding can name what stands in the way."""

_LONGEST_PATH = 12


@dataclass(frozen=True)
class Quantizer:
    """One QuantizeLinear or DequantizeLinear.

    Attributes:
        codes: type word of its codes.
        axis: of a scale with several values; counted from the front where the rank is known.
        block: elements a scale serves along `axis`; 0 without blocks.
        fixed: whether the scale is known when an engine is built.
    """

    node: gs.Node
    codes: str
    scale: gs.Tensor
    zero: gs.Tensor | None
    axis: int
    block: int
    fixed: bool

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """Shape of the scale; None where it is not known."""
        shape = self.scale.shape
        if shape is None or not all(isinstance(d, int) for d in shape):
            return None
        return tuple(int(d) for d in shape)

    @property
    def per_tensor(self) -> bool:
        """Whether one scale serves all: none known to be more counts as one."""
        shape = self.scale_shape
        return shape is None or math.prod(shape) == 1

    @property
    def blocked(self) -> bool:
        """Whether scales serve blocks."""
        shape = self.scale_shape
        return bool(self.block) or (shape is not None and len(shape) > 1 and math.prod(shape) > 1)


def quantizer(node: gs.Node, types: Elements) -> Quantizer | None:
    """What a node quantizes or dequantizes; None for other operators."""
    if node.op not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 2:
        return None
    rank = len(node.inputs[0].shape) if node.inputs[0].shape is not None else 0
    axis = int(node.attrs.get("axis", 1))
    return Quantizer(
        node,
        code_word(node, types),
        node.inputs[1],
        node.inputs[2] if len(node.inputs) > 2 and node.inputs[2].name else None,
        axis + rank if axis < 0 else axis,
        int(node.attrs.get("block_size", 0)),
        built_in(node.inputs[1], types) or _makes_scales(node.inputs[0]),
    )


def _makes_scales(codes: gs.Tensor) -> bool:
    """Whether an operator of TensorRT's own makes codes and the scales of their blocks (NVFP4)."""
    node = producer(codes)
    return node is not None and node.op.startswith("TRT_") and "DynamicQuantize" in node.op


def built_in(tensor: gs.Tensor, types: Elements) -> bool:
    """Whether a tensor depends on constants alone, so that it is known when an engine is built."""
    return isinstance(tensor, gs.Constant) or tensor.name in types.fixed


def constant_values(tensor: gs.Tensor | None) -> Array | None:
    """Values of a small constant, seen through Identity, Reshape and Cast; None if not constant.

    Casts are followed: FP32's 1e-9 is 0 once it is cast to FP16.
    """
    casts = []
    while tensor is not None and not isinstance(tensor, gs.Constant):
        node = producer(tensor)
        if node is None or node.op not in ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze"):
            return _of_constant_node(node)
        if node.op == "Cast":
            casts.append(attribute_word(node, "to"))
        tensor = node.inputs[0]
    if tensor is None:
        return None
    values = array(tensor)
    with np.errstate(over="ignore", invalid="ignore"):
        for word in reversed(casts):
            if word == "fp16":
                values = values.astype(np.float16)
    return values


def _of_constant_node(node: gs.Node | None) -> Array | None:
    value = node.attrs.get("value") if node is not None and node.op == "Constant" else None
    return array(value) if isinstance(value, gs.Constant) else None


@dataclass(frozen=True)
class Operand:
    """What stands behind an input of a product.

    Attributes:
        tensor: what the product reads.
        source: the DequantizeLinear it comes from; None where it comes from none.
        path: the nodes between, nearest to the product first.
        blocker: the first of these, from the codes on, that the compiler cannot move the
            DequantizeLinear across; None where it can.
        constant: whether the codes are constants (or made of a constant float).
    """

    tensor: gs.Tensor
    source: Quantizer | None
    path: tuple[gs.Node, ...]
    blocker: gs.Node | None
    constant: bool

    @property
    def codes(self) -> str:
        """Type word of the codes; '' where there are none."""
        return self.source.codes if self.source else ""

    @property
    def reaches(self) -> bool:
        """Whether the compiler can feed the codes to the product."""
        return self.source is not None and self.blocker is None

    def axis(self) -> int | None:
        """The axis of the source's scales as the product sees it; None where it cannot be told."""
        if self.source is None:
            return None
        axis: int | None = self.source.axis
        for node in reversed(self.path):
            axis = _moved(node, axis)
        return axis


def _moved(node: gs.Node, axis: int | None) -> int | None:
    if axis is None or node.op in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand"):
        return None
    if node.op == "Transpose":
        perm = node.attrs.get("perm")
        if perm is None:
            rank = len(node.inputs[0].shape or ())
            return rank - 1 - axis if rank else None
        return list(perm).index(axis) if axis in perm else None
    return axis


def operand(tensor: gs.Tensor, types: Elements) -> Operand:
    """Follow a product's input back to the DequantizeLinear it comes from."""
    return _follow(tensor, tensor, (), types)


def _follow(
    start: gs.Tensor, tensor: gs.Tensor, path: tuple[gs.Node, ...], types: Elements
) -> Operand:
    node = producer(tensor)
    none = Operand(start, None, path, None, built_in(start, types))
    if node is None or len(path) > _LONGEST_PATH:
        return none
    if node.op == "DequantizeLinear":
        found = quantizer(node, types)
        if found is None:
            return none
        blocker = next((n for n in reversed(path) if not _passes(n, found, types)), None)
        if blocker is None and _widened(tensor, path, types):
            blocker = next(n for n in path if n.op == "Cast")
        beside = [t for n in path for t in n.inputs[1:]]
        constant = all(built_in(t, types) for t in (node.inputs[0], *beside))
        return Operand(start, found, path, blocker, constant)
    if node.op in MOVING or node.op == "Cast":
        return _follow(start, node.inputs[0], (*path, node), types)
    if node.op == "Concat" or node.op in _SEEN_THROUGH:
        for source in node.inputs:
            if not isinstance(source, gs.Constant):
                found_here = _follow(start, source, (*path, node), types)
                if found_here.source is not None:
                    return found_here
    return none


def _passes(node: gs.Node, source: Quantizer, types: Elements) -> bool:
    """Whether the compiler moves `source` across this node."""
    if node.op in ("Neg", "Gather"):
        return source.per_tensor
    if node.op in MOVING or node.op == "Cast":
        return True
    if node.op == "MaxPool":
        return source.codes in ("int8", "uint8")  # the parser reads UINT8 as INT8
    if node.op in ("Mul", "Div"):
        return factor(node) is not None
    if node.op == "Concat":
        parts = [operand(t, types) for t in node.inputs]
        return all(p.reaches and _alike(p.source, source) for p in parts)
    return False


def _widened(made: gs.Tensor, path: tuple[gs.Node, ...], types: Elements) -> bool:
    """Whether Casts narrow to 16 bits and end in 32; what ends in 16 folds into the scale."""
    casts = [attribute_word(n, "to") for n in reversed(path) if n.op == "Cast"]
    words = [types.get(made.name, "?"), *casts]
    return words[-1] in ("fp32", "fp64") and not {"fp16", "bf16"}.isdisjoint(words)


def factor(node: gs.Node) -> float | None:
    """The one constant number a Mul or Div multiplies or divides by; None for anything else."""
    if all(isinstance(t, gs.Constant) for t in node.inputs):
        return None  # there is nothing that it scales
    if node.op == "Div":
        return scalar(node.inputs[1])
    found = [scalar(t) for t in node.inputs if isinstance(t, gs.Constant)]
    return next((value for value in found if value is not None), None)


def _alike(one: Quantizer | None, other: Quantizer) -> bool:
    """Whether two DequantizeLinear have the same format and the same single scale."""
    if one is None or one.codes != other.codes or not (one.per_tensor and other.per_tensor):
        return False
    if one.scale is other.scale:
        return True
    values = [constant_values(q.scale) for q in (one, other)]
    if values[0] is None or values[1] is None:
        return False
    return bool(np.array_equal(values[0].reshape(-1), values[1].reshape(-1)))


def same_scale(one: Quantizer, other: Quantizer) -> bool:
    """Whether two have the same format and single scale."""
    return _alike(one, other)


def quantize_node(source: Quantizer) -> gs.Node | None:
    """The QuantizeLinear that made a DequantizeLinear's codes, through moving operators."""
    tensor: Any = source.node.inputs[0]
    for _ in range(_LONGEST_PATH):
        node = producer(tensor)
        if node is None or node.op == "QuantizeLinear":
            return node
        if node.op not in MOVING:
            return None
        tensor = node.inputs[0]
    return None


def readers(tensor: gs.Tensor) -> Iterator[gs.Node]:
    """Nodes that read a tensor, each once."""
    yield from {id(n): n for n in tensor.outputs}.values()
