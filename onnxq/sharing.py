"""One range for the operands of attentions that one compiled product makes.

Layers that read one tensor become one product (q, k and v; the keys and values of all attentions
over one text). Where their results are quantized next under scales of their own, tensorrt-rtx
quantizes the joint result and multiplies codes by the scales' ratios in FP8, which rounds twice.
Under one scale the product writes the codes itself. A float format is as exact under a larger
scale, as long as enough of its exponents are left.
"""

from __future__ import annotations

import math
from dataclasses import replace

from onnxq.calibrate.ranges import Ranges
from onnxq.graph.attention import factors_before
from onnxq.graph.ir import Node, Tensor
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


def _moved(node: Node, index: int) -> float:
    """The factors of an operand that will be moved: those of k, and with them those of q."""
    tensor: Tensor = node.inputs[index]
    moving = index == 1 or factors_before(node.inputs[1])
    return math.prod(value for _, value in factors_before(tensor)) if moving else 1.0
