"""Which weights are zero in a file, whatever they are stored as."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.graph.query import joined_permutation, producer, type_word
from onnxq.graph.weights import array

_CODES = ("DequantizeLinear", "QuantizeLinear", "TRT_MXFP8DequantizeLinear")
_LAYOUT = ("Identity", "Cast", "Transpose")


@dataclass(frozen=True)
class StoredWeight:
    """The constant that holds a weight's values or codes.

    Attributes:
        permutation: axes of the Transposes between it and the product; None for none.
        zero: the code that stands for 0 where that is not 0 itself.
    """

    constant: gs.Constant
    permutation: tuple[int, ...] | None
    zero: gs.Constant | None

    @property
    def shape(self) -> tuple[int, ...]:
        """As the product sees it."""
        shape = tuple(int(d) for d in self.constant.shape)
        return shape if self.permutation is None else tuple(shape[i] for i in self.permutation)

    @property
    def form(self) -> str:
        """Type word of what is stored."""
        return type_word(self.constant)

    def zeros(self) -> NDArray[np.bool_]:
        """Where it is zero, as the product sees it; read from the file at each call."""
        values = array(self.constant)
        zero = values == 0
        if self.zero is not None:
            offsets = array(self.zero)
            if offsets.size == 1:
                zero = np.asarray(values.astype(np.int32) == int(offsets.reshape(-1)[0]))
            else:
                zero = _under_blocks(values, offsets)
        zero = np.asarray(zero)
        return zero if self.permutation is None else zero.transpose(self.permutation)


def _under_blocks(values: NDArray[np.generic], offsets: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Codes equal to the zero point of their channel or block."""
    wide = offsets.astype(np.int32)
    if wide.ndim != values.ndim:
        axis = next((a for a, d in enumerate(values.shape) if d == wide.size), -1)
        wide = wide.reshape(
            [-1 if a == axis else 1 for a in range(values.ndim)] if axis >= 0 else -1
        )
    if wide.ndim != values.ndim or any(
        n > d for n, d in zip(wide.shape, values.shape, strict=True)
    ):
        raise OnnxqError(
            f"zero points of shape {list(offsets.shape)} for codes of {list(values.shape)}",
            "ONNX allows one for all, one a channel or one a block: export the model again",
        )
    for axis, (length, count) in enumerate(zip(values.shape, wide.shape, strict=True)):
        if 1 < count < length:
            wide = np.repeat(wide, -(-length // count), axis)
            wide = np.take(wide, range(length), axis)
    return np.asarray(values.astype(np.int32) == wide)


def stored_weight(node: gs.Node) -> StoredWeight | None:
    """What holds the weight of a product; None where it is computed, or of some other form."""
    tensor, zero = node.inputs[1], None
    permutation: tuple[int, ...] | None = None
    while not isinstance(tensor, gs.Constant):
        source = producer(tensor)
        if source is None or source.op not in (*_CODES, *_LAYOUT):
            return None
        if source.op == "Transpose":
            permutation = joined_permutation(source, permutation)
            if permutation is None:
                return None
        if source.op == "DequantizeLinear":
            given = source.inputs[2] if len(source.inputs) > 2 else None
            zero = given if isinstance(given, gs.Constant) else None
        tensor = source.inputs[0]
    if permutation is not None and len(permutation) != len(tensor.shape):
        return None
    return StoredWeight(tensor, permutation, zero)
