"""Recipes: what to quantize, to which format, how; plain data that reads and writes YAML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from onnxq.errors import OnnxqError
from onnxq.formats import quant_format
from onnxq.gpus import Target

Mode = Literal["static", "dynamic"]
Choice = Literal["quantize", "leave"]

_CALIBRATORS = ("max", "percentile", "entropy", "mse")
_OPS = ("MatMul", "Gemm", "Conv")
_CHOICES = ("quantize", "leave")


@dataclass(frozen=True)
class Rule:
    """Overrides the placement of the nodes it matches; of several rules the last one wins.

    Every pattern given must match. A pattern is the exact text, or a glob where it holds `*` or
    `?`. A rule that matches no node is an error.

    Attributes:
        action: `leave` or `quantize`.
        node: the node's name.
        weight: the name of its weight's initializer.
        module: the module path in the node's metadata.
        op: the operator type.
    """

    action: Choice
    node: str = ""
    weight: str = ""
    module: str = ""
    op: str = ""

    def __post_init__(self) -> None:
        if not (self.node or self.weight or self.module or self.op):
            raise OnnxqError(
                f"the rule '{self.action}' has no pattern, and would match everything",
                "give it node=, weight=, module= or op= with a name or a glob such as *",
            )

    def as_dict(self) -> dict[str, str]:
        """The action and the patterns given."""
        return {name: text for name, text in asdict(self).items() if text}

    def __str__(self) -> str:
        patterns = [f"{k}={v}" for k, v in self.as_dict().items() if k != "action"]
        return " ".join((self.action, *patterns))


@dataclass(frozen=True)
class Recipe:
    """What a run does.

    Attributes:
        name: preset's name, or the file's.
        description: a sentence for people.
        weights: format of the weights.
        weight_granularity: `channel` (one scale an output channel) or `tensor`.
        activations: format of the activations.
        mode: `static` (calibrated scales) or `dynamic` (computed in the graph, no data).
        calibrator: `max`, `percentile:99.99`, `entropy` or `mse`.
        attention: quantize the two products and the probabilities of each attention.
        lm_head, first, last: what happens to the vocabulary projection, to the first convolution
            and to the layer that makes an output.
        ops: operators that are candidates.
        rules: overrides by name.
    """

    name: str
    description: str = ""
    weights: str = "fp8"
    weight_granularity: Literal["channel", "tensor"] = "channel"
    activations: str = "fp8"
    mode: Mode = "static"
    calibrator: str = "max"
    attention: bool = False
    lm_head: Choice = "leave"
    first: Choice = "quantize"
    last: Choice = "quantize"
    ops: tuple[str, ...] = _OPS
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        _check_values(self)

    @property
    def needs_data(self) -> bool:
        """Whether a calibration is needed."""
        return self.mode == "static"

    def as_dict(self) -> dict[str, Any]:
        """Plain data as YAML and JSON have it; `from_dict` reads it back."""
        content = _shallow(self)
        return {**content, "ops": list(self.ops), "rules": [r.as_dict() for r in self.rules]}

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
    _check_types(f"recipe {source}", values)
    values["rules"] = tuple(_rule(r, f"recipe {source}") for r in values.get("rules", ()))
    values["ops"] = tuple(values.get("ops", _OPS))
    return Recipe(**values)


def _check_types(where: str, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        kind = {"attention": bool, "ops": list, "rules": list}.get(name, str)
        if not isinstance(value, (list, tuple) if kind is list else kind):
            word = {bool: "true or false", list: "a list", str: "text"}[kind]
            raise OnnxqError(f"{where}: {name} is {value!r}", f"{name} takes {word}")


def _check_values(recipe: Recipe) -> None:
    where = f"recipe {recipe.name}"
    if not re.fullmatch(r"[\w.+-]+", recipe.name):
        raise OnnxqError(
            f"{where}: its name cannot be part of a file's name",
            "use letters, digits and . _ + -",
        )
    for name in (recipe.weights, recipe.activations):
        quant_format(name)
    _check_choice(where, "mode", recipe.mode, ("static", "dynamic"))
    _check_choice(where, "weight_granularity", recipe.weight_granularity, ("channel", "tensor"))
    for name in ("lm_head", "first", "last"):
        _check_choice(where, name, getattr(recipe, name), _CHOICES)
    for op in recipe.ops:
        _check_choice(where, "ops", op, _OPS)
    check_calibrator(recipe.calibrator)
    if recipe.weights != recipe.activations:
        raise OnnxqError(
            f"{where}: weights {recipe.weights} with activations {recipe.activations}",
            "both operands of a matrix product must have one format",
        )
    if recipe.attention and (recipe.activations != "fp8" or recipe.mode != "static"):
        raise OnnxqError(
            f"{where}: attention in {recipe.activations} {recipe.mode}",
            "TensorRT fuses quantized attention in static fp8 only",
        )


def check_calibrator(text: str) -> tuple[str, float | None]:
    """Split `percentile:99.99` into its name and number; the others have none.

    Raises:
        OnnxqError: no such calibrator, or a number it does not take.
    """
    name, colon, number = text.partition(":")
    if name == "percentile":
        try:
            value = float(number) if colon else 99.99
        except ValueError:
            value = 0.0
        if 0 < value <= 100:
            return name, value
    elif name in _CALIBRATORS and not colon:
        return name, None
    raise OnnxqError(f"unknown calibrator {text!r}", "choose max, percentile:99.99, entropy or mse")


def _rule(content: Any, where: str) -> Rule:
    if isinstance(content, str):
        return parse_rule(content)
    allowed = [f.name for f in fields(Rule)]
    if not isinstance(content, Mapping) or not set(content) <= set(allowed):
        raise OnnxqError(
            f"{where}: a rule cannot be read: {content!r}",
            f"a rule has an action and patterns: {', '.join(allowed[1:])}",
        )
    _check_choice(where, "action", content.get("action"), _CHOICES)
    if not all(isinstance(v, str) for v in content.values()):
        raise OnnxqError(f"{where}: a rule's patterns are text: {content!r}", "quote them")
    return Rule(**content)


def parse_rule(text: str) -> Rule:
    """Read `leave module=model.layers.0.*` or `quantize op=Gemm node=/fc1`."""
    action, _, rest = text.strip().partition(" ")
    content = {"action": action}
    for pattern in re.split(r"\s+(?=\w+=)", rest.strip()):
        key, _, value = pattern.partition("=")
        if key in content:
            raise OnnxqError(f"the rule {text!r} has two patterns for {key}", "write two rules")
        content[key] = value
    return _rule(content, f"the rule {text!r}")


def _check_choice(where: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OnnxqError(f"{where}: {name} is {value!r}", f"choose one of: {', '.join(allowed)}")


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
