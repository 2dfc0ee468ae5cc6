"""Why a layer is left: one function a reason, in the order they are asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from onnxq.formats import QuantFormat
from onnxq.graph.model import Model
from onnxq.graph.query import constant_operand, known_shapes
from onnxq.layouts import layout_of
from onnxq.recipe import Recipe
from onnxq.schemes import LEAST_BLOCK, granularity, output_axis, summed_axis
from onnxq.sites import Site


@dataclass(frozen=True)
class Context:
    model: Model
    recipe: Recipe
    fmt: QuantFormat | None  # of the activations
    heads: frozenset[int]
    first_convs: frozenset[int]
    head_sizes: Mapping[int, int | None]


def _not_a_candidate(site: Site, context: Context) -> str:
    if site.kind == "attention" and context.recipe.quantizes:
        return "" if context.recipe.attention else "attention is left by the recipe"
    if site.kind in ("attention", "product") and not context.recipe.quantizes:
        return "it multiplies two computed operands"
    if site.kind == "product":
        return "both operands are computed, and it is no attention"
    if site.node.op not in context.recipe.ops:
        return (
            f"{site.node.op} is left: no fast 8-bit kernel"
            if site.node.op == "ConvTranspose"
            else f"the recipe leaves {site.node.op}"
        )
    return ""


def _odd_operands(site: Site, context: Context) -> str:
    node, operand = site.node, site.operand
    if site.kind == "attention":
        return ""
    if operand is None:
        return (
            "its weight is computed" if site.kind == "conv" else "its weight is the first operand"
        )
    if constant_operand(node, 0) is not None:
        return "both of its operands are constant"
    if site.kind == "linear" and len(operand.shape) != 2:
        return f"its weight has {len(operand.shape)} dimensions, not 2"
    if site.kind == "conv" and len(operand.shape) < 3:
        return f"its weight has {len(operand.shape)} dimensions, not 3 or more"
    groups = int(node.attrs.get("group", 1)) if site.kind == "conv" else 1
    if groups < 1 or operand.shape[0] % groups:
        return f"{operand.shape[0]} channels make no {groups} groups"
    if node.attrs.get("transA", 0):
        return "Gemm with transA"
    if len(node.inputs) > 2 and node.op == "Gemm" and node.attrs.get("beta", 1.0) != 1.0:
        return "Gemm with beta: its bias cannot be added behind a rescale"
    return ""


def _unfit(site: Site, context: Context) -> str:
    """What keeps a format from a layer that another might have."""
    recipe = context.recipe
    if not recipe.quantizes:
        return _unpruned(site, recipe)
    if site.operand is None or (context.fmt is not None and not recipe.block):
        return ""
    if site.kind == "conv":
        return f"{recipe.weights} weights of a convolution would be expanded at every call"
    length = site.operand.shape[summed_axis(site)]
    if granularity(site, recipe) is None:
        if recipe.weight_format.block:
            return f"its length {length} is no multiple of the block of {recipe.block}"
        sizes = (
            f"{LEAST_BLOCK} to {recipe.block}" if recipe.block > LEAST_BLOCK else f"{LEAST_BLOCK}"
        )
        return f"its length {length} is not made of two or more equal blocks of {sizes}"
    if length % 2 or site.operand.shape[output_axis(site)] % 2:
        return "an odd number of channels: its weight would be padded at every call"
    return ""


def _unpruned(site: Site, recipe: Recipe) -> str:
    if site.operand is None or recipe.pattern is None:
        return ""
    return recipe.pattern.obstacle(layout_of(site).channels)


def _thin(site: Site, context: Context) -> str:
    """By the weight's shape alone: the rows of the activation never count.

    tensorrt-rtx 1.7.1 pads what is thinner and multiplies it in 8 bits; TensorRT's documentation
    promises fast kernels from 16 on.
    """
    if site.operand is None or not context.recipe.quantizes:
        return ""
    if site.kind == "linear":
        k, n = site.operand.shape
        if site.node.attrs.get("transB", 0):
            n, k = k, n
        if min(k, n) < 16:
            return f"thin: {k} x {n}, no fast 8-bit kernel below 16"
        return ""
    group = int(site.node.attrs.get("group", 1))
    out_channels, per_group, *kernel = site.operand.shape
    in_channels = per_group * group
    assert context.fmt is not None  # `_unfit`: weights alone are quantized in linear layers only
    least = 16 if context.fmt.name == "int8" else 17
    if min(per_group, out_channels // group) < least:
        groups = f" in {group} groups" if group > 1 else ""
        return (
            f"thin: {in_channels} -> {out_channels} channels{groups}, "
            f"no fast {context.fmt.name} kernel below {least}"
        )
    volume = 1
    for size in kernel:
        volume *= size
    if context.fmt.name == "fp8" and volume > 32:
        return f"kernel of {volume} taps, no fp8 kernel above 32"
    return ""


def _by_role(site: Site, context: Context) -> str:
    recipe = context.recipe
    if recipe.first == "leave" and id(site.node) in context.first_convs:
        return "first convolution, left by the recipe"
    if id(site.node) in context.heads and site.operand is not None:
        if _is_lm_head(site) and recipe.lm_head == "leave":
            return "lm_head, left by the recipe"
        if recipe.last == "leave":
            return "makes an output, left by the recipe"
    return ""


def _attention_shape(site: Site, context: Context) -> str:
    if site.attention is None:
        return ""
    behind = site.attention.between[site.attention.between.index(site.attention.softmax) :]
    if any(node.op == "Where" for node in behind):
        return "a Where behind its softmax: TensorRT fuses that in 16 bits only"
    size = context.head_sizes.get(id(site.node))
    if size is None:
        return "head size unknown: fused attention needs a multiple of 16 up to 256"
    if size % 16 or size > 256:
        return f"head size {size}: fused attention needs a multiple of 16 up to 256"
    return ""


def head_sizes(model: Model, sites: Sequence[Site]) -> dict[int, int | None]:
    """By id of each attention's first product: the length that q and k are multiplied over."""
    tensors = {id(s.node): s.node.inputs[0] for s in sites if s.attention is not None}
    shapes = known_shapes(model, tensors.values())
    last = {key: (shapes[t.name] or [None])[-1] for key, t in tensors.items()}
    return {key: size if isinstance(size, int) else None for key, size in last.items()}


