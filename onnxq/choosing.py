"""What `quantize` settles before anything takes long: the recipe, the output, which layers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from onnxq import record
from onnxq.base import Precision
from onnxq.errors import OnnxqError
from onnxq.files import refuse_unwritable
from onnxq.gpus import target as find_target
from onnxq.recipe import Recipe, check_calibrator, default_for, parse_rule, presets
from onnxq.recipe import load as load_recipe
from onnxq.report import Report
from onnxq.rules import check_choice

if TYPE_CHECKING:
    from onnxq.graph.model import Model
    from onnxq.placement import Placement

PathLike = str | Path


def choose_recipe(
    recipe: str | Recipe | None,
    target: str,
    rules: Sequence[str] = (),
    calibrator: str | None = None,
    changes: Sequence[str] = (),
    *,
    has_ranges: bool = False,
) -> tuple[Recipe, str]:
    """The recipe to run, and why.

    Args:
        has_ranges: whether there is data or a calibration table.
    """
    gpu = find_target(target)
    if recipe is not None:
        chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        reason = "as asked"
    elif has_ranges:
        name = "fp8" if gpu.runs("fp8") else "int8"
        chosen, reason = load_recipe(name), f"there is data, and {gpu.name} multiplies {name}"
    else:
        chosen, reason = default_for(gpu)
    chosen = chosen.with_changes(changes)
    if calibrator is not None:
        check_calibrator(calibrator)
        if not chosen.needs_ranges:
            raise OnnxqError(
                f"recipe {chosen.name} has no ranges to calibrate", "leave out --calibrator"
            )
        chosen = dataclasses.replace(chosen, calibrator=calibrator, conv_calibrator="")
    return chosen.with_rules(tuple(parse_rule(r) for r in rules)), reason


def recalled(path: Path, recipe: str | Recipe | None) -> tuple[Recipe, str, Precision]:
    """What a model onnxq wrote was made by."""
    if recipe is not None:
        raise OnnxqError("a recipe and a model to take one from", "give one of them")
    found, target, precision = record.recall(path)
    check_choice(str(path), "precision", precision, get_args(Precision))
    return found, target, cast(Precision, precision)


def destination_of(source: Path, output: PathLike | None, recipe: str) -> Path:
    """Where to write, refused before anything is computed where that cannot be."""
    try:
        if not source.is_file():
            what = "not a file" if source.exists() else "no such file"
            raise OnnxqError(f"{what}: {source}", "name the model's .onnx file")
        path = Path(output) if output else source.with_name(f"{source.stem}.{recipe}.onnx")
        if not path.parent.is_dir():
            raise OnnxqError(f"no such folder: {path.parent}", "create it first")
        longest = os.pathconf(path.parent, "PC_NAME_MAX") - len(".01234567.data")
        if len(os.fsencode(path.name)) > longest:
            raise OnnxqError(
                f"the output's name is longer than {longest} bytes, or its data file's would be "
                f"too long: {path}",
                "give a shorter one with -o",
            )
        if path.exists() and path.samefile(source):
            raise OnnxqError(f"the output is the input: {path}", "give another path with -o")
        if path.is_dir():
            raise OnnxqError(f"the output is a folder: {path}", "name the file to write")
    except OSError as error:
        raise OnnxqError(f"{error.strerror}: {error.filename}", "give another path") from error
    refuse_unwritable(path)
    return path


def placed(
    source: Path,
    recipe: Recipe,
    target: str,
    report: Report,
    precision: Precision = "keep",
    requantize: bool = False,
) -> tuple[Model, Placement]:
    """Load, prepare and place; what that changed or found goes into the report."""
    from onnxq.footprint import diffuses
    from onnxq.graph.model import Model
    from onnxq.graph.precision import BASES
    from onnxq.graph.prepare import prepare
    from onnxq.placement import place

    opset = recipe.min_opset
    if precision != "keep":
        opset = max(opset, BASES[precision].min_opset)
    model, edits = prepare(Model.load(source), opset)
    report.edits += edits
    if requantize:
        _strip(model, report)
    placement = place(model, recipe, find_target(target))
    report.notes += placement.notes
    apt = f"sdxl-{recipe.activations}"
    better = recipe.mode == "static" and not recipe.level and apt in presets()
    if better and diffuses(model, (decision.site.kind for decision in placement.decisions)):
        report.notes.append(f"a diffusion UNet: --recipe {apt} changes its samples less")
    if not placement.quantized:
        report.notes.append(f"there is no node to {'quantize' if recipe.quantizes else 'prune'}")
    return model, placement


def _strip(model: Model, report: Report) -> None:
    """Take out the quantization a model has, and say what that was."""
    from onnxq.graph.strip import strip_quantization

    edits = strip_quantization(model)
    record.erase(model)
    report.edits += edits
    counts = {verb: sum(e.verb == verb for e in edits) for verb in _STRIPPED}
    said = [what.format(n) for verb, what in _STRIPPED.items() if (n := counts[verb])]
    report.notes.append(f"stripped first: {'; '.join(said) or 'nothing, it is not quantized'}")


_STRIPPED = {
    "dequantize": "{} weights are the floats their codes stood for, with their rounding",
    "remove Q/DQ": "the Q/DQ of {} activations",
    "remove scales": "the scales computed for {} layers",
}
