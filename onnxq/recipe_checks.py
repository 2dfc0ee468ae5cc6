"""What a recipe may say: each field alone, and those that go together."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onnxq.algorithms import KINDS, STEPS
from onnxq.errors import OnnxqError
from onnxq.rules import CHOICES, check_choice
from onnxq.sparsity import Pattern

if TYPE_CHECKING:
    from onnxq.recipe import Recipe

OPS = ("MatMul", "Gemm", "Conv")
"""Operators that can be quantized."""

_CALIBRATORS = ("max", "percentile", "entropy", "mse", "output", "steps")
_LEAST_BLOCK = 16
_LEVELS = (1, 2, 2.5, 3, 4)

# What both operands of a product may be: the pairs for which TensorRT has a kernel, and UINT4; and
# neither, for weights that are pruned alone.
_PARTNERS = {
    "int8": ("int8", "none"),
    "fp8": ("fp8", "none"),
    "int4": ("none", "fp8", "int8"),
    "uint4": ("none",),
    "nvfp4": ("nvfp4",),
    "mxfp8": ("mxfp8",),
    "none": ("none",),
}

_WORDS: dict[type, str] = {
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "text",
}


def check_types(where: str, values: Mapping[str, Any]) -> None:
    """Refuse fields of another type than theirs.

    Raises:
        OnnxqError: the field, its value, and what it takes.
    """
    for name, value in values.items():
        kind = {
            "alpha": float,
            "attention": bool,
            "center": bool,
            "block_size": int,
            "explicit": bool,
            "keep_flops": float,
            "keep_worst": int,
            "level": float,
            "ops": list,
            "rules": list,
            "snr": float,
            "steps": list,
        }.get(name, str)
        if value is None and name in ("alpha", "snr"):
            continue
        allowed = {list: (list, tuple), float: (int, float)}.get(kind, (kind,))
        if (isinstance(value, bool) and kind is not bool) or not isinstance(value, allowed):
            word = _WORDS[kind]
            raise OnnxqError(f"{where}: {name} is {value!r}", f"{name} takes {word}")


def check_values(recipe: Recipe) -> None:
    """Refuse values that no field takes, and fields that do not go together.

    Raises:
        OnnxqError: the first that is wrong, and what would be right.
    """
    where = f"recipe {recipe.name}"
    if not re.fullmatch(r"[\w.+-]+", recipe.name):
        raise OnnxqError(
            f"{where}: its name cannot be part of a file's name",
            "use letters, digits and . _ + -",
        )
    _check_formats(recipe, where)
    check_choice(where, "mode", recipe.mode, ("static", "dynamic"))
    for name in ("weight_granularity", "qkv_granularity"):
        check_choice(where, name, getattr(recipe, name), ("channel", "tensor"))
    for name in ("lm_head", "first", "last"):
        check_choice(where, name, getattr(recipe, name), CHOICES)
    for op in recipe.ops:
        check_choice(where, "ops", op, OPS)
    check_calibrator(recipe.calibrator)
    if recipe.conv_calibrator:
        check_calibrator(recipe.conv_calibrator)
    _check_level(recipe, where)
    _check_steps(recipe, where)
    _check_kept(recipe, where)
    if recipe.attention and (recipe.activations != "fp8" or recipe.mode != "static"):
        raise OnnxqError(
            f"{where}: attention in {recipe.activations} {recipe.mode}",
            "onnxq quantizes attention in static fp8 only",
        )
    form = (recipe.weights, recipe.activations, recipe.mode)
    if recipe.center and form != ("int8", "int8", "static"):
        raise OnnxqError(
            f"{where}: center with {' '.join(form)}",
            "only ranges of static int8 have another middle than 0: leave center out",
        )


def _check_steps(recipe: Recipe, where: str) -> None:
    for name in recipe.steps:
        check_choice(where, "steps", name, tuple(STEPS))
    kinds, order = [STEPS[name][0] for name in recipe.steps], list(KINDS)
    for i in range(1, len(kinds)):
        if order.index(kinds[i - 1]) >= order.index(kinds[i]):
            pair = f"{recipe.steps[i]} after {recipe.steps[i - 1]}"
            why = "both do the same" if kinds[i - 1] == kinds[i] else KINDS[kinds[i]]
            raise OnnxqError(
                f"{where}: the steps {', '.join(recipe.steps)} make no sense in this order: "
                f"{pair}: {why}",
                f"write steps: [{', '.join(_in_order(recipe.steps))}]",
            )
    _check_zeros(recipe, where, dict(zip(kinds, recipe.steps, strict=True)))
    if "smoothquant" in recipe.steps:
        _check_smoothing(recipe, where)


def _in_order(steps: Sequence[str]) -> list[str]:
    """The steps as they make sense; of those that do the same, the first."""
    found: dict[str, str] = {}
    for name in steps:
        found.setdefault(STEPS[name][0], name)
    return [found[kind] for kind in KINDS if kind in found]


def _check_zeros(recipe: Recipe, where: str, by_kind: Mapping[str, str]) -> None:
    """The pattern, the step that puts it in, and those that need it go together."""
    if recipe.sparsity:
        Pattern.parse(recipe.sparsity)
    ways = ", ".join(name for name, (kind, _) in STEPS.items() if kind == "sparsify")
    wrong = hint = ""
    if recipe.sparsity and "sparsify" not in by_kind:
        wrong, hint = f"sparsity {recipe.sparsity}, and no step that does it", f"add one of: {ways}"
    elif "sparsify" in by_kind and not recipe.sparsity:
        wrong, hint = f"the step {by_kind['sparsify']} without a pattern", "set sparsity, as in 2:4"
    elif "refit" in by_kind and "sparsify" not in by_kind:
        wrong, hint = "refit without a step that puts in zeros", f"add one of: {ways}"
    elif not recipe.quantizes and not recipe.sparsity:
        wrong, hint = "it neither quantizes nor prunes", "set weights, or sparsity"
    elif not recipe.quantizes and (left := by_kind.keys() & {"scale", "round", "refine"}):
        names = ", ".join(by_kind[kind] for kind in KINDS if kind in left)
        wrong = f"{names}, and weights that are not rounded"
        hint = f"leave out {names}, or set weights to a format, such as fp8"
    if wrong:
        raise OnnxqError(f"{where}: {wrong}", hint)


def _check_level(recipe: Recipe, where: str) -> None:
    if recipe.level not in (0, *_LEVELS):
        known = ", ".join(f"{level:g}" for level in _LEVELS)
        raise OnnxqError(f"{where}: there is no level {recipe.level:g}", f"choose one of: {known}")
    if recipe.level and not any(rule.below for rule in recipe.rules):
        raise OnnxqError(
            f"{where}: it has no levels", "they are for sdxl-fp8 and sdxl-int8: leave level out"
        )


def _check_smoothing(recipe: Recipe, where: str) -> None:
    if recipe.activation_format is None or recipe.activation_format.block:
        raise OnnxqError(
            f"{where}: smoothquant with activations {recipe.activations}",
            "it is for activations of one scale for all channels: int8 or fp8",
        )
    if recipe.alpha is not None and not 0 <= recipe.alpha <= 1:
        raise OnnxqError(f"{where}: alpha is {recipe.alpha}", "give a number from 0 to 1, or null")


def _check_kept(recipe: Recipe, where: str) -> None:
    if recipe.keep_worst < 0 or not 0 <= recipe.keep_flops <= 1:
        raise OnnxqError(
            f"{where}: keep_worst {recipe.keep_worst}, keep_flops {recipe.keep_flops}",
            "give a count of layers, and a share from 0 to 1",
        )
    if recipe.keeps and (recipe.activation_format is None or recipe.weight_format.bits < 8):
        raise OnnxqError(
            f"{where}: layers to be left by the error they cause, with weights {recipe.weights} "
            f"and activations {recipe.activations}",
            "the error is that of activations in 8 bits: take an int8 or fp8 recipe",
        )


def _check_formats(recipe: Recipe, where: str) -> None:
    if not recipe.quantizes:
        if recipe.activations != "none" or recipe.block_size or recipe.attention:
            raise OnnxqError(
                f"{where}: weights that stay in their type, with quantized activations or blocks",
                "set activations=none, block_size=0 and attention=false",
            )
        return
    weights = recipe.weight_format
    if recipe.activations not in _PARTNERS[weights.name]:
        raise OnnxqError(
            f"{where}: weights {recipe.weights} with activations {recipe.activations}",
            f"{recipe.weights} weights go with: {', '.join(_PARTNERS[weights.name])}",
        )
    size, both = recipe.block_size, weights.bits == 4 and not weights.block
    if both and (size < _LEAST_BLOCK or size & (size - 1)):
        raise OnnxqError(
            f"{where}: block_size {size} for {recipe.weights} weights",
            "give a power of two from 16, such as 32, 64 or 128",
        )
    if not both and size not in (0, weights.block):
        raise OnnxqError(
            f"{where}: block_size {size} for {recipe.weights} weights",
            f"{recipe.weights} comes in blocks of {weights.block}"
            if weights.block
            else "8-bit weights have a scale a channel: TensorRT has no fused kernel for blocks",
        )


def check_calibrator(text: str) -> None:
    """Refuse what `calibrate.ranges` would not take, before anything is loaded.

    Raises:
        OnnxqError: no such calibrator, or a number it does not take.
    """
    name, colon, number = text.partition(":")
    known = name in _CALIBRATORS
    if colon:
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        known = (name in ("percentile", "steps") and 0 < value <= 100) or (
            name == "mse" and 1 <= value < math.inf
        )
    if not known:
        raise OnnxqError(
            f"unknown calibrator {text!r}",
            "choose max, percentile:99.99, entropy, mse, mse:2, output, steps or steps:80",
        )
