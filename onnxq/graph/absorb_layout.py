"""Factors through operators that move values: where each value came from, with its channel."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from onnxq.graph.absorb import (
    TAKES,
    Absorber,
    Index,
    StopError,
    Trace,
    rule,
    to_rank,
    trimmed,
)
from onnxq.graph.absorb_products import repeated
from onnxq.graph.dims import Dim, Shape, quotient
from onnxq.graph.query import constant_operand, label, perm_of
from onnxq.graph.weights import array


@rule("Transpose")
def _transpose(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    perm = perm_of(node)
    if perm is None:
        raise StopError(f"the rank of {out.name!r} is unknown")
    back = tuple(int(i) for i in np.argsort(perm))
    return walk.operand(node, 0, to_rank(index, len(perm)).transpose(back))


@rule("Reshape", "Flatten", "Squeeze", "Unsqueeze")
def _reshape(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    before, after = walk.dims.of(node.inputs[0]), walk.dims.of(out)
    if before is None or after is None:
        raise StopError(f"the shapes around {node.op} {label(node)!r} are unknown")
    moved = reshaped(to_rank(index, len(after)), after, before)
    if moved is None:
        raise StopError(
            f"{node.op} {label(node)!r} from {_text(before)} to {_text(after)} may mix channels"
        )
    return walk.operand(node, 0, moved)


def _text(shape: Shape) -> str:
    return "[" + ", ".join(str(d) if isinstance(d, int) else "?" for d in shape) + "]"


def reshaped(index: Index, after: Shape, before: Shape) -> Index | None:
    """The index of what a Reshape reads, of the index of what it makes; None if it is not sure.

    Both shapes are cut into blocks of axes that hold the same values in the same order, from the
    last axis on; a block along which channels vary must have known lengths.

    Args:
        index: of as many axes as `after`.
    """
    after, before = _same_names(after, before)
    i, j = len(after), len(before)
    shape: list[int] = []
    while max(index.shape[:i], default=1) > 1:
        block = _block(after[:i], before[:j])
        if block is None:
            return None
        own, theirs = after[i - block[0] : i], before[j - block[1] : j]
        lengths = index.shape[i - block[0] : i]
        if max(lengths, default=1) == 1:
            shape[:0] = [1] * len(theirs)
        elif len(own) == len(theirs) == 1:
            shape[:0] = lengths
        elif any(isinstance(d, str) for d in (*own, *theirs)):
            return None
        else:
            full = (*index.shape[: i - block[0]], *own, *index.shape[i:])
            index = np.broadcast_to(index, full)
            shape[:0] = [int(d) for d in theirs]
        i, j = i - block[0], j - block[1]
    return trimmed(index.reshape(shape or [1]))


def _same_names(after: Shape, before: Shape) -> tuple[Shape, Shape]:
    """A dimension that only one side names, the other being known, is what it must be."""
    names = [Counter(d for d in s if isinstance(d, str)) for s in (after, before)]
    for a, b, (own, other) in ((after, before, names), (before, after, names[::-1])):
        unknown = list((own - other).elements())
        if len(unknown) != 1:
            continue
        rest = list(a)
        rest.remove(unknown[0])
        value = quotient(b, rest)
        if value is not None:
            renamed = tuple(value if d == unknown[0] else d for d in a)
            return (renamed, b) if a is after else (b, renamed)
    return after, before


def _block(after: Shape, before: Shape) -> tuple[int, int] | None:
    """How many last axes of both hold the same values; the fewest."""
    i = j = 1
    while i <= len(after) and j <= len(before):
        own, theirs = _product(after[-i:]), _product(before[-j:])
        if own == theirs:
            return i, j
        if own[1] == theirs[1]:
            grow_own = own[0] < theirs[0]
        else:
            grow_own = not own[1] - theirs[1]
            if not grow_own and theirs[1] - own[1]:
                return None
        i, j = (i + 1, j) if grow_own else (i, j + 1)
    return None


def _product(dims: Sequence[Dim]) -> tuple[int, Counter[str]]:
    numbers = math.prod(d for d in dims if isinstance(d, int))
    return numbers, Counter(d for d in dims if isinstance(d, str))


@rule("Expand")
def _expand(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """What is repeated must be rescaled alike wherever it goes."""
    shape = walk.dims.of(node.inputs[0])
    if shape is None:
        raise StopError(f"the shape of {node.inputs[0].name!r} is unknown")
    kept, ties = repeated(trimmed(index), len(shape), lambda axis: shape[axis])
    return Trace(ties=ties) + walk.operand(node, 0, kept)


@rule("Concat")
def _concat(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    full, axis = walk.padded(out, index), int(node.attrs["axis"]) % walk.rank(out)
    found, start = Trace(), 0
    for i, tensor in enumerate(node.inputs):
        piece = full
        if full.shape[axis] > 1:
            shape = walk.dims.of(tensor)
            length = shape[axis] if shape is not None and len(shape) == full.ndim else None
            if not isinstance(length, int):
                raise StopError(f"how many channels {tensor.name!r} has is unknown")
            piece = full.take(range(start, start + length), axis)
            start += length
        found = found + walk.operand(node, i, piece)
    return found


@rule("Split")
def _split(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """The other outputs are not rescaled."""
    axis, lengths = _split_lengths(walk, node)
    at = next(i for i, t in enumerate(node.outputs) if t is out)
    full = walk.padded(out, index)
    shape = [*full.shape[:axis], sum(lengths), *full.shape[axis + 1 :]]
    start = sum(lengths[:at])
    return walk.operand(node, 0, _placed(full, shape, axis, range(start, start + lengths[at])))


def _split_lengths(walk: Absorber, node: gs.Node) -> tuple[int, list[int]]:
    shape = walk.dims.of(node.inputs[0])
    if shape is None:
        raise StopError(f"the shape of {node.inputs[0].name!r} is unknown")
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    given = node.attrs.get("split")
    if given is None and len(node.inputs) > 1:
        given = walk.dims.values(node.inputs[1])
    if given is None:
        whole, count = shape[axis], len(node.outputs)
        if not isinstance(whole, int):
            raise StopError(f"how Split {label(node)!r} divides its input is unknown")
        size = -(-whole // count)
        given = [min(size, whole - size * i) for i in range(count)]
    if not all(isinstance(length, int) for length in given):
        raise StopError(f"how Split {label(node)!r} divides its input is unknown")
    return axis, [int(length) for length in given]


def _placed(index: Index, shape: Sequence[int], axis: int, at: Sequence[int]) -> Index:
    """An index of -1 but for positions `at` along an axis, which it is written to."""
    out = np.full(shape, -1, np.int64)
    moved = np.moveaxis(out, axis, 0)
    moved[list(at)] = np.moveaxis(index, axis, 0)
    return out


@rule("Slice")
def _slice(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    full = walk.padded(out, index)
    for axis, positions, whole in _sliced(walk, node):
        if full.shape[axis] == 1 and len(positions) > 1:
            full = np.repeat(full, len(positions), axis)
        full = _placed(full, [*full.shape[:axis], whole, *full.shape[axis + 1 :]], axis, positions)
    return walk.operand(node, 0, full)


def _sliced(walk: Absorber, node: gs.Node) -> list[tuple[int, list[int], int]]:
    """(axis, positions taken, length before) of each sliced axis."""
    shape = walk.dims.of(node.inputs[0])
    given = [walk.dims.values(t) if t.name else None for t in node.inputs[1:5]]
    if len(node.inputs) == 1:  # before opset 10
        given = [node.attrs.get(name) for name in ("starts", "ends", "axes")]
    given += [None] * (4 - len(given))
    starts, ends, axes, steps = given
    if shape is None or starts is None or ends is None:
        raise StopError(f"what Slice {label(node)!r} takes is unknown")
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    found = []
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        whole = shape[int(axis) % len(shape)]
        if not all(isinstance(v, int) for v in (whole, start, end, step)):
            raise StopError(f"what Slice {label(node)!r} takes is unknown")
        positions = list(range(int(whole)))[slice(int(start), int(end), int(step))]
        found.append((int(axis) % len(shape), positions, int(whole)))
    return found


@rule("Gather")
def _gather(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """Rows of a constant table, or positions that are known."""
    table = constant_operand(node, 0)
    if table is not None:
        if node.attrs.get("axis", 0) or trimmed(index).ndim >= len(table.shape):
            raise StopError(f"Gather {label(node)!r} does not take whole rows")
        return walk.operand(node, 0, index)
    axis, positions, whole, scalar = _gathered(walk, node)
    if len(set(positions)) < len(positions):
        raise StopError(f"Gather {label(node)!r} takes a channel twice")
    full = walk.padded(out, index)
    if scalar:
        full = np.expand_dims(full, axis)
    elif full.shape[axis] == 1:
        full = np.repeat(full, len(positions), axis)
    shape = [*full.shape[:axis], whole, *full.shape[axis + 1 :]]
    return walk.operand(node, 0, _placed(full, shape, axis, positions))


def _gathered(walk: Absorber, node: gs.Node) -> tuple[int, list[int], int, bool]:
    """Axis, positions taken, length before, and whether the axis is gone."""
    shape, at = walk.dims.of(node.inputs[0]), node.inputs[1]
    if shape is None or not isinstance(at, gs.Constant):
        raise StopError(f"what Gather {label(node)!r} takes is unknown")
    axis = int(node.attrs.get("axis", 0)) % len(shape)
    positions, whole = array(at), shape[axis]
    if positions.ndim > 1 or not isinstance(whole, int):
        raise StopError(f"what Gather {label(node)!r} takes is unknown")
    return axis, [int(p) % whole for p in positions.reshape(-1)], whole, positions.ndim == 0


def _taken_by_slice(walk: Absorber, node: gs.Node, index: Index) -> Index:
    full = walk.padded(node.inputs[0], index)
    for axis, positions, _ in _sliced(walk, node):
        if full.shape[axis] > 1:
            full = full.take(positions, axis)
    return full


def _taken_by_gather(walk: Absorber, node: gs.Node, index: Index) -> Index:
    axis, positions, _, _ = _gathered(walk, node)
    full = walk.padded(node.inputs[0], index)
    return full.take(positions, axis) if full.shape[axis] > 1 else full


TAKES["Slice"] = _taken_by_slice
TAKES["Gather"] = _taken_by_gather
