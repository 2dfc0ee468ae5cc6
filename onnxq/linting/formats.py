"""Rules on the formats and scales of a product's two operands, taken together."""

from __future__ import annotations

from collections.abc import Iterator

from onnxq.graph.qdq import Operand, same_scale
from onnxq.graph.query import label
from onnxq.linting.finding import Found, Rule, Severity
from onnxq.linting.fusing import (
    EIGHT_BIT,
    blocks,
    both_fuse,
    fuses,
    in_fp16,
    multiplies_codes,
    origin,
    scale_count,
)
from onnxq.linting.layout import is_packed
from onnxq.linting.subject import Product, Subject, rank_of


def scale_of_one(subject: Subject) -> Iterator[Found]:
    """Convolutions whose scale is a vector of one element instead of a number."""
    for product in subject.quantized:
        weight, activation = product.weight, product.activation
        if product.kind != "conv" or weight is None or activation is None:
            continue
        if weight.source is None or activation.source is None:
            continue
        if activation.source.scale_shape == (1,):
            yield Found(
                product.node,
                f"the scale of {activation.tensor.name!r} has the shape [1]: taken for a scale a "
                "channel",
            )
        elif (
            weight.source.scale_shape == (1,)
            and (weight.tensor.shape or [0])[0] != 1
            and subject.type(weight.source.scale) in ("fp16", "bf16")
        ):
            yield Found(
                product.node,
                f"the scale of its weight {weight.tensor.name!r} has the shape [1]",
                Severity.REFUSED,
            )


def mixed_formats(subject: Subject) -> Iterator[Found]:
    """Products of two formats."""
    for product in subject.products:
        if id(product.node) in subject.in_attention and both_fuse(product):
            one, other = product.operands
            if {_read(one), _read(other)} == {"int8", "fp8"}:
                yield Found(
                    product.node, f"it multiplies {one.codes.upper()} by {other.codes.upper()}"
                )
    for product in subject.quantized:
        one, other = product.operands
        if not both_fuse(product) or _read(one) == _read(other):
            continue
        if product.kind == "transposed conv":
            continue  # dequantized in any case
        codes = {_read(one), _read(other)}
        if not codes <= {"int8", "fp8", "int4", "fp4"}:
            continue
        weight = product.weight
        if codes == {"int8", "int4"} and weight is not None and weight.source is not None:
            several = weight.source.blocked and blocks(weight) != 1
            if several and product.activation is not None and rank_of(product.activation) != 2:
                continue  # refused: told by `blocked-weight`
            if product.kind == "linear" and not weight.source.per_tensor:
                yield Found(
                    product.node,
                    "its INT4 weight is expanded to INT8 by a kernel of its own on every call",
                    Severity.SLOW,
                )
                continue
        yield Found(product.node, f"it multiplies {one.codes.upper()} by {other.codes.upper()}")


def _read(operand: Operand) -> str:
    """An operand's codes as the parser reads them: UINT8 as INT8."""
    return "int8" if operand.codes == "uint8" else operand.codes


def four_bit_activation(subject: Subject) -> Iterator[Found]:
    """Activations in INT4."""
    for product in subject.quantized:
        for operand in product.operands:
            if operand.reaches and not operand.constant and operand.codes == "int4":
                yield Found(product.node, f"{operand.tensor.name!r} is quantized to INT4")


def blocked_weight(subject: Subject) -> Iterator[Found]:
    """Weights in blocks that are multiplied by 8-bit activations."""
    for product in subject.quantized:
        weight, activation = product.weight, product.activation
        if weight is None or activation is None or weight.source is None:
            continue
        if not (weight.reaches and fuses(product, activation) and weight.source.blocked):
            continue
        if activation.codes not in EIGHT_BIT or blocks(weight) == 1:
            continue
        if activation.codes != weight.codes and activation.codes != "int8":
            continue  # refused in any case: told by `mixed-formats`
        rank = rank_of(activation)
        if rank == 2:
            yield Found(
                product.node,
                "its weight has scales in blocks, and the compiler puts one factor for each of "
                "them behind the sum: the results are wrong",
                Severity.NUMBERS,
            )
        else:
            yield Found(product.node, "its weight has scales in blocks and its activation 8 bits")


