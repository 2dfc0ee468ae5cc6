"""Which nodes are quantized, and why: a pure function of (model, recipe, target).

Nothing here looks at calibration data or at the size of an activation, so the same model is placed
alike whatever the batch. The rules' sources are TensorRT's documentation of explicit quantization
and what its compiler was seen to do with each form (README, *What compiles*).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import onnx_graphsurgeon as gs

from onnxq.errors import OnnxqError
from onnxq.formats import QuantFormat, quant_format
from onnxq.gpus import Target
from onnxq.graph.model import Model
from onnxq.graph.query import (
    Attention,
    ConstantOperand,
    attentions,
    constant_operand,
    is_floating,
    label,
    module_path,
    producer,
)
from onnxq.recipe import Recipe, Rule


@dataclass(frozen=True)
class Site:
    """A place that could be quantized.

    Attributes:
        node: the multiplying node (for an attention: the product of q and k).
        kind: `linear`, `conv`, `attention` or `product` (two computed operands).
        operand: the weight, as the node sees it.
        module: module path from the metadata, or ''.
        attention: the pattern, for an attention.
    """

    node: gs.Node
    kind: str
    operand: ConstantOperand | None = None
    module: str = ""
    attention: Attention | None = None

    @property
    def name(self) -> str:
        """The node's name."""
        return label(self.node)

    @property
    def weight_name(self) -> str:
        """The initializer's name, or ''."""
        return self.operand.constant.name if self.operand else ""


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
            f"{d.site.name}  {d.reason}"
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
    context = _Context(model, recipe, fmt, _heads(model), _first_convs(model))
    decisions = [_decide(site, context) for site in sites]
    decisions = _apply_rules(decisions, recipe.rules)
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


def find_sites(model: Model) -> list[Site]:
    """Every node that multiplies matrices or convolves, in graph order."""
    patterns = {id(a.scores): a for a in attentions(model)}
    second = {id(a.values) for a in patterns.values()}
    sites = []
    for node in model.graph.nodes:
        if node.op not in ("MatMul", "Gemm", "Conv", "ConvTranspose") or node.domain:
            continue
        if id(node) in second or not all(is_floating(t.dtype) for t in node.inputs[:2]):
            continue
        module = module_path(model, node)
        if id(node) in patterns:
            sites.append(Site(node, "attention", None, module, patterns[id(node)]))
            continue
        operand = constant_operand(node, 1)
        linear = "linear" if operand or constant_operand(node, 0) else "product"
        kind = "conv" if node.op.startswith("Conv") else linear
        sites.append(Site(node, kind, operand, module))
    return sites


@dataclass(frozen=True)
class _Context:
    model: Model
    recipe: Recipe
    fmt: QuantFormat
    heads: frozenset[int]
    first_convs: frozenset[int]


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
        if n == 1 or min(k, n) < 16:
            return f"thin: {k} x {n}, no 8-bit kernel below 16"
        return ""
    group = int(site.node.attrs.get("group", 1))
    out_channels, per_group, *kernel = site.operand.shape
    in_channels = per_group * group
    least = 16 if context.fmt.name == "int8" else 17
    if min(per_group, out_channels // group) < least:
        what = f"{in_channels} -> {out_channels}" + (f" in {group} groups" if group > 1 else "")
        return f"thin: {what} channels, no {context.fmt.name} kernel below {least}"
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
        if _is_lm_head(site, context.model) and recipe.lm_head == "leave":
            return "lm_head, left by the recipe"
        if recipe.last == "leave":
            return "makes an output, left by the recipe"
    return ""


def _attention_shape(site: Site, context: _Context) -> str:
    if site.attention is None:
        return ""
    size = (site.attention.scores.inputs[0].shape or [None])[-1]
    if isinstance(size, int) and (size % 16 or size > 256):
        return f"head size {size}: fused attention needs a multiple of 16 up to 256"
    return ""


_RULES: tuple[Callable[[Site, _Context], str], ...] = (
    _not_a_candidate,
    _odd_operands,
    _thin,
    _by_role,
    _attention_shape,
)
"""Each names the reason to leave a site, or ''; the first reason stands."""

_TO_OUTPUT = (
    "Cast",
    "Add",
    "Identity",
    "Reshape",
    "Squeeze",
    "Softmax",
    "Sigmoid",
    "LogSoftmax",
    "Transpose",
    "Mul",
    "Div",
    "Slice",
    "Tanh",
    "Clip",
)


def _heads(model: Model) -> frozenset[int]:
    """Multiplying nodes that reach a graph output through elementwise and layout nodes only."""
    found, seen = set(), set()
    stack = list(model.graph.outputs)
    while stack:
        node = producer(stack.pop())
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if node.op in ("MatMul", "Gemm", "Conv"):
            found.add(id(node))
        elif node.op in _TO_OUTPUT:
            stack.extend(node.inputs)
    return frozenset(found)


def _is_lm_head(site: Site, model: Model) -> bool:
    """A projection onto the vocabulary: tied with an embedding, or wide beyond any other layer."""
    assert site.operand is not None
    tied = any(consumer.op == "Gather" for consumer in site.operand.constant.outputs)
    if site.kind != "linear":
        return False
    k, n = site.operand.shape
    if site.node.attrs.get("transB", 0):
        n, k = k, n
    return tied or n >= 8 * k or "lm_head" in site.name or site.module.endswith("lm_head")


def _first_convs(model: Model) -> frozenset[int]:
    inputs = {id(t) for t in model.graph.inputs}
    found = set()
    for node in model.graph.nodes:
        if node.op == "Conv":
            tensor = node.inputs[0]
            source = producer(tensor)
            while source is not None and source.op in (
                "Cast",
                "Sub",
                "Div",
                "Mul",
                "Add",
                "Transpose",
            ):
                tensor = source.inputs[0]
                source = producer(tensor)
            if id(tensor) in inputs:
                found.add(id(node))
    return frozenset(found)


def _apply_rules(decisions: list[Decision], rules: tuple[Rule, ...]) -> list[Decision]:
    for rule in rules:
        matched = [_matches(rule, d.site) for d in decisions]
        if not any(matched):
            names = ", ".join(sorted(d.site.name for d in decisions)[:3])
            raise OnnxqError(
                f"the rule '{rule}' matches no node",
                f"see `onnxq inspect` for the names (such as {names}); * and ? are wildcards",
            )
        decisions = [
            _overrule(d, rule) if hit else d for d, hit in zip(decisions, matched, strict=True)
        ]
    return decisions


def _overrule(decision: Decision, rule: Rule) -> Decision:
    if rule.action == "leave":
        return Decision(decision.site, False, f"left by the rule '{rule}'")
    impossible = decision.site.operand is None and decision.site.kind != "attention"
    if impossible or decision.site.node.op == "ConvTranspose":
        raise OnnxqError(
            f"the rule '{rule}' asks for {decision.site.name!r}, which cannot be quantized: "
            f"{decision.reason}",
            "narrow the rule",
        )
    return Decision(decision.site, True, f"quantized by the rule '{rule}'")


def _matches(rule: Rule, site: Site) -> bool:
    return all(
        _glob(pattern).fullmatch(text) is not None
        for pattern, text in (
            (rule.node, site.name),
            (rule.weight, site.weight_name),
            (rule.module, site.module),
            (rule.op, site.node.op),
        )
        if pattern
    )


@cache
def _glob(pattern: str) -> re.Pattern[str]:
    """`*` and `?` are wildcards; brackets are not, since node names are full of them."""
    text = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.compile(text, re.DOTALL)
