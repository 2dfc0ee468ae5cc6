"""What QuantizeLinear and DequantizeLinear compute, and whether one of them undoes the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph.dtypes import Array
from onnxq.graph.query import scalar, type_word
from onnxq.graph.weights import array

_FLOATS = ("fp32", "fp16", "bf16", "fp64")
_NO_CODES = ("string", "complex64", "complex128", "bool", *_FLOATS)


def dequantize(codes: Array, scale: Array, zero: Array | None, axis: int, block: int) -> Array:
    """(codes - zero) * scale in FP32, as ONNX's DequantizeLinear has it.

    Args:
        block: elements along `axis` that share a scale; 0: none do.
    """
    wide = np.float64 if codes.dtype.itemsize > 2 else np.float32  # INT32 is more than FP32 holds
    values = np.asarray(codes.astype(wide))
    if zero is not None:
        values = values - _spread(zero, values, axis, block)
    return np.asarray(values * _spread(scale, values, axis, block), np.float32)


def _spread(part: Array, values: Any, axis: int, block: int) -> Any:
    """Scales or zero points in a shape that `values` can be multiplied by."""
    part = np.asarray(part).astype(values.dtype)
    if block:
        return np.repeat(part, block, axis=axis).take(range(values.shape[axis]), axis=axis)
    if part.size == 1:
        return part.reshape(())
    return part.reshape([-1 if a == axis % values.ndim else 1 for a in range(values.ndim)])


def fits(codes: gs.Constant, parts: Sequence[gs.Constant], axis: int, block: int) -> bool:
    """Whether these are codes, a float scale and maybe a zero point, of shapes that go together."""
    shape = tuple(codes.shape)
    if type_word(codes) in _NO_CODES or type_word(parts[0]) not in _FLOATS or len(parts) > 2:
        return False
    sizes = {tuple(p.shape) for p in parts}
    if not block and all(math.prod(size) == 1 for size in sizes):
        return True
    if not -len(shape) <= axis < len(shape) or len(sizes) > 1 or block < 0:
        return False
    length, (size,) = shape[axis], sizes
    if not block:
        return size == (length,)
    axis %= len(shape)
    return size == (*shape[:axis], -(-length // block), *shape[axis + 1 :])


def limits(scale: gs.Tensor, zero: gs.Tensor | None) -> tuple[float, float] | None:
    """What the lowest and the highest code stand for; None where that is not one number each."""
    step, word = scalar(scale), "uint8" if zero is None else type_word(zero)
    center = 0.0 if zero is None else scalar(zero)
    if step is None or center is None or not word.removeprefix("u").startswith("int"):
        return None
    bits = int(word.removeprefix("u").removeprefix("int"))
    low = 0 if word.startswith("u") else -(2 ** (bits - 1))
    return (low - center) * step, (low + 2**bits - 1 - center) * step


def same_scale(quantize: gs.Node, dequantize: gs.Node) -> bool:
    """Whether the two have the same scale, zero point and axis."""
    keys = ("axis", "block_size")
    if [quantize.attrs.get(k) for k in keys] != [dequantize.attrs.get(k) for k in keys]:
        return False
    if len(quantize.inputs) < 2 or len(dequantize.inputs) < 2:
        return False
    first, second = ([t for t in n.inputs[1:] if t.name] for n in (quantize, dequantize))
    if len(first) != len(second):
        return _same(first[0], second[0]) and all(_is_zero(t) for t in (*first[1:], *second[1:]))
    return all(map(_same, first, second))


def _same(first: gs.Tensor, second: gs.Tensor) -> bool:
    if first is second:
        return True
    if not isinstance(first, gs.Constant) or not isinstance(second, gs.Constant):
        return False
    a, b = array(first), array(second)
    return a.shape == b.shape and bool((a.astype(np.float64) == b.astype(np.float64)).all())


def _is_zero(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and not np.asarray(array(tensor), np.float64).any()
