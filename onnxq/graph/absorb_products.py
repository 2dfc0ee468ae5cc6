"""Factors through arithmetic, norms, matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_graphsurgeon as gs

from onnxq.graph.absorb import (
    RULES,
    Absorber,
    Index,
    Part,
    StopError,
    Trace,
    rule,
    trimmed,
)
from onnxq.graph.query import constant_operand, label, scalar, type_word


@rule("Identity", "Neg", "Abs", "Relu", "LeakyRelu", "PRelu")
def _passes(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """f(x / s) is f(x) / s, since s is positive."""
    return walk.operand(node, 0, index)


@rule("Dropout")
def _dropout(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    if node.outputs[0] is not out:
        raise StopError(f"{out.name!r} is the mask of a Dropout")
    return walk.operand(node, 0, index)


@rule("Cast")
def _cast(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    words = {type_word(node.inputs[0]), type_word(out)}
    if not words <= {"fp64", "fp32", "fp16", "bf16"}:
        raise StopError(f"Cast {label(node)!r} is not between floating-point types")
    return walk.operand(node, 0, index)


@rule("Clip")
def _clip(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """Like Relu, if it only cuts at 0."""
    named = [t for t in node.inputs[1:] if t.name]
    low = scalar(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1].name else None
    if len(named) != 1 or low != 0 or {"min", "max"} & node.attrs.keys():
        raise StopError(f"Clip {label(node)!r} has limits other than 0")
    return walk.operand(node, 0, index)


@rule("Mul")
def _mul(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """Either factor; a constant one first."""
    return _first(walk, node, [(i, False) for i in (0, 1)], index)


@rule("Div")
def _div(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """The dividend, or a constant divisor, which is multiplied."""
    return _first(walk, node, [(0, False), (1, True)], index)


def _first(walk: Absorber, node: gs.Node, choices: list[tuple[int, bool]], index: Index) -> Trace:
    constant = [c for c in choices if constant_operand(node, c[0]) is not None]
    computed = [c for c in choices if c not in constant and not c[1]]
    reasons = []
    for i, multiply in (*constant, *computed):
        try:
            found = walk.spread(node, i, index)
        except StopError as stop:
            reasons.append(str(stop))
            continue
        if multiply:
            found = Trace([Part(p.node, p.input, p.index, True) for p in found.parts])
        return found
    raise StopError("; ".join(dict.fromkeys(reasons)))


@rule("Add", "Sub", "Sum")
def _add(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """Every summand."""
    return _all(walk, node, range(len(node.inputs)), index)


@rule("Where")
def _where(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """Both choices."""
    return _all(walk, node, (1, 2), index)


def _all(walk: Absorber, node: gs.Node, inputs: Sequence[int], index: Index) -> Trace:
    order = sorted(inputs, key=lambda i: constant_operand(node, i) is None)
    return sum((walk.spread(node, i, index) for i in order), Trace())


_NORMS = {
    ("", "LayerNormalization"): (1, 2),
    ("", "RMSNormalization"): (1,),
    ("", "SimplifiedLayerNormalization"): (1,),
    ("com.microsoft", "LayerNormalization"): (1, 2),
    ("com.microsoft", "SimplifiedLayerNormalization"): (1,),
    ("com.microsoft", "SkipSimplifiedLayerNormalization"): (2,),
    ("com.microsoft", "SkipLayerNormalization"): (2, 3),
}
"""Gain and bias; the other inputs come before the norm."""


def _norm(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    axis = int(node.attrs.get("axis", -1))
    if node.outputs[0] is not out:
        raise StopError(f"{out.name!r} is not the normalized output of {label(node)!r}")
    normalized = -axis if axis < 0 else walk.rank(out) - axis
    if trimmed(index).ndim > normalized:
        raise StopError(f"{node.op} {label(node)!r} has no gain along these axes")
    inputs = [i for i in _NORMS[node.domain or "", node.op] if is_given(node, i)]
    return _all(walk, node, inputs, index)


for _domain, _op in _NORMS:
    RULES[_domain, _op] = _norm


def is_given(node: gs.Node, i: int) -> bool:
    """Whether a node has input `i`; optional ones may be left out."""
    return i < len(node.inputs) and bool(node.inputs[i].name)


@rule("BatchNormalization", "InstanceNormalization", "GroupNormalization")
def _channel_norm(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """Gain and bias of a norm whose channels are axis 1."""
    if node.outputs[0] is not out or node.attrs.get("training_mode", 0):
        raise StopError(f"{node.op} {label(node)!r} is in training mode")
    channels = walk.channels(out, index, walk.rank(out))
    gain = constant_operand(node, 1)
    if node.op == "GroupNormalization" and (gain is None or gain.shape != channels.shape):
        raise StopError(
            f"GroupNormalization {label(node)!r} has a gain a group, not a channel: opset below 21"
        )
    return walk.operand(node, 1, channels) + walk.operand(node, 2, channels)


@rule("MatMul")
def _matmul(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """Columns of the right operand, or rows of the left one; heads of either."""
    if any(len(walk.dims.of(t) or (0, 0)) < 2 for t in node.inputs):
        raise StopError(f"MatMul {label(node)!r} has an operand of one axis")
    index = trimmed(index)
    rows = index.ndim > 1 and index.shape[-2] > 1
    columns = index.shape[-1] > 1
    if rows and columns:
        raise StopError(f"MatMul {label(node)!r} is rescaled along rows and columns at once")
    return _batched(walk, node, 0 if rows else 1, index)


def _batched(walk: Absorber, node: gs.Node, i: int, index: Index) -> Trace:
    """Operand `i` of a MatMul; what it repeats for several heads must be rescaled alike."""
    shape = walk.dims.of(node.inputs[i])
    operand = constant_operand(node, i)
    shape = tuple(operand.shape) if operand is not None else shape
    if shape is None:
        raise StopError(f"the shape of {node.inputs[i].name!r} is unknown")
    kept, ties = repeated(index, len(shape), lambda axis: shape[axis], batch_only=True)
    if operand is None:
        walk.require(node.inputs[i], kept)
    return Trace(ties=ties) + walk.operand(node, i, kept)


def repeated(
    index: Index, rank: int, dim: Callable[[int], int | str], *, batch_only: bool = False
) -> tuple[Index, list[tuple[Index, Index]]]:
    """The index of a tensor that is broadcast to what `index` belongs to, and what that ties.

    Args:
        rank: of the tensor before.
        dim: its dimension along an axis.
        batch_only: leave the last two axes as they are.
    """
    full = index.reshape((1,) * max(0, rank - index.ndim) + index.shape)
    ties = []
    last = full.ndim - 2 if batch_only else full.ndim
    for axis in range(last):
        own = axis - (full.ndim - rank)
        length = dim(own) if own >= 0 else 1
        if full.shape[axis] > 1 and length != full.shape[axis]:
            if length != 1:
                raise StopError(f"whether {full.shape[axis]} channels are {length} is unknown")
            first = full.take([0], axis)
            ties += [(first, full.take([i], axis)) for i in range(1, full.shape[axis])]
            full = first
    for a, b in ties:
        if ((a < 0) != (b < 0)).any():
            raise StopError("values are shared with channels that are not rescaled")
    return trimmed(full), ties


@rule("Gemm")
def _gemm(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """Columns of the second operand, and the bias."""
    index = trimmed(index)
    if index.ndim != 1:
        raise StopError(f"Gemm {label(node)!r} is rescaled along its rows")
    weight = index.reshape(-1, 1) if node.attrs.get("transB", 0) else index
    if constant_operand(node, 1) is None:
        raise StopError(f"the weight of Gemm {label(node)!r} is computed, or quantized already")
    bias = walk.spread(node, 2, index) if is_given(node, 2) else Trace()
    return walk.operand(node, 1, weight) + bias


@rule("Conv", "ConvTranspose")
def _conv(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """Output channels of the weight, and the bias."""
    weight = constant_operand(node, 1)
    if weight is None:
        raise StopError(
            f"the weight of {node.op} {label(node)!r} is computed, or quantized already"
        )
    rank = len(weight.shape)
    channels = walk.channels(out, index, rank)
    if node.op == "ConvTranspose":
        if node.attrs.get("group", 1) != 1:
            raise StopError(f"ConvTranspose {label(node)!r} has groups")
        shape = (1, -1, *(1,) * (rank - 2))
    else:
        shape = (-1, *(1,) * (rank - 1))
    bias = walk.operand(node, 2, channels) if is_given(node, 2) else Trace()
    return walk.operand(node, 1, channels.reshape(shape)) + bias


@rule("AveragePool", "GlobalAveragePool", "MaxPool", "GlobalMaxPool")
def _pool(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """Means and maxima within a channel."""
    rank = walk.rank(out)
    channels = walk.channels(out, index, rank)
    if node.outputs[0] is not out:
        raise StopError(f"{out.name!r} holds positions")
    return walk.operand(node, 0, channels.reshape(-1, *(1,) * (rank - 2)))


@rule("Resize", "Upsample")
def _resize(walk: Absorber, node: gs.Node, out: gs.Tensor, index: Index) -> Trace:
    """Weighted means within a channel."""
    rank = walk.rank(out)
    channels = walk.channels(out, index, rank).reshape(-1, *(1,) * (rank - 2))
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise StopError(f"{node.op} {label(node)!r} fills in a value of its own")
    walk.require(node.inputs[0], channels)
    return walk.operand(node, 0, channels)
