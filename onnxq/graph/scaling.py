"""What a constant is behind its rescalings: values and largest magnitudes, when asked for.

Factors of several rescalings are kept apart by the axes they run along and applied in one order,
each value rounded once, so that it does not matter which came first.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxq import products
from onnxq.graph.query import ConstantOperand
from onnxq.graph.weights import Array, Values, before_cast, constant_type, original
from onnxq.products import Axes, Factors


@dataclass(frozen=True)
class Scaling:
    """A constant, laid out anew and multiplied by factors.

    Attributes:
        source: what it is made of; its values before any cast of the base precision.
        permutation: axes of the source, None as they are.
        shape: of the result; the source is broadcast to it.
        factors: by the axes they vary along; each of the result's rank.
        known: what `peaks` has found, but for factors along the kept axes alone.
    """

    source: gs.Constant
    permutation: tuple[int, ...] | None
    shape: tuple[int, ...]
    factors: dict[Axes, Factors] = field(default_factory=dict)
    known: dict[Axes, Factors] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, constant: gs.Constant) -> Scaling:
        """What a constant is now."""
        found = getattr(constant._values, "scaling", None)
        if isinstance(found, Scaling):
            return found
        values = before_cast(constant)._values
        known = values.peaks if isinstance(values, Values) else {}
        return cls(constant, None, tuple(int(d) for d in constant.shape), known=known)

    def transposed(self, permutation: tuple[int, ...] | None) -> Scaling:
        """The same behind a Transpose."""
        if permutation is None:
            return self
        before = self.permutation or tuple(range(len(permutation)))
        factors = [f.transpose(permutation) for f in self.factors.values()]
        return Scaling(
            self.source,
            tuple(before[i] for i in permutation),
            tuple(self.shape[i] for i in permutation),
            {_varying(f): f for f in factors},
        )

    def times(self, factor: Factors) -> Scaling:
        """Multiplied once more; a factor of more axes or longer ones makes the result larger."""
        shape = np.broadcast_shapes(self.shape, factor.shape)
        factors = [f.reshape(padded(f.shape, len(shape))) for f in self.factors.values()]
        made = {_varying(f): f for f in factors}
        factor = factor.reshape(padded(factor.shape, len(shape)))
        key = _varying(factor)
        made[key] = made[key] * factor if key in made else factor
        # A copy: other threads may be looking at this constant, ahead of whoever rescales it.
        kept = dict(self.known) if tuple(shape) == self.shape else {}
        known = {axes: found for axes, found in kept.items() if _is_along(key, axes)}
        return Scaling(self.source, self.permutation, tuple(shape), made, known)

    def compute(self) -> Array:
        """The values: float32 (float64 of a float64 source), each rounded once."""
        return products.multiplied(self._values(), self.factors, self._dtype)

    def peaks(self, kept: Axes) -> Factors:
        """max |value| over the axes that are not kept, which remain with length 1.

        The values are read at the first call. Factors along kept axes multiply what was found: in
        float64 the order of factors may change a last bit, of which rounding leaves nothing but
        in one case of many millions.
        """
        outside = {key for key in self.factors if _is_along(key, kept)}
        if kept not in self.known:
            within = {k: f for k, f in self.factors.items() if k not in outside}
            self.known[kept] = products.largest(self._values(), within, kept)
        found = self.known[kept]
        for key in sorted(outside):
            found = found * self.factors[key]
        with np.errstate(over="ignore"):
            return np.asarray(found.astype(self._dtype).astype(np.float64))

    @property
    def _dtype(self) -> np.dtype[Any]:
        double = constant_type(before_cast(self.source)) == onnx.TensorProto.DOUBLE
        return np.dtype(np.float64 if double else np.float32)

    def _values(self) -> Array:
        values = original(self.source)
        if self.permutation is not None:
            values = values.transpose(self.permutation)
        return np.broadcast_to(values, self.shape)


def peaks(operand: ConstantOperand, kept: Axes) -> Factors:
    """max |value| of a constant over the axes, as the node sees it, that are not kept.

    Values are those before any cast of the base precision; NaN where one is NaN. Read once: what
    was found is kept with the constant, and follows where it is rescaled along the kept axes.

    Returns:
        float64, of the operand's rank, with length 1 where an axis is not kept.
    """
    scaling, order = Scaling.of(before_cast(operand.constant)), operand.permutation
    if order is None:
        return scaling.peaks(kept)
    stored = scaling.peaks(tuple(kept[order.index(axis)] for axis in range(len(order))))
    return stored.transpose(order)


def padded(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """A shape with leading axes of length 1."""
    return (1,) * (rank - len(shape)) + tuple(shape)


def _varying(factor: Factors) -> Axes:
    return tuple(d > 1 for d in factor.shape)


def _is_along(axes: Axes, kept: Axes) -> bool:
    """Whether all of the axes are kept."""
    return all(keep for axis, keep in zip(axes, kept, strict=True) if axis)
