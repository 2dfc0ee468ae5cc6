"""Every layer as y = x W with one matrix W [K, N], which is what methods on weights work on.

Of a MatMul or Gemm, x is the last axis of its input. Of a convolution it is the patch under the
kernel (see `onnxq.unfolding`); one in groups has as many inputs of its own, each with its share of
the columns of W.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.formats import PerChannel, QuantScheme
from onnxq.graph.ir import Node
from onnxq.sites import Site
from onnxq.unfolding import Unfolding

Array = NDArray[Any]

_SOLVING = 40
"""Bytes a pair of inputs takes while a layer is worked on: H, its factor in double precision, and
what is copied on the way."""


@dataclass(frozen=True)
class Layout:
    """How the weight of a layer becomes W.

    Attributes:
        shape: of the weight, as the node sees it.
        axes: of the weight, in the order of W: inputs first, outputs last.
        unfolding: of a convolution.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]
    unfolding: Unfolding | None = None

    @property
    def channels(self) -> int:
        """Inputs next to each other along which zeros have a pattern: those of a tap, or all."""
        return self.unfolding.channels if self.unfolding else self.shape[self.axes[0]]

    @property
    def groups(self) -> int:
        """In how many parts the outputs read inputs of their own."""
        return self.unfolding.groups if self.unfolding else 1

    @property
    def length(self) -> int:
        """K: inputs that an output sums over."""
        return math.prod(self.shape[axis] for axis in self.axes[:-1])

    @property
    def statistic(self) -> str:
        """What calibration keeps of the input for second-order methods (see `statistics`)."""
        return f"patches:{self.unfolding}" if self.unfolding else "gram"

    @property
    def bytes_to_solve(self) -> int:
        """What a second-order method takes at its peak, about."""
        return _SOLVING * self.length**2

    def matrix(self, values: Array) -> Array:
        """W [K, N] of the weight."""
        ordered = values.transpose(self.axes).reshape(-1, self.shape[self.axes[-1]])
        return np.ascontiguousarray(ordered)

    def weight(self, matrix: Array) -> Array:
        """The weight of W."""
        shape = [self.shape[axis] for axis in self.axes]
        return matrix.reshape(shape).transpose(np.argsort(self.axes))

    def spread(self, values: Array) -> Array:
        """Codes of W as the weight's; scales, which only linear layers have in blocks, likewise."""
        if values.ndim < 2:
            return values
        return self.weight(values) if self.unfolding else values.transpose(self.axes)

    def scheme(self, scheme: QuantScheme) -> QuantScheme:
        """How W is divided into scales where the weight is divided so."""
        if self.axes == (1, 0):
            return scheme.transposed()
        if self.unfolding and isinstance(scheme.granularity, PerChannel):
            return replace(scheme, granularity=PerChannel(1))
        return scheme


def layout_of(site: Site) -> Layout:
    """The layout of a site that has a weight."""
    assert site.operand is not None
    return layout_under(site.node, site.operand.shape)


def layout_under(node: Node, shape: Sequence[int]) -> Layout:
    """The layout of a MatMul, Gemm or Conv.

    Args:
        shape: of its weight, as the node sees it.
    """
    shape = tuple(shape)
    if node.op == "Conv":
        taps = tuple(range(2, len(shape)))
        return Layout(shape, (*taps, 1, 0), _unfolding(node, shape))
    across = node.op == "Gemm" and bool(node.attrs.get("transB", 0))
    return Layout(shape, (1, 0) if across else (0, 1))


def _unfolding(node: Node, shape: tuple[int, ...]) -> Unfolding:
    _, channels, *kernel = shape
    rank = len(kernel)

    def given(name: str, count: int, default: int) -> tuple[int, ...]:
        return tuple(int(n) for n in node.attrs.get(name) or (default,) * count)

    word = node.attrs.get("auto_pad", "NOTSET")
    word = word.decode() if isinstance(word, bytes) else word
    pads: tuple[int, ...] | str = given("pads", 2 * rank, 0)
    if word in ("SAME_UPPER", "SAME_LOWER"):
        pads = word
    elif word == "VALID":
        pads = (0,) * 2 * rank
    return Unfolding(
        channels,
        tuple(kernel),
        int(node.attrs.get("group", 1)),
        given("strides", rank, 1),
        given("dilations", rank, 1),
        pads,
    )
