"""The verbs: quantize, inspect, build, compare, evaluate_diffusion, lint, prune, recommend.

Every function imports what it needs when it is called, so that `import onnxq` stays light.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxq import record
from onnxq.base import write_fp16
from onnxq.choosing import choose_recipe, placed
from onnxq.errors import OnnxqError
from onnxq.evaluate.verb import evaluate_diffusion as evaluate_diffusion
from onnxq.gpus import DEFAULT_TARGET
from onnxq.linting.verb import lint as lint
from onnxq.progress import Progress, silent
from onnxq.quantizing import quantize as quantize
from onnxq.quantizing import site_counts
from onnxq.recipe import Recipe
from onnxq.recommending import recommend as recommend
from onnxq.report import Report
from onnxq.results import Built, Compared, Inspected, Linted, Quantized, Result
from onnxq.samples import Data
from onnxq.zeros import DEFAULT_PATTERN as DEFAULT_PATTERN
from onnxq.zeros import check_zeros as check_zeros
from onnxq.zeros import prune as prune

if TYPE_CHECKING:
    from onnxq.calibrate.session import Device
    from onnxq.engine.build import BuildResult
    from onnxq.graph.model import Model

PathLike = str | Path


def inspect(
    model: PathLike,
    *,
    recipe: str | Recipe | None = None,
    target: str = DEFAULT_TARGET,
    rules: Sequence[str] = (),
    changes: Sequence[str] = (),
) -> Inspected:
    """What a recipe would do with each site and why; of a model onnxq wrote, what was done."""
    from onnxq.graph.model import Model

    source = Path(model)
    if recipe is None:
        made = record.read(Model.load(source))
        if made is not None:
            return Inspected(Report(f"written by onnxq {made.get('version', '?')}", made))
    chosen, reason = choose_recipe(recipe, target, rules, changes=changes)
    report = Report(f"recipe {chosen.name} for {target}: {reason}")
    _, placement = placed(source, chosen, target, report)
    report.facts.update(
        model=source,
        target=target,
        recipe=chosen.as_dict(),
        sites=site_counts(placement),
        decisions=[
            {
                "node": d.site.name,
                "kind": d.site.kind,
                "weight": d.site.weight_name,
                "module": d.site.module,
                "quantized": d.quantized,
                "reason": d.reason,
            }
            for d in placement.decisions
        ],
    )
    return Inspected(report, True, placement)


def build(
    model: PathLike,
    output: PathLike | None = None,
    *,
    target: str = DEFAULT_TARGET,
    shapes: Sequence[str] | Sequence[Sequence[str]] = (),
    data: PathLike | Data | None = None,
    backend: str | None = None,
    strict: bool = False,
    sparse: bool | None = None,
    cards: Sequence[str] = (),
    beside: PathLike | None = None,
    progress: Progress = silent,
) -> Built:
    """Compile a model into a TensorRT engine, and read what became of each product.

    Args:
        output: default: beside the model, `<name>.plan`. A sidecar `<output>.json` goes with it.
        target: compute capability, or several joined by commas (not for the backend `tensorrt`).
        shapes: `NAME:MIN[,OPT,MAX]`, once per dynamic input; a list of such lists, or names given
            again, are several profiles.
        data: samples whose smallest, middle and largest shapes make the profile.
        strict: `passed` is False unless every quantized product runs in its format.
        sparse: whether kernels may skip zeros; None: where the model's record says 2:4.
        cards: GPUs to predict a run on (see `predicting`); none: those of the target, where the
            shapes are fixed.
        beside: the original, to predict beside it.
    """
    from onnxq.engine.build import build as compile_engine
    from onnxq.engine.expected import expected_products
    from onnxq.graph.model import Model
    from onnxq.graph.prepare import infer_types
    from onnxq.predicting import find_cards, predict

    source, given = Path(model), Data.of(data)
    found = find_cards(cards, target)
    original = Path(beside) if beside is not None else None
    if original is not None and not original.is_file():
        raise OnnxqError(f"no such file: {original}", "name the model's .onnx file")
    graph = Model.load(source)
    infer_types(graph)
    if sparse is None:
        sparse = record.sparsity(graph) == "2:4"
    built = compile_engine(
        source,
        Path(output) if output else source.with_suffix(".plan"),
        target=target,
        shapes=_profiles(shapes, given, graph, progress),
        nodes=expected_products(graph),
        backend=backend,
        sparse=sparse,
        progress=progress,
    )
    report = Report(f"{source.name} compiled for {target}", notes=list(built.warnings))
    report.facts.update(_facts(built))
    if not built.targets and not cards:  # the GPU at hand, whichever it is
        found = []
    predicted = predict(built, found, beside=original, again=bool(cards), progress=progress)
    report.facts["predicted"] = predicted.as_dict() if predicted else None
    passed = built.coverage.complete or not strict
    return Built(report, passed, built, built.coverage, predicted)


def _profiles(
    shapes: Sequence[str] | Sequence[Sequence[str]], data: Data, graph: Model, progress: Progress
) -> Sequence[Any]:
    """The optimization profiles, from shapes or from the data."""
    from onnxq.engine.shapes import profile_from_ranges, split_profiles

    profiles = split_profiles(shapes)
    if not data.given:
        return profiles
    if profiles:
        raise OnnxqError("shapes and data both given", "give one of them")
    return [profile_from_ranges(data.open(graph.inputs(), progress).shapes())]


def _facts(built: BuildResult) -> dict[str, Any]:
    """What the report says of an engine."""
    return {
        "engine": built.engine,
        "engine_bytes": built.engine_bytes,
        "versions": built.versions,
        "targets": built.targets,
        "seconds": round(built.parse_seconds + built.compile_seconds, 1),
        "layers": len(built.layers),
        "products": built.coverage.counts(),
        "weight_bytes": dict(built.coverage.weight_bytes),
        "coverage": built.coverage.to_json(),
        "commands": built.commands(),
        "sparse": built.sparse,
        "sparsity": list(built.sparsity),
    }


def compare(
    model: PathLike,
    candidate: PathLike,
    *,
    data: PathLike | Data | None = None,
    min_snr: float | None = None,
    min_cosine: float | None = None,
    max_abs_error: float | None = None,
    fp16: bool = True,
    per_layer: bool = False,
    save_outputs: PathLike | None = None,
    device: Device = "auto",
    progress: Progress = silent,
) -> Compared:
    """Run the original, its FP16 conversion and the candidate over the same data, side by side.

    Args:
        candidate: an ONNX model, or an engine where a GPU is.
        data: samples the calibration never saw.
        min_snr, min_cosine, max_abs_error: tolerances of the candidate; none: it only reports.
        fp16: also measure the plain FP16 conversion, the price of 16 bits alone.
        per_layer: where the error enters, tensor by tensor, on the first sample.
    """
    from onnxq.evaluate.compare import compare as compare_models
    from onnxq.evaluate.runners import runnable
    from onnxq.evaluate.watching import layer_errors
    from onnxq.files import scratch
    from onnxq.graph.model import Model
    from onnxq.graph.reading import read_proto

    reference, other, given = Path(model), Path(candidate), Data.of(data)
    if not given.given:
        raise OnnxqError(
            "compare needs data",
            "give --data heldout.npz, --text with --tokenizer, or --random-data",
        )
    if per_layer and other.suffix != ".onnx":
        raise OnnxqError(
            f"{other} is no ONNX model: its inner tensors cannot be compared",
            "leave out --per-layer, or give the model that the engine was built from",
        )
    graph = Model.load(reference)
    if other.suffix == ".onnx":
        read_proto(other)  # checked before ONNX Runtime gets it, and said as clearly
    samples = given.open(graph.inputs(), progress)
    with scratch() as folder:
        models = {"original": reference}
        half = write_fp16(reference, folder, samples=samples, device=device) if fp16 else None
        if half is not None:
            models["fp16"] = half
        models["candidate"] = other
        comparison = compare_models(
            models,
            samples,
            min_snr=min_snr,
            min_cosine=min_cosine,
            max_abs_error=max_abs_error,
            device=device,
            save_outputs=Path(save_outputs) if save_outputs else None,
            progress=progress,
        )
    if per_layer:
        with runnable(other) as (usable, _):
            inner = Model.load(usable)
            errors = layer_errors(graph, inner, samples, device=device, progress=progress)
        comparison = dataclasses.replace(comparison, layers={"candidate": errors})
    passed = all(row.passed for row in comparison.rows if row.candidate == "candidate")
    facts = {"model": reference, "candidate": other, "comparison": comparison.as_dict()}
    return Compared(Report(f"{other.name} against {reference.name}", facts), passed, comparison)


__all__ = [
    "Built",
    "Compared",
    "Data",
    "Inspected",
    "Linted",
    "Quantized",
    "Result",
    "build",
    "compare",
    "evaluate_diffusion",
    "inspect",
    "lint",
    "quantize",
]