def scale_types(subject: Subject) -> Iterator[Found]:
    """Operands whose scales have different types, one of them a vector."""
    for product in subject.quantized:
        one, other = product.operands
        if product.kind != "linear" or not both_fuse(product):
            continue
        assert one.source is not None and other.source is not None
        words = [subject.type(o.source.scale) for o in (one, other) if o.source]
        vector = not (one.source.per_tensor and other.source.per_tensor)
        if vector and words[0] != words[1] and "?" not in words:
            yield Found(product.node, f"its scales are {words[0].upper()} and {words[1].upper()}")


def concatenated_weights(subject: Subject) -> Iterator[Found]:
    """A weight put together from dequantized pieces."""
    for product in subject.quantized:
        weight = product.weight
        if weight is not None and any(node.op == "Concat" for node in weight.path):
            yield Found(product.node, "its weight is a Concat of dequantized constants")


def raw_sums(subject: Subject) -> Iterator[Found]:
    """FP16 products whose scales per channel are left behind the product."""
    for product in subject.quantized:
        if not multiplies_codes(product) or not in_fp16(subject, product):
            continue
        if is_packed(subject, product):
            continue  # told by `packed-qkv`
        for operand in product.operands:
            if operand.source is None or operand.source.blocked or operand.source.per_tensor:
                continue
            yield Found(
                product.node,
                f"{operand.tensor.name!r} has {scale_count(operand)} scales: the compiler stores "
                "the bare sum of codes in FP16, which overflows at 65,504, and multiplies "
                "afterwards",
            )
            break


def merged_scales(subject: Subject) -> Iterator[Found]:
    """FP8 layers that read one tensor (q, k, v) under different weight scales."""
    groups: dict[str, list[Product]] = {}
    for product in subject.quantized:
        if multiplies_codes(product) and in_fp16(subject, product):
            weight, activation = product.weight, product.activation
            if weight is not None and activation is not None and weight.codes == "fp8":
                groups.setdefault(origin(activation), []).append(product)
    for products in groups.values():
        sources = [p.weight.source for p in products if p.weight and p.weight.source]
        if all(same_scale(source, sources[0]) for source in sources):
            continue
        for product, source in zip(products, sources, strict=True):
            if not source.per_tensor:
                continue  # told by `raw-sums`
            others = ", ".join(label(p.node) for p in products if p is not product)
            yield Found(
                product.node,
                f"it is merged with {others}, whose weight has another scale: the compiler stores "
                "the bare sum of codes in FP16, which overflows at 65,504",
            )


RULES = (
    Rule(
        "mixed-formats",
        Severity.REFUSED,
        mixed_formats,
        "quantize both operands to one format",
    ),
    Rule(
        "blocked-weight",
        Severity.REFUSED,
        blocked_weight,
        "give the weight a scale a tensor or a channel, or quantize the dequantized weight once "
        "more to the activation's format, or leave the activation in 16 bits",
    ),
    Rule(
        "scale-types",
        Severity.REFUSED,
        scale_types,
        "give both DequantizeLinear scales of one type",
    ),
    Rule(
        "concatenated-weight",
        Severity.REFUSED,
        concatenated_weights,
        "concatenate the codes in the file, under one scale",
    ),
    Rule(
        "scale-of-one",
        Severity.SLOW,
        scale_of_one,
        "store the scale as a number, of rank 0",
        fixable=True,
    ),
    Rule(
        "int4-activation",
        Severity.SLOW,
        four_bit_activation,
        "quantize activations to INT8 or FP8",
    ),
    Rule(
        "raw-sums",
        Severity.NUMBERS,
        raw_sums,
        "give DequantizeLinear one scale and multiply the product by the channels' ratios",
        fixable=True,
    ),
    Rule(
        "merged-scales",
        Severity.NUMBERS,
        merged_scales,
        "give the layers that read one tensor one scale, and multiply by the rest behind them",
        fixable=True,
    ),
)
