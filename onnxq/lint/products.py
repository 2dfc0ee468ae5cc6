"""Rules on quantized products: both operands must reach the kernel as codes it multiplies."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnxq.graph.ir import Tensor
from onnxq.graph.qdq import built_in
from onnxq.graph.qdq import operand as operand_of
from onnxq.graph.query import label
from onnxq.lint.finding import Found, Rule, Severity
from onnxq.lint.fusing import blocks, has_row_scales, is_int4_weight_only, scale_count
from onnxq.lint.subject import Subject, rank_of

FP8_TAPS = 32
"""The largest kernel of an FP8 convolution: 5 x 5, but not 3 x 3 x 5."""


def one_operand(subject: Subject) -> Iterator[Found]:
    """Products of which one operand is quantized and the other is not."""
    for product in subject.quantized:
        if product.kind == "transposed conv" or is_int4_weight_only(product):
            continue
        sources = [o.source for o in product.operands]
        if None not in sources:
            continue
        if product.weight is not None and product.weight.source is not None:
            width = 4 if product.weight.codes in ("int4", "fp4") else 8
            yield Found(
                product.node,
                f"only its weight is quantized: it is stored in {width} bits and multiplied in 16",
            )
        else:
            yield Found(product.node, "only one of its operands is quantized")


def weight_only_form(subject: Subject) -> Iterator[Found]:
    """4-bit weights that are not unpacked inside the product's kernel."""
    for product in subject.quantized:
        if not is_int4_weight_only(product):
            continue
        weight = product.weight
        assert weight is not None and weight.source is not None
        reason = ""
        if not weight.source.blocked:
            reason = "its scales are not in blocks"
        elif blocks(weight) == 1:
            reason = "it has one block along the axis that is summed"
        elif any(node.op == "Cast" for node in weight.path):
            reason = "a Cast stands between"
        elif product.kind != "linear":
            reason = f"{product.node.op} unpacks none"
        if reason:
            yield Found(
                product.node, f"its INT4 weight is expanded to 16 bits on every call: {reason}"
            )


def in_between(subject: Subject) -> Iterator[Found]:
    """Operators between DequantizeLinear and product that the compiler cannot move it across."""
    for product in subject.quantized:
        if is_int4_weight_only(product):
            continue
        for operand in product.operands:
            node = operand.blocker
            if node is None:
                continue
            if node.op == "Cast":
                what = "a Cast to FP32"
            elif node.op == "Concat":
                what = "a Concat of tensors with different scales, or not all quantized,"
            else:
                what = f"{node.op} {label(node)!r}"
            yield Found(
                product.node, f"{what} stands between DequantizeLinear and {operand.tensor.name!r}"
            )


def computed_scale(subject: Subject) -> Iterator[Found]:
    """Scales that are computed while the engine runs."""
    for product in subject.quantized:
        both = all(o.reaches for o in product.operands)
        for operand in product.operands:
            source = operand.source
            if source is None or not operand.reaches or built_in(source.scale):
                continue
            what = f"the scale of {operand.tensor.name!r} is computed at run time"
            if product.kind == "conv" and both:
                yield Found(product.node, f"{what}: the compiler crashes on it", Severity.REFUSED)
            elif not operand.constant or not source.per_tensor:
                yield Found(
                    product.node, f"{what}: operands are dequantized and multiplied in 16 bits"
                )


def requantized(subject: Subject) -> Iterator[Found]:
    """A scale computed at run time on either side of codes that are quantized once more."""
    for q in subject.quantizers:
        if q.node.op != "QuantizeLinear":
            continue
        before = operand_of(q.node.inputs[0], subject.types)
        if before.source is None or not before.reaches:
            continue
        for scale in (q.scale, before.source.scale):
            if not built_in(scale):
                yield Found(
                    q.node,
                    f"it quantizes what {label(before.source.node)!r} has just dequantized, and "
                    f"the scale {scale.name!r} is computed at run time: the compiler fails on it",
                )
                break


def activation_channels(subject: Subject) -> Iterator[Found]:
    """Activations with a scale for each channel, token or block."""
    for product in subject.quantized:
        for operand in product.operands:
            source = operand.source
            if source is None or not operand.reaches or operand.constant or source.per_tensor:
                continue
            if has_row_scales(product, operand):
                continue
            yield Found(
                product.node,
                f"{operand.tensor.name!r} has {scale_count(operand)} scales: an activation's "
                "cannot be taken out of the sum",
            )


def weight_axis(subject: Subject) -> Iterator[Found]:
    """Weight scales along an axis that the product sums over."""
    for product in subject.quantized:
        weight = product.weight
        if weight is None or weight.source is None or not weight.reaches:
            continue
        if weight.source.per_tensor or weight.source.blocked:
            continue
        axis, expected = weight.axis(), product.output_axis(weight)
        rank = rank_of(weight)
        if axis is not None and rank is not None and axis >= rank:
            continue  # told by `scale-shape`
        if axis is not None and expected is not None and axis != expected:
            yield Found(
                product.node,
                f"its weight's scales run along axis {axis}, its output channels along {expected}",
            )


def convolution(subject: Subject) -> Iterator[Found]:
    """Convolutions that have no kernel in their format."""
    for product in subject.quantized:
        if product.kind == "transposed conv":
            yield Found(product.node, "ConvTranspose has no 8-bit kernel")
        elif product.kind == "conv" and "fp8" in (product.left.codes, product.right.codes):
            taps = _taps(product.node.inputs[1])
            if taps is not None and taps > FP8_TAPS:
                yield Found(
                    product.node,
                    f"its kernel has {taps} taps, and FP8 convolutions have {FP8_TAPS} at most",
                )


def _taps(weight: Tensor) -> int | None:
    shape = weight.shape
    if shape is None or not all(isinstance(d, int) for d in shape[2:]):
        return None
    return math.prod(int(d) for d in shape[2:])


RULES = (
    Rule(
        "requantized",
        Severity.REFUSED,
        requantized,
        "use constant scales, or take one of the two pairs out",
    ),
    Rule(
        "one-operand",
        Severity.SLOW,
        one_operand,
        "quantize the other operand too, or neither; to save memory alone, use INT4 in blocks",
        fixable=True,
    ),
    Rule(
        "weight-only-form",
        Severity.SLOW,
        weight_only_form,
        "use blocks of 16 to 128 along the axis that is summed, two or more of them",
    ),
    Rule(
        "in-between",
        Severity.SLOW,
        in_between,
        "quantize behind it: QuantizeLinear and DequantizeLinear directly before the product",
    ),
    Rule(
        "computed-scale",
        Severity.SLOW,
        computed_scale,
        "use a constant scale; or divide by the maximum, quantize with the constant scale 1/127 "
        "or 1/448, and multiply behind the product, as onnxq's dynamic recipes do",
    ),
    Rule(
        "activation-channels",
        Severity.SLOW,
        activation_channels,
        "use one scale for the whole activation",
    ),
    Rule(
        "weight-axis",
        Severity.SLOW,
        weight_axis,
        "put the scales along the output channels",
    ),
    Rule(
        "convolution",
        Severity.SLOW,
        convolution,
        "leave it in floating point; a large kernel may be INT8",
    ),
)
