"""Which nodes are quantized, and why: a pure function of (model, recipe, target).

Nothing here looks at calibration data or at the size of an activation, so the same model is placed
alike whatever the batch. The rules' sources are TensorRT's documentation of explicit quantization
and what its compiler was seen to do with each form (README, *What compiles*).

Additions are left alone, residual ones behind convolutions too. Quantizing the residual branch of
ResNet blocks removes no kernel in what tensorrt-rtx 1.7 compiles for sm89, in INT8 or FP8: 20
layers with and without. Under one scale a weight the convolution takes the addition in, with a
16-bit residual; the quantized one then costs 7 % more bytes. Under a scale a channel it saves 10 %
of the bytes between layers, and rounds the stream that every later block reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from onnxq.errors import OnnxqError
from onnxq.formats import QuantFormat, quant_format
from onnxq.gpus import Target
from onnxq.graph.model import Model
from onnxq.graph.query import constant_operand, known_shapes, label
from onnxq.graph.roles import first_convolutions, last_layers
from onnxq.recipe import Recipe, Rule
from onnxq.sites import Site, bystanders, find_sites

__all__ = ["Decision", "Placement", "Site", "find_sites", "place"]


@dataclass(frozen=True)
class Decision:
    """A site, whether it is quantized, and the reason in words."""

    site: Site
    quantized: bool
    reason: str


@dataclass(frozen=True)
class Placement:
    """Decisions in graph order."""

    recipe: Recipe
    target: Target
    decisions: tuple[Decision, ...]

    @property
    def quantized(self) -> tuple[Decision, ...]:
        """The sites to quantize."""
        return tuple(d for d in self.decisions if d.quantized)

    @property
    def left(self) -> tuple[Decision, ...]:
        """The sites left as they are."""
        return tuple(d for d in self.decisions if not d.quantized)

    def lines(self) -> list[str]:
        """One line a site, for people and golden tests."""
        return [
            f"{'quantize' if d.quantized else 'leave   '}  {d.site.kind:9}  {_shape(d.site):16}  "
            f"{d.site.name}{f' [{d.site.module}]' if d.site.module else ''}  {d.reason}"
            for d in self.decisions
        ]


def _shape(site: Site) -> str:
    return "x".join(map(str, site.operand.shape)) if site.operand else "-"


def place(model: Model, recipe: Recipe, target: Target) -> Placement:
    """Decide for every MatMul, Gemm, Conv, ConvTranspose and attention.

    Raises:
        OnnxqError: the model is quantized already, the target cannot run the format, or a rule
            of the recipe matches nothing.
    """
    fmt = quant_format(recipe.weights)
    if not target.runs(fmt.name):
        raise OnnxqError(
            f"recipe {recipe.name}: {target.name} ({target.architecture}) has no {fmt.name}",
            "use an int8 recipe, or name the target that will run it",
        )
    _refuse_quantized(model)
    sites = find_sites(model)
    context = _Context(
        model,
        recipe,
        fmt,
        last_layers(model),
        first_convolutions(model),
        _head_sizes(model, sites) if recipe.attention or recipe.rules else {},
    )
    decisions = [_decide(site, context) for site in sites]
    decisions += [Decision(site, False, reason) for site, reason in bystanders(model, sites)]
    decisions = _apply_rules(decisions, recipe.rules, context)
    return Placement(recipe, target, tuple(decisions))


def _refuse_quantized(model: Model) -> None:
    for node in model.graph.nodes:
        if node.op in (
            "QuantizeLinear",
            "DequantizeLinear",
            "DynamicQuantizeLinear",
            "QLinearMatMul",
            "QLinearConv",
            "MatMulInteger",
            "ConvInteger",
            "MatMulNBits",
        ):
            raise OnnxqError(
                f"{model.path} is quantized already ({node.op} {label(node)!r})",
                "start from the full-precision model",
            )


@dataclass(frozen=True)
class _Context:
    model: Model
    recipe: Recipe
    fmt: QuantFormat
    heads: frozenset[int]
    first_convs: frozenset[int]
    head_sizes: Mapping[int, int | None]


def _decide(site: Site, context: _Context) -> Decision:
    for rule in _RULES:
        reason = rule(site, context)
        if reason:
            return Decision(site, False, reason)
    recipe = context.recipe
    how = "scales computed per sample" if site.kind == "conv" else "scales computed per token"
    if recipe.mode == "static":
        how = f"{recipe.calibrator} range"
    if site.kind == "attention":
        return Decision(site, True, f"{recipe.activations} q, k, v and softmax ({how})")
    return Decision(
        site,
        True,
        f"{recipe.weights} weights per {recipe.weight_granularity}, "
        f"{recipe.activations} activations ({how})",
    )


def _not_a_candidate(site: Site, context: _Context) -> str:
    if site.kind == "attention":
        return "" if context.recipe.attention else "attention is left by the recipe"
    if site.kind == "product":
        return "both operands are computed, and it is no attention"
    if site.node.op not in context.recipe.ops:
        return (
            f"{site.node.op} is left: no fast 8-bit kernel"
            if site.node.op == "ConvTranspose"
            else f"the recipe leaves {site.node.op}"
        )
    return ""


def _odd_operands(site: Site, context: _Context) -> str:
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
    if node.attrs.get("transA", 0):
        return "Gemm with transA"
    if len(node.inputs) > 2 and node.op == "Gemm" and node.attrs.get("beta", 1.0) != 1.0:
        return "Gemm with beta: its bias cannot be added behind a rescale"
    return ""


def _thin(site: Site, context: _Context) -> str:
    """By the weight's shape alone: the rows of the activation never count."""
    if site.operand is None:
        return ""
    if site.kind == "linear":
        k, n = site.operand.shape
        if site.node.attrs.get("transB", 0):
            n, k = k, n
        if min(k, n) < 16:
            return f"thin: {k} x {n}, no 8-bit kernel below 16"
        return ""
    group = int(site.node.attrs.get("group", 1))
    out_channels, per_group, *kernel = site.operand.shape
    in_channels = per_group * group
    least = 16 if context.fmt.name == "int8" else 17
    if min(per_group, out_channels // group) < least:
        groups = f" in {group} groups" if group > 1 else ""
        return (
            f"thin: {in_channels} -> {out_channels} channels{groups}, "
            f"no {context.fmt.name} kernel below {least}"
        )
    volume = 1
    for size in kernel:
        volume *= size
    if context.fmt.name == "fp8" and volume > 32:
        return f"kernel of {volume} taps, no fp8 kernel above 32"
    return ""


def _by_role(site: Site, context: _Context) -> str:
    recipe = context.recipe
    if recipe.first == "leave" and id(site.node) in context.first_convs:
        return "first convolution, left by the recipe"
    if id(site.node) in context.heads and site.operand is not None:
        if _is_lm_head(site) and recipe.lm_head == "leave":
            return "lm_head, left by the recipe"
        if recipe.last == "leave":
            return "makes an output, left by the recipe"
    return ""


def _attention_shape(site: Site, context: _Context) -> str:
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


def _head_sizes(model: Model, sites: Sequence[Site]) -> dict[int, int | None]:
    """By id of each attention's first product: the length that q and k are multiplied over."""
    tensors = {id(s.node): s.node.inputs[0] for s in sites if s.attention is not None}
    shapes = known_shapes(model, tensors.values())
    last = {key: (shapes[t.name] or [None])[-1] for key, t in tensors.items()}
    return {key: size if isinstance(size, int) else None for key, size in last.items()}


_RULES: tuple[Callable[[Site, _Context], str], ...] = (
    _not_a_candidate,
    _odd_operands,
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


def _apply_rules(
    decisions: list[Decision], rules: tuple[Rule, ...], context: _Context
) -> list[Decision]:
    for rule in rules:
        hits = [i for i, d in enumerate(decisions) if _matches(rule, d.site)]
        if not hits:
            names = ", ".join(sorted(d.site.name for d in decisions)[:3])
            raise OnnxqError(
                f"the rule '{rule}' matches no node",
                f"see `onnxq inspect` for the names (such as {names}); * and ? are wildcards",
            )
        decisions = list(decisions)
        for i in hits:
            decisions[i] = _overrule(decisions[i], rule, context)
        if rule.action == "quantize" and not any(decisions[i].quantized for i in hits):
            first = decisions[hits[0]]
            raise OnnxqError(
                f"the rule '{rule}' asks for {first.site.name!r}, which cannot be quantized: "
                f"{first.reason}",
                "take the rule out, or name another node",
            )
    return decisions


def _overrule(decision: Decision, rule: Rule, context: _Context) -> Decision:
    site = decision.site
    if rule.action == "leave":
        return Decision(site, False, f"left by the rule '{rule}'")
    obstacle = _obstacle(decision, context)
    if obstacle:
        return Decision(site, False, obstacle)
    return Decision(site, True, f"quantized by the rule '{rule}'")


def _obstacle(decision: Decision, context: _Context) -> str:
    """Why no rule can have a site quantized, or ''."""
    site = decision.site
    if site.kind == "attention":
        static_fp8 = context.fmt.name == "fp8" and context.recipe.mode == "static"
        return "" if static_fp8 else "attention is quantized in static fp8 only"
    if site.kind == "other":
        return decision.reason
    if site.node.op == "ConvTranspose" or site.kind == "product":
        return _not_a_candidate(site, context)
    return _odd_operands(site, context)


def _matches(rule: Rule, site: Site) -> bool:
    return any(
        all(
            _glob(pattern).fullmatch(text) is not None
            for pattern, text in (
                (rule.node, label(node)),
                (rule.weight, site.weight_name),
                (rule.module, site.module),
                (rule.op, node.op),
            )
            if pattern
        )
        for node in site.nodes
    )


@cache
def _glob(pattern: str) -> re.Pattern[str]:
    """`*` and `?` are wildcards; brackets are not, since node names are full of them."""
    text = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(text, re.DOTALL)
