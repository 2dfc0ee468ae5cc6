"""Which compiled layer each node ended in, and why where it is not the one that was wanted."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnxq.engine import kernels
from onnxq.engine.coverage import WEIGHTS_ALONE, Coverage, NodeCoverage, WeightedNode
from onnxq.engine.layers import EngineLayer, Tensor
from onnxq.engine.shapes import Profile

FUSED_ATTENTION_MINIMUM = 32
"""The shortest sequence a profile may start at for FP8 attention to fuse (tensorrt-rtx 1.7.1)."""


def cover(
    layers: Sequence[EngineLayer],
    nodes: Iterable[WeightedNode],
    profiles: Sequence[Profile] = (),
) -> Coverage:
    """Match nodes with the compiled layers, profile by profile.

    Args:
        profiles: the optimization profiles, which tell why FP8 attention did not fuse.
    """
    wanted = list(nodes)
    found = []
    for index in sorted({layer.profile for layer in layers}) or [0]:
        view = _View([layer for layer in layers if layer.profile == index])
        shape = profiles[index] if index < len(profiles) else ()
        for node in wanted:
            if node.kind == "attention":
                found.append(_cover_attention(node, view, index, shape))
            else:
                found.append(_cover_multiply(node, view, index))
    return Coverage(
        nodes=tuple(found),
        quantize_alone=_alone(layers, quantize=True),
        dequantize_alone=_alone(layers, quantize=False),
        weight_bytes=kernels.weight_bytes(layers),
    )


class _View:
    """One profile's layers, by the node they name and by the tensor they make or read."""

    def __init__(self, layers: Sequence[EngineLayer]) -> None:
        self.naming: dict[str, list[EngineLayer]] = {}
        self.making: dict[str, EngineLayer] = {}
        self.reading: dict[str, list[EngineLayer]] = {}
        for layer in layers:
            for name in layer.onnx_nodes:
                self.naming.setdefault(name, []).append(layer)
            for tensor in layer.outputs:
                self.making[tensor.name] = layer
            for tensor in layer.inputs:
                self.reading.setdefault(tensor.name, []).append(layer)

    def multiplies(self, name: str) -> EngineLayer | None:
        """The layer that does a node's multiplication, None when no such layer names it."""
        named = self.naming.get(name, [])
        return next((x for x in named if kernels.multiplies(x)), None)

    def readers(self, tensors: Iterable[Tensor]) -> list[EngineLayer]:
        """The layers that read the tensors, at once or behind kernels that only move values."""
        found = [reader for t in tensors for reader in self.reading.get(t.name, [])]
        for reader in found:  # grows meanwhile
            if kernels.only_moves(reader):
                found += [r for t in reader.outputs for r in self.reading.get(t.name, [])]
        return found


def _alone(layers: Sequence[EngineLayer], *, quantize: bool) -> dict[str, str]:
    """Kernels that do a Q or a DQ and nothing else, and why no other took it up."""
    views = {p: _View([x for x in layers if x.profile == p]) for p in {x.profile for x in layers}}
    return {
        layer.name: _why_alone(layer, views[layer.profile])
        for layer in layers
        if kernels.is_alone(layer, quantize=quantize)
    }


def _why_alone(layer: EngineLayer, view: _View) -> str:
    read = next((t for t in layer.inputs if t.elements != 1), None)
    maker = view.making.get(read.name) if read is not None else None
    if read is None or maker is None:
        return "reads an input of the engine or a constant"
    readers = len(view.reading[read.name])
    if kernels.multiplies(maker):
        dtype = kernels.multiply_dtype(maker)
        return f"behind a product in {dtype}" + (" that several cut up" if readers > 1 else "")
    words = ", ".join(kernels.operations(maker)) or maker.kind
    if readers > 1:
        return f"behind {words}, which others read in {read.dtype}"
    return f"behind {words}, which does not take it up"


def _cover_multiply(node: WeightedNode, view: _View, profile: int) -> NodeCoverage:
    layer = view.multiplies(node.name)
    named = view.naming.get(node.name, [])
    if layer is None and not named:
        reason = "no compiled layer names it" if node.narrow else ""
        return NodeCoverage(node, profile, "none", "", reason)
    if layer is None:
        reason = "computed inside an elementwise kernel" if node.narrow else ""
        return NodeCoverage(node, profile, "elementwise", named[0].name, reason)
    ran = kernels.multiply_dtype(layer)
    if not node.narrow:
        return NodeCoverage(node, profile, ran, layer.name)
    if _satisfies(ran, node.wanted):
        reason = _raw_sums(layer, view)
    else:
        reason = _why_not(layer, node.wanted, ran, view)
    return NodeCoverage(node, profile, ran, layer.name, reason)


