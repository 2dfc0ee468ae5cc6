"""Which layers the compiler may make one product of, and one range for what such a product makes.

Layers that read one tensor become one product (q, k and v; the keys and values of all attentions
over one text). Where their results are quantized next under scales of their own, tensorrt-rtx
quantizes the joint result and multiplies codes by the scales' ratios in FP8, which rounds twice.
Under one scale the product writes the codes itself. A float format is as exact under a larger
scale, as long as enough of its exponents are left.

The q, k and v of one attention in FP8 are better three products. One product writes them side by
side, and the fused attention reads only what lies by itself: a kernel each copies them (210 in
SDXL's UNet). Three write what it reads. They stay three where they do not read the same codes:
their scales differ in the last place.
"""

from __future__ import annotations

import math
from dataclasses import replace

from onnxq.calibrate.ranges import Ranges
from onnxq.graph.attention import factors_before
from onnxq.graph.dtypes import value_dtype
from onnxq.graph.ir import Node, Tensor
from onnxq.numerics import last_place
from onnxq.placement import Placement
from onnxq.unet import makers

_MOST = 32.0
"""How much larger a shared range may be than an operand's own: 5 of the 15 exponents of FP8."""


def shared_ranges(placement: Placement, ranges: Ranges) -> Ranges:
    """The ranges, those of operands made by layers that read one tensor made alike.

    Constant factors on the way from layer to attention stay out of it: they are moved away.
    """
    layers = {
        id(d.site.node): id(d.site.node.inputs[0]) for d in placement.quantized if d.site.operand
    }
    groups: dict[int, list[tuple[tuple[int, int], float]]] = {}
    for decision in placement.quantized:
        attention = decision.site.attention
        if attention is None:
            continue
        for node, index in ((attention.scores, 0), (attention.scores, 1), (attention.values, 1)):
            read = {layers.get(maker) for maker in makers(node.inputs[index])}
            (source,) = read if len(read) == 1 else (None,)
            if source is not None:
                key = (id(node), index)
                groups.setdefault(source, []).append((key, _moved(node, index)))
    found = dict(ranges)
    for group in groups.values():
        largest = max(ranges[key].peak / factor for key, factor in group)
        for key, factor in group:
            if largest <= _MOST * ranges[key].peak / factor:
                found[key] = replace(ranges[key], peak=largest * factor)
    return found


def separate_products(placement: Placement, ranges: Ranges) -> Ranges:
    """The ranges, those of what q, k and v of one quantized attention read a last place apart.

    Where other layers read it too (the keys and values of all attentions over one text), one
    product makes all of them: it stays.
    """
    layers = {id(d.site.node): d.site.node for d in placement.quantized if d.site.operand}
    readers: dict[int, set[int]] = {}
    for key, node in layers.items():
        readers.setdefault(id(node.inputs[0]), set()).add(key)
    found = dict(ranges)
    for decision in placement.quantized:
        attention = decision.site.attention
        if attention is None:
            continue
        operands = (*attention.scores.inputs[:2], attention.values.inputs[1])
        made = dict.fromkeys(key for t in operands for key in sorted(makers(t)))
        if len(made) != len(operands) or not made.keys() <= layers.keys():
            continue
        read = {id(layers[key].inputs[0]) for key in made}
        if len(read) == 1 and readers[read.pop()] == made.keys():
            for step, key in enumerate(made):
                place = last_place(value_dtype(layers[key].inputs[0].dtype))
                one = ranges[key, 0]
                found[key, 0] = replace(one, peak=one.peak * (1 + step * place))
    return found


def _moved(node: Node, index: int) -> float:
    """The factors of an operand that will be moved: those of k, and with them those of q."""
    tensor: Tensor = node.inputs[index]
    moving = index == 1 or factors_before(node.inputs[1])
    return math.prod(value for _, value in factors_before(tensor)) if moving else 1.0
