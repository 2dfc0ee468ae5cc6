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
from dataclasses import dataclass, replace
from functools import cache

from onnxq.errors import OnnxqError
from onnxq.formats import PerBlock, PerTensor
from onnxq.gpus import Target
from onnxq.graph.model import Model
from onnxq.graph.query import label
from onnxq.graph.roles import first_convolutions, last_layers
from onnxq.graph.strip import is_quantized
from onnxq.reasons import Context, head_sizes, obstacle, reason_to_leave
from onnxq.recipe import Recipe, Rule
from onnxq.schemes import granularity
from onnxq.sites import Site, bystanders, current, find_sites
from onnxq.unet import recognised, unet_roles

__all__ = ["Decision", "Placement", "Site", "find_sites", "place"]


@dataclass(frozen=True)
class Decision:
    """A site, whether it is quantized, and the reason in words."""

    site: Site
    quantized: bool
    reason: str


@dataclass(frozen=True)
class Placement:
    """Decisions in graph order; `notes` say what roles of layers were recognised, and how."""

    recipe: Recipe
    target: Target
    decisions: tuple[Decision, ...]
    notes: tuple[str, ...] = ()

    @property
    def quantized(self) -> tuple[Decision, ...]:
        """The sites to quantize."""
        return tuple(d for d in self.decisions if d.quantized)

    @property
    def left(self) -> tuple[Decision, ...]:
        """The sites left as they are."""
        return tuple(d for d in self.decisions if not d.quantized)

    def groups(self) -> list[list[Site]]:
        """Quantized sites, those that read one tensor together (q, k, v), in graph order."""
        found: dict[tuple[int, str], list[Site]] = {}
        for decision in self.quantized:
            site = decision.site
            found.setdefault((id(site.node.inputs[0]), site.kind), []).append(site)
        return list(found.values())

    def current(self) -> Placement:
        """The same with the weights that the sites' nodes read now, after some were rescaled."""
        found = (replace(d, site=current(d.site)) for d in self.decisions)
        return replace(self, decisions=tuple(found))

    def lines(self) -> list[str]:
        """One line a site, for people and golden tests."""
        done = "quantize" if self.recipe.quantizes else "prune   "
        return [
            f"{done if d.quantized else 'leave   '}  {d.site.kind:9}  {_shape(d.site):16}  "
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
    _refuse_target(recipe, target)
    _refuse_quantized(model)
    sites, notes = _with_roles(model, find_sites(model), recipe)
    context = Context(
        model,
        recipe,
        recipe.activation_format,
        last_layers(model),
        first_convolutions(model),
        head_sizes(model, sites) if recipe.attention or recipe.rules else {},
    )
    decisions = [_decide(site, context) for site in sites]
    decisions += [Decision(site, False, reason) for site, reason in bystanders(model, sites)]
    decisions = _apply_rules(decisions, recipe.rules_here, context)
    return Placement(recipe, target, tuple(decisions), notes)


def _with_roles(
    model: Model, sites: list[Site], recipe: Recipe
) -> tuple[list[Site], tuple[str, ...]]:
    """The sites with their roles, if any rule goes by role, and what was recognised."""
    if not any(rule.role for rule in recipe.rules):
        return sites, ()
    roles = unet_roles(model, sites)
    found = [replace(site, role=roles[id(site.node)].word) for site in sites]
    return found, tuple(recognised(roles.values()))


def _refuse_target(recipe: Recipe, target: Target) -> None:
    if not recipe.quantizes:
        return
    for fmt in (recipe.weight_format, recipe.activation_format):
        if fmt is not None and not target.runs(fmt.name):
            raise OnnxqError(
                f"recipe {recipe.name}: {target.name} ({target.architecture}) has no {fmt.name}",
                "use an int8 recipe, or name the target that will run it",
            )
    if recipe.activation_format is None and not target.fuses_weight_only:
        raise OnnxqError(
            f"recipe {recipe.name}: {target.name} ({target.architecture}) would expand every "
            "weight at every call",
            "use the recipe int8-dynamic, or name the target that will run it",
        )


def _refuse_quantized(model: Model) -> None:
    for node in model.graph.nodes:
        if is_quantized(node):
            raise OnnxqError(
                f"{model.path} is quantized already ({node.op} {label(node)!r})",
                "start from the full-precision model, or take it out with --requantize",
            )


def _decide(site: Site, context: Context) -> Decision:
    reason = reason_to_leave(site, context)
    if reason:
        return Decision(site, False, reason)
    return Decision(site, True, _said(site, context.recipe))


def _said(site: Site, recipe: Recipe) -> str:
    """What is done with a site that is quantized, or pruned."""
    if not recipe.quantizes:
        return f"{recipe.sparsity} along its inputs, weights in their type"
    how = "scales computed per sample" if site.kind == "conv" else "scales computed per token"
    if recipe.needs_ranges:
        how = f"{recipe.calibrator_of(site.kind)} range"
    if recipe.activations == "mxfp8":
        how = "scales computed per block"
    if site.kind == "attention":
        return f"{recipe.activations} q, k, v and softmax ({how})"
    divided = granularity(site, recipe)
    each = "per tensor" if isinstance(divided, PerTensor) else "per channel"
    if isinstance(divided, PerBlock):
        each = f"in blocks of {divided.size}"
    if recipe.activation_format is None:
        return f"{recipe.weights} weights {each}, activations as they are"
    return f"{recipe.weights} weights {each}, {recipe.activations} activations ({how})"


def _apply_rules(
    decisions: list[Decision], rules: tuple[Rule, ...], context: Context
) -> list[Decision]:
    for rule in rules:
        hits = [i for i, d in enumerate(decisions) if _matches(rule, d.site)]
        if not hits and rule.role:
            continue
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


def _overrule(decision: Decision, rule: Rule, context: Context) -> Decision:
    site = decision.site
    if rule.action == "leave":
        return Decision(site, False, f"left by the rule '{rule}'")
    against = decision.reason if site.kind == "other" else obstacle(site, context)
    if against:
        return Decision(site, False, against)
    return Decision(site, True, f"quantized by the rule '{rule}'")


def _matches(rule: Rule, site: Site) -> bool:
    return any(
        all(
            _glob(pattern).fullmatch(text) is not None
            for pattern, text in (
                (rule.node, label(node)),
                (rule.weight, site.weight_name),
                (rule.module, site.module),
                (rule.op, node.op),
                (rule.role, site.role),
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
