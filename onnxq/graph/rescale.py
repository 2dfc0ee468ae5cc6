"""Constants multiplied by factors when they are read or written; nothing is loaded before.

A rescaled constant is a new one: codes made of the old one later (weights are quantized while the
model is written) still find what they were computed for. Factors of several rescalings are kept
apart by the axes they run along and applied in one order, each value rounded once, so that it does
not matter which came first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.graph.dtypes import numpy_dtype, to_bytes
from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.query import ConstantOperand, constant_operand, label, type_number
from onnxq.graph.weights import (
    Array,
    DerivedValues,
    InlineValues,
    constant_type,
    original,
    payload_bytes,
)
from onnxq.graph.wire import STRIP_THRESHOLD

Factors = NDArray[np.float64]

FLOATS = (
    onnx.TensorProto.FLOAT,
    onnx.TensorProto.FLOAT16,
    onnx.TensorProto.BFLOAT16,
    onnx.TensorProto.DOUBLE,
)
_PIECE = 1 << 20
"""Values multiplied at a time, in float64."""


@dataclass(frozen=True)
class Scaling:
    """A constant, laid out anew and multiplied by factors.

    Attributes:
        source: what it is made of; its values before any cast of the base precision.
        permutation: axes of the source, None as they are.
        shape: of the result; the source is broadcast to it.
        factors: by the axes they vary along; each of the result's rank.
    """

    source: gs.Constant
    permutation: tuple[int, ...] | None
    shape: tuple[int, ...]
    factors: dict[tuple[bool, ...], Factors] = field(default_factory=dict)

    @classmethod
    def of(cls, constant: gs.Constant) -> Scaling:
        """What a constant is now."""
        found = getattr(constant._values, "scaling", None)
        if isinstance(found, Scaling):
            return found
        return cls(constant, None, tuple(int(d) for d in constant.shape))

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
        factors = [f.reshape(_padded(f.shape, len(shape))) for f in self.factors.values()]
        known = {_varying(f): f for f in factors}
        factor = factor.reshape(_padded(factor.shape, len(shape)))
        key = _varying(factor)
        known[key] = known[key] * factor if key in known else factor
        return Scaling(self.source, self.permutation, tuple(shape), known)

    def compute(self) -> Array:
        """The values: float32 (float64 of a float64 source), each rounded once."""
        values = original(self.source)
        dtype = np.dtype(np.float64 if values.dtype == np.float64 else np.float32)
        if self.permutation is not None:
            values = values.transpose(self.permutation)
        values = np.broadcast_to(values, self.shape)
        out = np.empty(self.shape, dtype)
        if not self.shape:
            out[()] = self._product(values, slice(None))
            return out
        step = max(1, _PIECE // max(1, math.prod(self.shape[1:])))
        for start in range(0, self.shape[0], step):
            rows = slice(start, start + step)
            with np.errstate(over="ignore"):
                out[rows] = self._product(values[rows], rows)
        return out

    def _product(self, values: Array, rows: slice) -> Array:
        product = values.astype(np.float64)
        for key in sorted(self.factors):
            factor = self.factors[key]
            product *= factor[rows] if key and key[0] else factor
        return product


def _varying(factor: Factors) -> tuple[bool, ...]:
    return tuple(d > 1 for d in factor.shape)


def _padded(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (1,) * (rank - len(shape)) + tuple(shape)


class ScaledValues(DerivedValues):
    """A large rescaled constant. Quantization reads its float32 values, before 16 bits round them.

    Args:
        name, onnx_type: of the constant.
    """

    def __init__(self, name: str, onnx_type: int, scaling: Scaling) -> None:
        origin = None
        if onnx_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
            origin = gs.Constant(name, ScaledValues(name, onnx.TensorProto.FLOAT, scaling))
        super().__init__(
            name, onnx_type, scaling.shape, lambda: _typed(name, onnx_type, scaling), origin
        )
        self.scaling = scaling


class ScaledInline(InlineValues):
    """A small rescaled constant: its bytes stay in the graph."""

    def __init__(self, name: str, onnx_type: int, scaling: Scaling) -> None:
        tensor = onnx.TensorProto(name=name, data_type=onnx_type, dims=scaling.shape)
        tensor.raw_data = bytes(to_bytes(_typed(name, onnx_type, scaling), onnx_type))
        super().__init__(tensor)
        self.scaling = scaling


def _typed(name: str, onnx_type: int, scaling: Scaling) -> Array:
    wide = scaling.compute()
    with np.errstate(over="ignore"):
        values = wide.astype(numpy_dtype(onnx_type))
    if not np.array_equal(np.isfinite(values), np.isfinite(wide)):
        raise OnnxqError(
            f"weight {name!r} leaves the range of its type when it is rescaled",
            "rescale by less: Fold.bounds gives the limits",
        )
    return values


def is_rescaled(constant: gs.Constant) -> bool:
    """Whether a constant is another one multiplied by factors."""
    return isinstance(getattr(constant._values, "scaling", None), Scaling)


def source(constant: gs.Constant) -> gs.Constant:
    """The constant that one is a mere cast of; itself if it is none."""
    values = constant._values
    if isinstance(values, DerivedValues) and values.origin is not None:
        return constant if is_rescaled(constant) else values.origin
    return constant


def check_float(node: gs.Node, index: int) -> str:
    """Why the constant behind an input cannot be rescaled; '' where it can."""
    operand = constant_operand(node, index)
    if operand is None:
        return f"input {index} of {node.op} {label(node)!r} is no constant of floats"
    if constant_type(operand.constant) not in FLOATS:
        word = onnx.TensorProto.DataType.Name(constant_type(operand.constant))
        return f"{operand.constant.name!r} holds {word} values"
    return ""


def rescale(editor: Editor, node: gs.Node, index: int, factor: Factors) -> str:
    """Multiply the constant behind an input by `factor`, for this input alone.

    A constant that nothing else reads keeps its name and place; otherwise this input gets a copy.

    Args:
        factor: broadcast against the constant as the node sees it.

    Returns:
        The name of the copy; '' where none was needed.

    Raises:
        OnnxqError: there is no constant of floats.
    """
    reason = check_float(node, index)
    operand = constant_operand(node, index)
    if reason or operand is None:
        raise OnnxqError(f"{reason}: it cannot be rescaled", "rescale before weights are quantized")
    shape = np.broadcast_shapes(operand.shape, factor.shape)
    own = is_own(editor.model, node, index, operand)
    if not own or shape != operand.shape:
        scaling = Scaling.of(operand.constant).transposed(operand.permutation).times(factor)
        onnx_type = type_number(node.inputs[index]) or constant_type(operand.constant)
        keeps_name = own and not operand.through
        name = operand.constant.name if keeps_name else _copy_name(editor, operand.constant.name)
        editor.replace_input(node, index, _constant(name, onnx_type, scaling))
        return "" if keeps_name else name
    if operand.permutation is not None:
        back = tuple(int(i) for i in np.argsort(operand.permutation))
        factor = factor.reshape(_padded(factor.shape, len(back))).transpose(back)
    scaling = Scaling.of(operand.constant).times(factor)
    new = _constant(operand.constant.name, constant_type(operand.constant), scaling)
    if operand.through:
        editor.replace_input(operand.through[0], 0, new)
    else:
        editor.replace_input(node, index, new)
    return ""


def _copy_name(editor: Editor, name: str) -> str:
    return editor.unique(f"{name.removesuffix('_folded')}_folded")


def _constant(name: str, onnx_type: int, scaling: Scaling) -> gs.Constant:
    small = payload_bytes(onnx_type, scaling.shape) < STRIP_THRESHOLD
    values: Any = (ScaledInline if small else ScaledValues)(name, onnx_type, scaling)
    return gs.Constant(name, values)


def is_own(model: Model, node: gs.Node, index: int, operand: ConstantOperand) -> bool:
    """Whether nothing but this input reads the constant, or any node on the way to it."""
    kept = model.captured_names() | {t.name for t in model.graph.outputs}
    tensors = [operand.constant, *(t for n in operand.through for t in n.outputs)]
    if any(t.name in kept for t in tensors):
        return False
    return all(len(t.outputs) == 1 for t in tensors)


def largest(operand: ConstantOperand, index: NDArray[np.int64], size: int) -> Factors:
    """max |value| for each channel.

    Args:
        index: the channel of each value, broadcast against the operand; -1 for none.
        size: how many channels there are.

    Returns:
        float64 [size]; 0 for channels that no value has.
    """
    shape = np.broadcast_shapes(operand.shape, index.shape)
    values = np.broadcast_to(operand.load(), shape)
    # Without its sign bit, a 16-bit number is the larger the larger the integer of its bits.
    half = values.dtype.itemsize == 2
    magnitude = np.bitwise_and(values.view(np.uint16), 0x7FFF) if half else np.abs(values)
    index = index.reshape(_padded(index.shape, len(shape)))
    constant_axes = tuple(i for i, d in enumerate(index.shape) if d == 1)
    peaks = (
        magnitude.max(axis=constant_axes, keepdims=True, initial=0) if constant_axes else magnitude
    )
    if half:
        peaks = peaks.view(values.dtype)
    out = np.zeros(size + 1)
    np.maximum.at(out, index.reshape(-1), peaks.astype(np.float64).reshape(-1))
    return out[:size]
