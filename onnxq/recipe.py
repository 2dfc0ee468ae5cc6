"""Recipes: what to quantize, to which format, how; plain data that reads and writes YAML."""

from __future__ import annotations

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

    def __str__(self) -> str:
        patterns = {k: v for k, v in asdict(self).items() if v and k != "action"}
        return f"{self.action} " + " ".join(f"{k}={v}" for k, v in patterns.items())


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
    ops: tuple[str, ...] = ("MatMul", "Gemm", "Conv")
    rules: tuple[Rule, ...] = ()

    @property
    def needs_data(self) -> bool:
        """Whether a calibration is needed."""
        return self.mode == "static"

    def as_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` reads it back."""
        return asdict(self)

    def with_rules(self, rules: tuple[Rule, ...]) -> Recipe:
        """The same with more rules behind its own."""
        return Recipe(**{**_shallow(self), "rules": (*self.rules, *rules)})


def from_dict(content: Mapping[str, Any], source: str) -> Recipe:
    """Read a recipe from plain data.

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
            f"fields are: {', '.join(sorted(known))}",
        )
    values = {"name": Path(source).stem, **content}
    values["rules"] = tuple(_rule(r, source) for r in values.get("rules") or ())
    values["ops"] = tuple(values.get("ops") or Recipe.ops)
    recipe = Recipe(**values)
    for name in (recipe.weights, recipe.activations):
        quant_format(name)
    _check_choice(source, "mode", recipe.mode, ("static", "dynamic"))
    _check_choice(source, "weight_granularity", recipe.weight_granularity, ("channel", "tensor"))
    for name in ("lm_head", "first", "last"):
        _check_choice(source, name, getattr(recipe, name), ("quantize", "leave"))
    check_calibrator(recipe.calibrator)
    if recipe.weights != recipe.activations:
        raise OnnxqError(
            f"recipe {source}: weights {recipe.weights} with activations {recipe.activations}",
            "both operands of a matrix product must have one format",
        )
    if recipe.attention and (recipe.activations != "fp8" or recipe.mode != "static"):
        raise OnnxqError(
            f"recipe {source}: attention in {recipe.activations} {recipe.mode}",
            "TensorRT fuses quantized attention in static fp8 only",
        )
    return recipe


def check_calibrator(text: str) -> tuple[str, float | None]:
    """Split `percentile:99.99` into its name and number; the others have none."""
    name, _, number = text.partition(":")
    try:
        value = float(number) if number else (99.99 if name == "percentile" else None)
    except ValueError:
        value = -1.0
    if name not in _CALIBRATORS or (value is not None and not 0 < value <= 100):
        raise OnnxqError(
            f"unknown calibrator {text!r}", "choose max, percentile:99.99, entropy or mse"
        )
    return name, value


def _rule(content: Any, source: str) -> Rule:
    if isinstance(content, str):
        return parse_rule(content)
    allowed = {f.name for f in fields(Rule)}
    if not isinstance(content, Mapping) or not set(content) <= allowed or len(content) < 2:
        raise OnnxqError(
            f"recipe {source}: a rule cannot be read: {content!r}",
            f"a rule has an action and at least one of: {', '.join(sorted(allowed - {'action'}))}",
        )
    _check_choice(source, "action", content.get("action"), ("quantize", "leave"))
    return Rule(**content)


def parse_rule(text: str) -> Rule:
    """Read `leave module=model.layers.0.*` or `quantize op=Gemm node=/fc1`."""
    action, *patterns = text.split()
    content: dict[str, str] = {"action": action}
    for pattern in patterns:
        key, _, value = pattern.partition("=")
        content[key] = value
    return _rule(content, f"rule {text!r}")


def _check_choice(source: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise OnnxqError(
            f"recipe {source}: {name} is {value!r}", f"choose one of: {', '.join(allowed)}"
        )


def _shallow(recipe: Recipe) -> dict[str, Any]:
    return {f.name: getattr(recipe, f.name) for f in fields(recipe)}


@cache
def presets() -> dict[str, Recipe]:
    """The recipes that come with onnxq, by name."""
    found = {}
    for entry in sorted(resources.files("onnxq.recipes").iterdir(), key=lambda e: e.name):
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
