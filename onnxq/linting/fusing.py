"""When the compiler multiplies codes: both operands' scales can be taken out of the sum."""

from __future__ import annotations

import math

from onnxq.graph.qdq import Operand, quantize_node
from onnxq.linting.subject import Product, Subject, is_meant, rank_of

EIGHT_BIT = ("int8", "fp8")


def multiplies_codes(product: Product) -> bool:
    """Whether it becomes a matrix product of 8-bit codes."""
    one, other = product.operands
    return (
        product.kind == "linear"
        and both_fuse(product)
        and (one.codes == other.codes or {one.codes, other.codes} == {"int8", "int4"})
        and product.activation is not None
        and product.activation.codes in EIGHT_BIT
    )


def both_fuse(product: Product) -> bool:
    return all(fuses(product, operand) for operand in product.operands)


def fuses(product: Product, operand: Operand) -> bool:
    """Whether an operand's scales can be taken out of the sum, so that its codes are multiplied."""
    source = operand.source
    if source is None or not operand.reaches:
        return False
    if not operand.constant:
        single = source.per_tensor or has_row_scales(product, operand)
        return single and source.fixed
    axis, expected = operand.axis(), product.output_axis(operand)
    return source.per_tensor or source.blocked or None in (axis, expected) or axis == expected


def has_row_scales(product: Product, operand: Operand) -> bool:
    """Whether a matrix has a scale for each row of the result: these are taken out of the sum."""
    assert operand.source is not None
    axis = operand.axis()
    return (
        product.kind == "linear"
        and rank_of(operand) == 2
        and not operand.source.blocked
        and axis is not None
        and axis == product.output_axis(operand)
    )


def in_fp16(subject: Subject, product: Product) -> bool:
    sources = [o.source for o in product.operands]
    return any(q is not None and subject.type(q.scale) == "fp16" for q in sources)


def origin(activation: Operand) -> str:
    """Name of the tensor whose codes a product reads: before its QuantizeLinear, if it has one."""
    assert activation.source is not None
    node = quantize_node(activation.source) or activation.source.node
    return str(node.inputs[0].name)


def is_weight_only(product: Product) -> bool:
    """Whether the weight alone is quantized, on purpose or not.

    An activation that was quantized before an activation function is meant to be, beside 8 bits.
    """
    weight, activation = product.weight, product.activation
    if weight is None or not is_meant(weight):
        return False
    if activation is None or activation.source is None:
        return True
    return weight.codes in ("int4", "fp4") and not is_meant(activation)


def blocks(weight: Operand) -> int | None:
    """How many blocks there are along the blocked axis."""
    assert weight.source is not None
    shape = weight.source.scale_shape
    if shape is None or weight.source.axis >= len(shape):
        return None
    return shape[weight.source.axis]


def scale_count(operand: Operand) -> int:
    assert operand.source is not None
    return math.prod(operand.source.scale_shape or ())
