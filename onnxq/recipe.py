"""Recipes: what to quantize, to which format, how; plain data that reads and writes YAML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from onnxq.algorithms import DATA_FREE, NEEDS, STEPS
from onnxq.errors import OnnxqError
from onnxq.formats import PerBlock, PerTensor, QuantFormat, QuantScheme, quant_format
from onnxq.gpus import Target
from onnxq.recipe_checks import OPS, check_calibrator, check_types, check_values
from onnxq.rules import Choice, Rule, parse_rule, rule_from
from onnxq.sparsity import Pattern

__all__ = [
    "Recipe",
    "Rule",
    "check_calibrator",
    "default_for",
    "from_dict",
    "load",
    "parse_rule",
    "presets",
]

Mode = Literal["static", "dynamic"]
# At 19 and 20, which have FP8 too, ONNX Runtime moves a Transpose to between Q and DQ: it has none.
_FP8_FROM = 21


@dataclass(frozen=True)
class Recipe:
    """What a run does.

    Attributes:
        name: preset's name, or the file's.
        description: a sentence for people.
        weights: format of the weights, or `none`: they are pruned, and stay in their type.
        weight_granularity: `channel` (one scale an output channel) or `tensor`; formats that come
            in blocks have a scale a block whatever it says.
        qkv_granularity: the same for the layers that make q, k and v, where rules go by role: a
            scale a channel costs each of them a kernel between its product and the attention.
        block_size: elements under one scale of a 4-bit weight; a power of two. A layer whose
            length it does not divide gets a smaller one. 0: the format says.
        activations: format of the activations, or `none`: only weights are quantized.
        mode: `static` (calibrated scales) or `dynamic` (computed in the graph, no data).
        calibrator: `max`, `percentile:99.99`, `entropy`, `mse`, `mse:2` (see `calibrate.ranges`),
            `output`: the least error of what the layers make of it (see `clipping`), or `steps`: of
            each denoising step the mean over its samples, of these the smallest, as NVIDIA does
            for the convolutions of SDXL (see `calibrate.steps` for what that may cost).
        conv_calibrator: the same for convolutions; '': as for all.
        sparsity: pattern of zeros, such as `2:4` (see `onnxq.sparsity`); '': none. A step says how.
        steps: methods on the weights, in order: see `onnxq.algorithms.STEPS`; none: the largest
            weight becomes the largest code, and all are rounded to nearest.
        alpha: how far the step `smoothquant` goes, from 0 (weights alike) to 1 (inputs alike);
            None: each input its own, that of the least error.
        explicit: where nothing before a layer can take the factors of `smoothquant`, put a Mul
            before it.
        keep_worst: at most so many layers are left as they are, those that cause the largest error
            of the model's outputs on the calibration data; 0: no such bound.
        keep_flops: at most so large a share of the layers' multiplications is left; 0: no bound.
        snr: decibels of the outputs at which no more layers are left; None: up to the bounds.
        center: give activations that lie mostly to one side of 0 a range around another middle
            (static INT8; see `centers`).
        attention: quantize the two products and the probabilities of each attention.
        lm_head, first, last: what happens to the vocabulary projection, to the first convolution
            and to the layer that makes an output.
        ops: operators that are candidates.
        level: how much of a diffusion UNet is quantized, for rules that say `below`: 1 its
            convolutions, 2 the feed-forward layers too, 2.5 and those of q, k and v, 3 and all
            other linear layers, 4 and the attentions. 0: the recipe has no levels.
        rules: overrides by name.
    """

    name: str
    description: str = ""
    weights: str = "fp8"
    weight_granularity: Literal["channel", "tensor"] = "channel"
    qkv_granularity: Literal["channel", "tensor"] = "channel"
    block_size: int = 0
    activations: str = "fp8"
    mode: Mode = "static"
    calibrator: str = "max"
    conv_calibrator: str = ""
    sparsity: str = ""
    steps: tuple[str, ...] = ()
    alpha: float | None = None
    explicit: bool = False
    keep_worst: int = 0
    keep_flops: float = 0.0
    snr: float | None = None
    center: bool = False
    attention: bool = False
    lm_head: Choice = "leave"
    first: Choice = "quantize"
    last: Choice = "quantize"
    ops: tuple[str, ...] = OPS
    level: float = 0.0
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        check_values(self)

    def calibrator_of(self, kind: str) -> str:
        """The calibrator of a kind of site."""
        return (self.conv_calibrator if kind == "conv" else "") or self.calibrator

    @property
    def rules_here(self) -> tuple[Rule, ...]:
        """The rules that count at the recipe's level."""
        return tuple(rule for rule in self.rules if not rule.below or self.level < rule.below)

    @property
    def needs_data(self) -> bool:
        """Whether a calibration is needed: for ranges, or for the steps' Gram matrices."""
        return self.needs_ranges or self.looks_at_inputs or self.keeps

    @property
    def looks_at_inputs(self) -> bool:
        """Whether any of its steps looks at what the layers read."""
        return any(name not in DATA_FREE for name in self.steps)

    @property
    def needs_grams(self) -> bool:
        """Whether its steps take Gram matrices of a calibration; some run the model themselves."""
        steps = [name for name in self.steps if name not in (*NEEDS, *DATA_FREE)]
        rescales = any(STEPS[name][0] == "rescale" for name in steps)
        return bool(steps) and (rescales or "sequential" not in steps)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What its steps need to know of every layer's input, by the names of `calibrate`."""
        needs = [s for name in self.steps if name in NEEDS for s in NEEDS[name]]
        if self.alpha is not None:  # nothing is tried on rows
            needs = [s for s in needs if s != "rows"]
        return (*needs, "gram") if self.needs_grams else (*needs,)

    @property
    def keeps(self) -> bool:
        """Whether layers are left for the error they cause."""
        return bool(self.keep_worst or self.keep_flops or self.snr is not None)

    @property
    def needs_ranges(self) -> bool:
        """Whether it has static scales of activations."""
        return self.mode == "static" and self.activations not in ("none", "mxfp8")

    @property
    def quantizes(self) -> bool:
        """Whether weights become codes; else they are pruned, and that is all."""
        return self.weights != "none"

    @property
    def pattern(self) -> Pattern | None:
        """The pattern of zeros it asks for."""
        return Pattern.parse(self.sparsity) if self.sparsity else None

    @property
    def weight_format(self) -> QuantFormat:
        """The row of `weights`; there is none where it does not quantize."""
        return quant_format(self.weights)

    @property
    def activation_format(self) -> QuantFormat | None:
        """The row of `activations`; None where they stay as they are."""
        return None if self.activations == "none" else quant_format(self.activations)

    @property
    def block(self) -> int:
        """Elements under one scale of a weight, as far as its length allows; 0: no blocks."""
        return (self.weight_format.block if self.quantizes else 0) or self.block_size

    @property
    def min_opset(self) -> int:
        """First opset that can say what it asks for, and that ONNX Runtime loads."""
        if not self.quantizes:
            return 0
        scheme = QuantScheme(
            self.weight_format, PerBlock(0, self.block) if self.block else PerTensor(), ""
        )
        formats = [self.weight_format.name, self.activations]
        return max(
            scheme.min_opset,
            getattr(self.activation_format, "min_opset", 0),
            _FP8_FROM if "fp8" in formats else 0,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data as YAML and JSON have it; `from_dict` reads it back."""
        content = _shallow(self)
        lists = {"ops": list(self.ops), "steps": list(self.steps)}
        return {**content, **lists, "rules": [r.as_dict() for r in self.rules]}

    def with_changes(self, changes: Sequence[str]) -> Recipe:
        """The same with some fields set, each as `field=value`, the value as YAML has it.

        Raises:
            OnnxqError: one is no such assignment, or there is no such field or value.
        """
        given = {}
        for text in changes:
            name, equals, value = text.partition("=")
            if not equals or name in ("name", "rules"):
                raise OnnxqError(
                    f"cannot set {text!r} in recipe {self.name}",
                    "write field=value, such as block_size=32 or steps=[search,gptq]",
                )
            given[name] = _yaml(value, f"{self.name}: {name}")
        return from_dict({**self.as_dict(), **given}, self.name) if given else self

    def keeping(self, nodes: tuple[str, ...]) -> Recipe:
        """The same with the layers named that its bounds on error chose, instead of the bounds."""
        settled = replace(self, keep_worst=0, keep_flops=0.0, snr=None)
        return settled.with_rules(tuple(Rule("leave", node=name) for name in nodes))

    def with_rules(self, rules: tuple[Rule, ...]) -> Recipe:
        """The same with more rules behind its own."""
        return Recipe(**{**_shallow(self), "rules": (*self.rules, *rules)})


def from_dict(content: Mapping[str, Any], source: str) -> Recipe:
    """Read a recipe from plain data.

    Args:
        source: the file's name; the recipe is called so unless it says otherwise.

    Raises:
        OnnxqError: an unknown field or value, naming it and what is allowed.
    """
    if not isinstance(content, Mapping):
        raise OnnxqError(
            f"recipe {source}: not a mapping of fields", "see the presets for the form"
        )
    known = {f.name for f in fields(Recipe)}
    unknown = sorted(set(map(str, content)) - known)
    if unknown:
        raise OnnxqError(
            f"recipe {source}: unknown field {unknown[0]!r}",
            f"fields are: {', '.join(sorted(known))} (or does it come from a newer onnxq?)",
        )
    values = {"name": Path(source).stem, **content}
    values["sparsity"] = _unread(values.get("sparsity", ""))
    check_types(f"recipe {source}", values)
    values["rules"] = tuple(rule_from(r, f"recipe {source}") for r in values.get("rules", ()))
    values["ops"] = tuple(values.get("ops", OPS))
    values["steps"] = tuple(values.get("steps", ()))
    return Recipe(**values)


def _unread(value: Any) -> Any:
    """A pattern as it was typed: YAML reads a bare 2:4 as sixties, 124, and 0.5 as a number."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 60:
        return f"{value // 60}:{value % 60}"
    return f"{value:g}" if isinstance(value, float) else value


def _shallow(recipe: Recipe) -> dict[str, Any]:
    return {f.name: getattr(recipe, f.name) for f in fields(recipe)}


@cache
def presets() -> dict[str, Recipe]:
    """The recipes that come with onnxq, by name."""
    found = {}
    for entry in sorted(resources.files("onnxq.recipes").iterdir(), key=lambda e: e.name[:-5]):
        if entry.name.endswith(".yaml"):
            found[entry.name[:-5]] = from_dict(
                _yaml(entry.read_text("utf-8"), entry.name), entry.name
            )
    return found


def load(name: str) -> Recipe:
    """A preset by name, or a YAML file by path."""
    if name in presets():
        return presets()[name]
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or path.exists():
        if not path.is_file():
            raise OnnxqError(f"no such recipe file: {path}", "check the path")
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            raise OnnxqError(f"recipe {path} is not text", "a recipe is a YAML file") from None
        except OSError as error:
            raise OnnxqError(f"cannot read recipe {path}: {error.strerror}", "") from None
        return from_dict(_yaml(text, str(path)), str(path))
    raise OnnxqError(
        f"unknown recipe {name!r}", f"choose one of: {', '.join(presets())}, or a .yaml file"
    )


def _yaml(text: str, source: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OnnxqError(f"recipe {source} is not YAML: {error}".replace("\n", " "), "") from None


def default_for(target: Target) -> tuple[Recipe, str]:
    """The recipe when nobody chose one and there is no data, and why."""
    if target.runs("fp8"):
        return presets()["fp8-dynamic"], f"{target.name} multiplies FP8, and no data was given"
    return presets()["int8-dynamic"], f"{target.name} has no FP8, and no data was given"
