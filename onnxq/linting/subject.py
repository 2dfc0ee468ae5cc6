"""A model as the rules see it: types, quantizers, products and attentions, found once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from onnxq.gpus import Target
from onnxq.graph.attention import Attention, attentions
from onnxq.graph.elements import Elements, element_types
from onnxq.graph.ir import Constant, Node, Tensor
from onnxq.graph.model import Model
from onnxq.graph.qdq import MOVING, Operand, Quantizer, built_in, factor, operand, quantizer
from onnxq.graph.query import producer

_LONGEST = 12
"""Nodes to walk back from an attention's operand."""
_KINDS = {
    "MatMul": "linear",
    "Gemm": "linear",
    "Conv": "conv",
    "ConvTranspose": "transposed conv",
    "Einsum": "einsum",
}


@dataclass(frozen=True)
class Product:
    """A node that multiplies its first two inputs.

    Attributes:
        kind: `linear`, `conv`, `transposed conv` or `einsum`.
    """

    node: Node
    kind: str
    left: Operand
    right: Operand

    @property
    def operands(self) -> tuple[Operand, Operand]:
        """Both."""
        return self.left, self.right

    @property
    def weight(self) -> Operand | None:
        """The operand made of constants, the second of two."""
        return next((o for o in (self.right, self.left) if o.constant), None)

    @property
    def activation(self) -> Operand | None:
        """The computed operand, the first of two."""
        return next((o for o in self.operands if not o.constant), None)

    def output_axis(self, of: Operand) -> int | None:
        """Axis of an operand that runs over output channels; None where its rank is unknown."""
        if self.kind in ("conv", "transposed conv"):
            return 0 if self.kind == "conv" else 1
        if self.node.op == "Gemm":
            if of is self.right:
                return 0 if self.node.attrs.get("transB", 0) else 1
            return 1 if self.node.attrs.get("transA", 0) else 0
        rank = rank_of(of)
        if rank is None or rank < 2:
            return None
        return rank - 1 if of is self.right else rank - 2


def rank_of(operand: Operand) -> int | None:
    """Rank of a product's input, from the codes' where shape inference did not get there."""
    if operand.tensor.shape is not None:
        return len(operand.tensor.shape)
    if operand.source is None or any(n.op != "Transpose" for n in operand.path):
        return None
    shape = operand.source.node.inputs[0].shape
    return None if shape is None else len(shape)


@dataclass
class Subject:
    """A model under lint.

    Attributes:
        notes: what the rules have to say that is no finding.
    """

    model: Model
    target: Target
    notes: list[str] = field(default_factory=list)
    _operands: dict[int, Operand] = field(default_factory=dict)

    @cached_property
    def types(self) -> Elements:
        """Tensor name -> type word, '?' where unknown."""
        return element_types(self.model)

    def operand(self, tensor: Tensor) -> Operand:
        """What stands behind an input of a product."""
        if id(tensor) not in self._operands:
            self._operands[id(tensor)] = operand(tensor, self.types)
        return self._operands[id(tensor)]

    def is_fixed(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on constants alone."""
        return built_in(tensor, self.types)

    def type(self, tensor: Tensor) -> str:
        """The type word of a tensor."""
        return self.types.get(tensor.name, "?")

    @property
    def nodes(self) -> list[Node]:
        """Nodes of the graph, in its order."""
        return list(self.model.graph.nodes)

    @cached_property
    def quantizers(self) -> tuple[Quantizer, ...]:
        """Every QuantizeLinear and DequantizeLinear."""
        found = (quantizer(node, self.types) for node in self.model.graph.nodes)
        return tuple(q for q in found if q is not None)

    @cached_property
    def constants(self) -> tuple[Constant, ...]:
        """Constants that nodes read, each once."""
        found = {t.name: t for n in self.nodes for t in n.inputs if isinstance(t, Constant)}
        return tuple(found.values())

    @cached_property
    def attentions(self) -> tuple[Attention, ...]:
        """Attentions spelled out as two products and a softmax."""
        return tuple(attentions(self.model))

    @cached_property
    def in_attention(self) -> frozenset[int]:
        """Ids of the products of those attentions."""
        return frozenset(id(n) for a in self.attentions for n in (a.scores, a.values))

    @cached_property
    def cut(self) -> frozenset[int]:
        """Ids of the products that q, k and v of one attention are cut from."""
        found = set()
        for attention in self.attentions:
            tensors = (*attention.scores.inputs[:2], attention.values.inputs[1])
            parts = [_cut_from(t) for t in tensors]
            sources = {id(product) for product, _ in parts}
            if len(sources) == 1 and len({id(cut) for _, cut in parts if cut is not None}) == 3:
                found |= sources
        return frozenset(found)

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """Every product of two tensors, quantized or not."""
        return tuple(self._products())

    @cached_property
    def quantized(self) -> tuple[Product, ...]:
        """Products outside attention with an operand that is meant to be multiplied as codes."""
        return tuple(
            p
            for p in self.products
            if id(p.node) not in self.in_attention and any(is_meant(o) for o in p.operands)
        )

    def _products(self) -> Iterator[Product]:
        for node in self.nodes:
            kind = _KINDS.get(node.op)
            if kind is None or len(node.inputs) < 2 or (kind == "einsum" and len(node.inputs) > 2):
                continue
            left, right = (self.operand(t) for t in node.inputs[:2])
            if not (left.constant and right.constant):
                yield Product(node, kind, left, right)


def is_meant(operand: Operand) -> bool:
    """Whether an operand comes from codes with nothing between that changes what they mean.

    A factor or a Cast in the way does not change that; an activation function does.
    """
    if operand.source is None:
        return False
    return operand.reaches or all(
        n.op in MOVING or n.op == "Cast" or (n.op in ("Mul", "Div") and _by_constant(n))
        for n in operand.path
    )


def _by_constant(node: Node) -> bool:
    return factor(node) is not None or any(isinstance(t, Constant) for t in node.inputs)


def _cut_from(tensor: Tensor) -> tuple[Node | None, Tensor | None]:
    """The MatMul that a tensor is a part of, moved, scaled, with a bias at most; and the part.

    Behind a second bias the compiler leaves the weight whole.
    """
    node, cut, biases = producer(tensor), None, 0
    for _ in range(_LONGEST):
        if node is None:
            break
        if node.op in ("MatMul", "Gemm"):
            return node, cut
        if node.op in MOVING:
            cut = tensor if node.op in ("Slice", "Gather", "Split") else cut
            tensor = node.inputs[0]
        elif node.op in ("Mul", "Div") and factor(node) is not None:
            tensor = next(t for t in node.inputs if not isinstance(t, Constant))
        elif node.op == "Add" and not biases and any(isinstance(t, Constant) for t in node.inputs):
            biases += 1
            tensor = next((t for t in node.inputs if not isinstance(t, Constant)), tensor)
        else:
            break
        node = producer(tensor)
    return None, None
