"""Rules on quantized products: both operands must reach the kernel as codes it multiplies."""

from __future__ import annotations

import math
from collections.abc import Iterator

from onnxq.graph.ir import Tensor
from onnxq.graph.qdq import MOVING, Operand, Quantizer, quantize_node
from onnxq.graph.query import label, producer
from onnxq.linting.finding import Found, Rule, Severity
from onnxq.linting.fusing import blocks, has_row_scales, is_weight_only, scale_count
from onnxq.linting.layout import is_packed, is_strided
from onnxq.linting.subject import Product, Subject, rank_of

FP8_TAPS = 32
"""The largest kernel of an FP8 convolution: 5 x 5, but not 3 x 3 x 5."""


def one_operand(subject: Subject) -> Iterator[Found]:
    """Products of which one operand is quantized and the other, computed, is not."""
    alone = []
    for product in subject.quantized:
        if product.kind == "transposed conv":
            continue
        if is_weight_only(product):
            alone.append(product)
        elif any(o.source is None for o in product.operands):
            yield Found(product.node, "only one of its operands is quantized")
    if alone and len(alone) < len(subject.quantized):
        more = f" and {len(alone) - 1} more" if len(alone) > 1 else ""
        subject.notes.append(
            f"{label(alone[0].node)}{more}: the weight alone is quantized, beside products whose "
            "operands both are; it saves memory, and multiplies in 16 bits"
        )


def weight_only_form(subject: Subject) -> Iterator[Found]:
    """Weights alone in a form that is not expanded inside the product's kernel."""
    for product in subject.quantized:
        if not is_weight_only(product) or product.kind == "transposed conv":
            continue
        weight = product.weight
        assert weight is not None and weight.source is not None
        if is_packed(subject, product):
            continue  # told by `packed-qkv`
        reason = _why_expanded(subject, product, weight)
        if reason:
            yield Found(
                product.node,
                f"its {weight.codes.upper()} weight is expanded in memory on every call: {reason}",
            )


def _why_expanded(subject: Subject, product: Product, weight: Operand) -> str:
    """Why a weight is expanded by a kernel of its own, or ''."""
    source = weight.source
    assert source is not None
    if product.kind == "conv":
        return "a convolution expands none inside"
    if subject.target.capability < (8, 0):
        return f"{subject.target.name} expands none inside"
    if weight.blocker is not None and weight.blocker.op != "Cast":
        return f"{weight.blocker.op} {label(weight.blocker)!r} stands between"
    if _is_requantized(subject, source):
        return "it is quantized twice"
    if is_strided(product):
        return "its activation is transposed right before it"
    if weight.codes in ("int8", "uint8", "fp8"):
        return "its scales are in blocks" if source.blocked else _odd_size(weight)
    if any(node.op == "Cast" for node in weight.path):
        return "a Cast stands between"
    if weight.codes != "int4":
        return f"{weight.codes.upper()} weights alone have no kernel"
    if not source.blocked:
        return "its scales are not in blocks"
    if blocks(weight) == 1:
        return "it has one block along the axis that is summed"
    return _odd_size(weight)


def _is_requantized(subject: Subject, source: Quantizer) -> bool:
    """Whether a weight's codes are made, in the graph, of other codes."""
    made = quantize_node(source)
    return made is not None and subject.operand(made.inputs[0]).source is not None


def _odd_size(weight: Operand) -> str:
    """Whether a matrix with several scales has an odd side, or one column, or ''."""
    shape = weight.tensor.shape
    if shape is None or len(shape) < 2 or not all(isinstance(d, int) for d in shape[-2:]):
        return ""
    rows, columns = int(shape[-2]), int(shape[-1])
    if min(rows, columns) == 1:
        return f"it is {rows} x {columns}, a vector"
    odd = rows % 2 or columns % 2
    assert weight.source is not None
    return f"it is {rows} x {columns}, an odd size" if odd and not weight.source.per_tensor else ""


def in_between(subject: Subject) -> Iterator[Found]:
    """Operators between DequantizeLinear and product that the compiler cannot move it across."""
    for product in subject.quantized:
        if is_weight_only(product):
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
            if source is None or not operand.reaches or source.fixed:
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
        before = subject.operand(q.node.inputs[0])
        if before.source is None or not before.reaches:
            continue
        computed = [x.scale.name for x in (q, before.source) if not x.fixed]
        if computed:
            yield Found(
                q.node,
                f"it quantizes what {label(before.source.node)!r} has just dequantized, and the "
                f"scale {computed[0]!r} is computed at run time: the compiler fails on it",
            )


def microscaled(subject: Subject) -> Iterator[Found]:
    """MXFP8, of which this compiler fuses no form."""
    for node in subject.nodes:
        if node.op in ("MatMul", "Gemm") and any(_is_mxfp8(t) for t in node.inputs[:2]):
            yield Found(node, "MXFP8 is expanded and multiplied in 16 bits, whatever its form")


def _is_mxfp8(tensor: Tensor) -> bool:
    """Whether a product's input is dequantized MXFP8, moved or cast at most."""
    node = producer(tensor)
    while node is not None and (node.op in MOVING or node.op == "Cast"):
        node = producer(node.inputs[0])
    return node is not None and node.op == "TRT_MXFP8DequantizeLinear"


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
        if weight.source.per_tensor or weight.source.blocked or is_weight_only(product):
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
        "quantize the other operand too, or neither",
        fixable=True,
    ),
    Rule(
        "weight-only-form",
        Severity.SLOW,
        weight_only_form,
        "INT4: two or more blocks of 16 to 128 along the axis that is summed, an even number of "
        "columns; INT8 and FP8: a scale a channel",
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
        "mxfp8",
        Severity.SLOW,
        microscaled,
        "use NVFP4 or FP8 (35 forms of MXFP8 were tried with tensorrt-rtx 1.7.1)",
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
