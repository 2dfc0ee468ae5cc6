"""How tensors lie in memory around a product, where that costs it its kernel.

Seen with tensorrt-rtx 1.7.1: a matrix product whose operand it reads transposed, or whose weight it
cuts into q, k and v, is another product to the compiler than the one in the file.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from onnxq.graph.ir import Tensor
from onnxq.graph.qdq import MOVING
from onnxq.graph.query import producer
from onnxq.linting.finding import Found, Rule, Severity
from onnxq.linting.fusing import in_fp16
from onnxq.linting.subject import Product, Subject

_STRIDED = ((0, 2, 1), (1, 0, 2), (1, 2, 0))
_CHANNELS_LAST = (0, 2, 3, 1)
_RESHAPING = ("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_LONGEST = 12
"""Nodes to walk back."""


def is_strided(product: Product) -> bool:
    """Whether the activation is a Transpose that the product reads in place: a batched product."""
    activation = product.activation
    node = producer(activation.tensor) if activation is not None else None
    merged = False
    while node is not None and node.op in ("Identity", "Reshape"):
        merged = merged or node.op == "Reshape"
        node = producer(node.inputs[0])
    if node is None or node.op != "Transpose":
        return False
    order = tuple(node.attrs.get("perm", ()))
    if order == _CHANNELS_LAST:  # INT4's kernel takes it as it lies
        wide = product.weight is not None and product.weight.codes != "int4"
        return wide and _from_convolution(node.inputs[0], ("Identity",))
    if order not in _STRIDED or merged or _from_convolution(node.inputs[0], _RESHAPING):
        return False
    before = producer(node.inputs[0])  # a kernel whose result is reshaped writes it transposed
    return before is None or before.op != "Reshape" or producer(before.inputs[0]) is None


def _from_convolution(tensor: Tensor, through: Collection[str]) -> bool:
    """Whether a convolution made a tensor, with functions, norms and `through` between."""
    node = producer(tensor)
    for _ in range(_LONGEST):
        if node is None or node.op == "Conv":
            return node is not None
        if node.op in MOVING and node.op not in through:
            return False
        made = [m for t in node.inputs if (m := producer(t)) is not None]
        node = next((m for m in made if m.op == "Conv"), made[0] if made else None)
    return False


def packed(subject: Subject) -> Iterator[Found]:
    """One product for q, k and v of an attention, with a scale for each channel of its weight."""
    for product in subject.quantized:
        if is_packed(subject, product):
            yield Found(
                product.node,
                "q, k and v of an attention are cut from its result: the compiler cuts its weight "
                "instead, and with a scale a channel expands it on every call",
                curable=in_fp16(subject, product) and all(o.source for o in product.operands),
            )


def is_packed(subject: Subject, product: Product) -> bool:
    """Whether the compiler cuts a product's weight, and cannot cut its scales with it."""
    weight = product.weight
    if weight is None or weight.source is None or not weight.reaches:
        return False
    source = weight.source
    return id(product.node) in subject.cut and not (source.per_tensor or source.blocked)


RULES = (
    Rule(
        "packed-qkv",
        Severity.SLOW,
        packed,
        "give its weight one scale and multiply the product by the channels' ratios, or make q, k "
        "and v by a product each",
        fixable=True,
    ),
)