_REASONS: tuple[Callable[[Site, Context], str], ...] = (
    _not_a_candidate,
    _odd_operands,
    _unfit,
    _thin,
    _by_role,
    _attention_shape,
)
"""Each names the reason to leave a site, or ''; the first reason stands."""


def _is_lm_head(site: Site) -> bool:
    """A projection onto a vocabulary: tied with an embedding, eight times as wide, or so named."""
    if site.operand is None or site.kind != "linear":
        return False
    tied = any(consumer.op == "Gather" for consumer in site.operand.constant.outputs)
    k, n = site.operand.shape
    if site.node.attrs.get("transB", 0):
        n, k = k, n
    return tied or n >= 8 * k or "lm_head" in site.name or site.module.endswith("lm_head")


def reason_to_leave(site: Site, context: Context) -> str:
    """The first reason against quantizing a site, or ''."""
    return next((reason for why in _REASONS if (reason := why(site, context))), "")


def obstacle(site: Site, context: Context) -> str:
    """Why no rule of the user can have a site quantized, or ''."""
    if site.kind == "attention":
        static_fp8 = context.recipe.activations == "fp8" and context.recipe.mode == "static"
        return "" if static_fp8 else "attention is quantized in static fp8 only"
    if site.node.op == "ConvTranspose" or site.kind == "product":
        return _not_a_candidate(site, context)
    return _odd_operands(site, context) or _unfit(site, context)
