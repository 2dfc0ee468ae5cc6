"""The layers that read a tensor: their weights as what a factor per channel multiplies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph.absorb import Index, Part, StopError
from onnxq.graph.query import constant_operand, label
from onnxq.graph.rescale import check_float, largest
from onnxq.products import Factors


def read_by(tensor: gs.Tensor, readers: Sequence[gs.Node]) -> tuple[tuple[Part, ...], Index, int]:
    """The readers' weights as parts, the index of the tensor, and how many channels it has."""
    found = [_weight(tensor, reader) for reader in readers]
    if not found:
        raise StopError(f"nothing reads {tensor.name!r}")
    shapes = {(axes, size) for _, axes, size in found}
    if len(shapes) > 1:
        raise StopError(f"the layers that read {tensor.name!r} do not agree on its channels")
    (axes, size) = shapes.pop()
    index = np.arange(size).reshape(-1, *(1,) * (axes - 1))
    return tuple(part for part, _, _ in found), index, size


def weights_of(tensor: gs.Tensor, readers: Sequence[gs.Node]) -> list[Callable[[], Factors]]:
    """What finds the largest magnitude by channel of each reader's weight, as it is now [K].

    None where the readers take no factor. The weights are read when these are called, once.
    """
    try:
        parts, _, size = read_by(tensor, readers)
    except StopError:
        return []
    found = [(constant_operand(part.node, part.input), part.index) for part in parts]
    return [partial(largest, operand, index, size) for operand, index in found if operand]


def _weight(tensor: gs.Tensor, reader: gs.Node) -> tuple[Part, int, int]:
    """(the weight as a part, axes from the channels on, channels)."""
    name = f"{reader.op} {label(reader)!r}"
    if reader.op not in ("MatMul", "Gemm", "Conv") or reader.domain:
        raise StopError(f"{name} is no layer that takes a factor")
    if reader.inputs[0] is not tensor:
        raise StopError(f"{name} does not read {tensor.name!r} as its first operand")
    operand, reason = constant_operand(reader, 1), check_float(reader, 1)
    if operand is None or reason:
        raise StopError(f"the weight of {name} is computed or quantized: {reason}")
    shape = operand.shape
    if reader.op == "Conv":
        return _conv_weight(reader, shape)
    if reader.op == "Gemm" and reader.attrs.get("transA", 0):
        raise StopError(f"{name} reads its first operand transposed")
    if reader.op == "Gemm" and reader.attrs.get("transB", 0):
        return Part(reader, 1, np.arange(shape[1]), True), 1, shape[1]
    if len(shape) < 2:
        return Part(reader, 1, np.arange(shape[0]), True), 1, shape[0]
    return Part(reader, 1, np.arange(shape[-2]).reshape(-1, 1), True), 1, shape[-2]


def _conv_weight(reader: gs.Node, shape: tuple[int, ...]) -> tuple[Part, int, int]:
    """A Conv's weight [O, I / groups, ...]: output o reads the inputs of its own group."""
    groups = int(reader.attrs.get("group", 1))
    inputs = np.arange(shape[1] * groups).reshape(groups, 1, shape[1])
    if groups == 1:
        index = inputs[0]
    else:
        index = np.broadcast_to(inputs, (groups, shape[0] // groups, shape[1]))
        index = index.reshape(shape[0], shape[1])
    index = index.reshape(*index.shape, *(1,) * (len(shape) - 2))
    return Part(reader, 1, index, True), len(shape) - 1, shape[1] * groups