def _satisfies(ran: str, wanted: str) -> bool:
    # The activation stays in its own precision; nothing multiplies INT4 by INT4.
    if wanted.endswith(WEIGHTS_ALONE) or wanted == "int4":
        return ran.endswith(f" x {wanted.removesuffix(WEIGHTS_ALONE)}")
    return ran == wanted


def _why_not(layer: EngineLayer, wanted: str, ran: str, view: _View) -> str:
    if kernels.expands_inside(layer):
        return f"its codes are expanded inside the kernel, which multiplies in {ran}"
    for tensor in layer.inputs:
        maker = view.making.get(tensor.name)
        if maker is None or tensor.dtype in kernels.NARROW:
            continue
        narrow = [t for t in maker.constants if t.dtype in kernels.NARROW and t.elements > 1]
        if narrow and not any(t.elements != 1 for t in maker.inputs):
            return f"its weight is expanded to {tensor.dtype} by {maker.name} on every call"
        if any(t.dtype in kernels.NARROW for t in maker.inputs):
            return f"its operand is expanded to {tensor.dtype} by {maker.name} first"
    left, right = kernels.operands(layer)
    if right == wanted:
        return f"only its weight is {wanted}: it multiplies in {left}"
    return f"its layer ran with {ran} operands"


def _raw_sums(layer: EngineLayer, view: _View) -> str:
    """Whether an 8-bit gemm leaves its scale to the next kernel and stores bare sums in FP16.

    The compiler does so for weight scales per channel, and where the merged gemms of one tensor
    have different scales: the next kernel, which then names the gemm's node too, multiplies by a
    vector. A sum of products of codes passes FP16's 65,504 at once.
    """
    outputs = [t for t in layer.outputs if t.dtype == "fp16"]
    if layer.kind != "gemm" or not outputs or kernels.multiply_dtype(layer) not in ("int8", "fp8"):
        return ""
    if any(kernels.multiplies_by_vector(r) and _share(r, layer) for r in view.readers(outputs)):
        return (
            "the gemm stores unscaled sums in fp16, which can overflow: give its weight "
            "one scale, shared by all that multiply the same tensor"
        )
    return ""


def _share(reader: EngineLayer, layer: EngineLayer) -> bool:
    return not set(reader.onnx_nodes).isdisjoint(layer.onnx_nodes)


def _cover_attention(
    node: WeightedNode, view: _View, profile: int, shapes: Profile
) -> NodeCoverage:
    multiplies = [view.multiplies(part) for part in (node.parts[0], node.parts[-1])]
    first, second = multiplies
    if first is None or second is None:
        return NodeCoverage(node, profile, "none", "", "no compiled layer names its two MatMuls")
    if first is second and kernels.is_attention(first):
        dtype = kernels.attention_dtype(first)
        reason = "" if dtype == node.wanted else f"fused, but in {dtype}"
        return NodeCoverage(node, profile, f"fused {dtype}", first.name, reason)
    kinds = " and ".join(f"a {kernels.multiply_dtype(x)} {x.kind}" for x in (first, second))
    reason = f"not fused: {kinds}"
    if node.wanted == "fp8" and (keys := _keys(view.naming.get(node.parts[1], []))) is not None:
        if keys < FUSED_ATTENTION_MINIMUM:
            reason += (
                f"; FP8 attention fuses from a sequence of {FUSED_ATTENTION_MINIMUM}, and this "
                f"one is {keys}"
            )
    elif node.wanted == "fp8" and (short := _shortest(shapes)) is not None:
        reason += (
            f"; FP8 attention fuses in a profile whose sequence starts at "
            f"{FUSED_ATTENTION_MINIMUM} or more, and this one starts at {short}"
        )
    elif "fp32" in kernels.multiply_dtype(first):
        reason += "; attention fuses in FP16 and BF16 only"
    ran = f"{kernels.multiply_dtype(first)} gemms"
    return NodeCoverage(node, profile, ran, first.name, reason)


def _keys(softmax: Iterable[EngineLayer]) -> int | None:
    """How many keys a query is compared with, from what the softmax makes; None while dynamic.

    The products do not tell it: an odd number is padded there.
    """
    lengths = [t.dims[-1] for layer in softmax for t in layer.outputs if t.dims]
    return lengths[0] if lengths and lengths[0] > 0 else None


def _shortest(shapes: Profile) -> int | None:
    """The smallest dynamic dimension below what fuses, other than a batch dimension's."""
    short = [
        low
        for entry in shapes
        for axis, (low, high) in enumerate(zip(entry.minimum, entry.maximum, strict=True))
        if axis > 0 and low != high and low < FUSED_ATTENTION_MINIMUM
    ]
    return min(short, default=None)
