"""Which constants can take a factor per channel of a tensor, so that no operator has to.

`x / s` is computed by dividing what makes x, as far up as every step between only passes the factor
on: a product takes it in either operand, a sum in both, a norm in its gain and bias, a matrix
product in the columns of its right operand, layout operators move it. It ends in constants, or at
the first thing that is not linear, or that something else reads as well.

An index says which channel of s each value of a tensor belongs to (-1: to none). It is an array
aligned with the tensor's last axes, 1 long where all values belong to the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.graph.dims import BROADCAST, Dims
from onnxq.graph.model import Model
from onnxq.graph.query import constant_operand, label, live_nodes, producer
from onnxq.graph.rescale import check_float

Index = NDArray[np.int64]

_DEEPEST = 60
"""Nodes between a tensor and a constant that takes its factor, at most."""


class StopError(Exception):
    """A factor cannot be passed on; the message says where and why."""


@dataclass(frozen=True)
class Part:
    """A constant that takes factors.

    Attributes:
        node, input: where it is read.
        index: broadcast against the constant as the node sees it.
        multiply: it is multiplied by s; else divided.
    """

    node: gs.Node
    input: int
    index: Index
    multiply: bool = False


@dataclass
class Trace:
    """What takes the factors of a tensor.

    Attributes:
        parts: constants.
        ties: pairs of indices whose channels must share a value, one by one.
        scaled: the tensors whose values change on the way, nearest first, with their indices.
    """

    parts: list[Part] = field(default_factory=list)
    ties: list[tuple[Index, Index]] = field(default_factory=list)
    scaled: list[tuple[gs.Tensor, Index]] = field(default_factory=list)

    def __add__(self, other: Trace) -> Trace:
        return Trace(self.parts + other.parts, self.ties + other.ties, self.scaled + other.scaled)


Rule = Callable[["Absorber", gs.Node, gs.Tensor, Index], Trace]

RULES: dict[tuple[str, str], Rule] = {}
"""(domain, operator) -> how a factor of an output is passed on."""


def rule(*ops: str, domain: str = "") -> Callable[[Rule], Rule]:
    """Register how a factor passes through operators."""

    def register(function: Rule) -> Rule:
        RULES.update({(domain, op): function for op in ops})
        return function

    return register


class Absorber:
    """Follows factors upwards through one graph."""

    def __init__(self, model: Model) -> None:
        self.model, self.dims = model, Dims()
        self._kept = {t.name: "an output of the model" for t in model.graph.outputs}
        if model.captures:
            self._kept |= dict.fromkeys(model.captured_names(), "read by a subgraph")
        self._live: set[int] | None = None
        self._depth = 0

    def tensor(self, tensor: gs.Tensor, index: Index, readers: Sequence[gs.Node]) -> Trace:
        """Who can divide a computed tensor by s[index], given that `readers` expect it so.

        Raises:
            StopError: nobody can.
        """
        index = trimmed(index)
        if (index < 0).all():
            return Trace()
        self._check_readers(tensor, index, readers)
        node = producer(tensor)
        if node is None:
            raise StopError(f"{tensor.name!r} is an input of the model")
        found = RULES.get((node.domain or "", node.op))
        if found is None:
            raise StopError(f"{node.op} {label(node)!r} passes no factor on")
        self._depth += 1
        if self._depth > _DEEPEST:
            raise StopError(f"no constant near {tensor.name!r} can take it")
        try:
            trace = found(self, node, tensor, index)
        finally:
            self._depth -= 1
        return Trace(scaled=[(tensor, index)]) + trace

    def operand(self, node: gs.Node, i: int, index: Index) -> Trace:
        """As `tensor`, of input `i` of a node, which may be a constant."""
        if constant_operand(node, i) is not None:
            reason = check_float(node, i)
            if reason:
                raise StopError(reason)
            return Trace([Part(node, i, trimmed(index))])
        return self.tensor(node.inputs[i], index, [node])

    def spread(self, node: gs.Node, i: int, index: Index) -> Trace:
        """As `operand`, of an elementwise node, which may broadcast it.

        A constant may grow to a value per channel, but to no more than it or they are.
        """
        index = trimmed(index)
        operand = constant_operand(node, i)
        if operand is not None:
            grown = math.prod(np.broadcast_shapes(operand.shape, index.shape))
            if grown > max(math.prod(operand.shape), index.size):
                raise StopError(f"{operand.constant.name!r} has other axes than the channels")
            return self.operand(node, i, index)
        self.require(node.inputs[i], index)
        return self.operand(node, i, index)

    def require(self, tensor: gs.Tensor, index: Index) -> None:
        """A computed tensor has a value for each entry of the index, none broadcast."""
        shape = self.dims.of(tensor)
        if shape is None and self._is_spread_by_constant(tensor, index):
            return
        if shape is None or len(shape) < index.ndim:
            raise StopError(f"the shape of {tensor.name!r} is unknown, or it has too few axes")
        for dim, length in zip(shape[len(shape) - index.ndim :], index.shape, strict=True):
            if length > 1 and dim != length:
                raise StopError(f"{tensor.name!r} has {dim} values where {length} are rescaled")

    def _is_spread_by_constant(self, tensor: gs.Tensor, index: Index) -> bool:
        """Whether a constant operand alone gives the tensor a value for each entry."""
        node = producer(tensor)
        if node is None or node.op not in BROADCAST:
            return False
        shapes = [tuple(t.shape)[-index.ndim :] for t in node.inputs if isinstance(t, gs.Constant)]
        return any(
            len(shape) == index.ndim
            and all(a in (1, b) for a, b in zip(index.shape, shape, strict=True))
            for shape in shapes
        )

    def rank(self, tensor: gs.Tensor) -> int:
        """How many axes a tensor has."""
        shape = self.dims.of(tensor)
        if shape is None:
            raise StopError(f"the shape of {tensor.name!r} is unknown")
        return len(shape)

    def padded(self, tensor: gs.Tensor, index: Index) -> Index:
        """The index with as many axes as the tensor has."""
        return to_rank(index, self.rank(tensor))

    def channels(self, tensor: gs.Tensor, index: Index, rank: int) -> Index:
        """The index along axis 1 of a tensor of `rank` axes, as one vector."""
        full = to_rank(index, rank)
        if full.size != full.shape[1]:
            raise StopError(f"{tensor.name!r} is to be rescaled along other axes than channels")
        return full.reshape(-1)

    def _check_readers(self, tensor: gs.Tensor, index: Index, readers: Sequence[gs.Node]) -> None:
        if tensor.name in self._kept:
            raise StopError(f"{tensor.name!r} is {self._kept[tensor.name]}")
        for reader in readers:
            if sum(t is tensor for t in reader.inputs) != 1:
                raise StopError(f"{reader.op} {label(reader)!r} reads {tensor.name!r} twice")
        for consumer in tensor.outputs:
            known = any(consumer is r for r in readers) or consumer.op in ("Shape", "Size")
            if known or not self._is_live(consumer) or self._is_untouched(consumer, tensor, index):
                continue
            raise StopError(f"{tensor.name!r} is read by {consumer.op} {label(consumer)!r} too")

    def _is_live(self, node: gs.Node) -> bool:
        if self._live is None:
            self._live = live_nodes(self.model)
        return id(node) in self._live

    def _is_untouched(self, consumer: gs.Node, tensor: gs.Tensor, index: Index) -> bool:
        """Whether it takes only values that are not rescaled."""
        if not (index < 0).any() or consumer.inputs[0] is not tensor:
            return False
        taken = TAKES.get(consumer.op)
        try:
            picked = taken(self, consumer, index) if taken and not consumer.domain else None
        except StopError:
            return False
        return picked is not None and bool((picked < 0).all())


TAKES: dict[str, Callable[[Absorber, gs.Node, Index], Index]] = {}
"""Operator -> the index of what it takes from its first input."""


def trimmed(index: Index) -> Index:
    """The index without leading axes of length 1."""
    while index.ndim > 1 and index.shape[0] == 1:
        index = index[0]
    return index


def to_rank(index: Index, rank: int) -> Index:
    """The index with leading axes of length 1, `rank` in all."""
    index = trimmed(index)
    if index.ndim > rank:
        raise StopError("a factor has more axes than the tensor")
    return index.reshape((1,) * (rank - index.ndim) + index.shape)
