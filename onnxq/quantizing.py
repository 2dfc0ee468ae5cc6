"""`quantize`, the spine: load -> place -> calibrate -> convert -> emit -> save.

Functions import what they need when they are called, so that `import onnxq` stays light.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnxq import record
from onnxq.base import Precision, convert_base, refuse_little_memory
from onnxq.choosing import choose_recipe, destination_of, placed, recalled
from onnxq.errors import OnnxqError
from onnxq.gpus import DEFAULT_TARGET
from onnxq.measuring import Measured, calibrate, measured_again, refuse_missing_data, say_steps
from onnxq.progress import Progress, silent
from onnxq.recipe import Recipe
from onnxq.report import Report
from onnxq.results import Quantized
from onnxq.samples import Data

if TYPE_CHECKING:
    from onnxq.calibrate.data import Samples
    from onnxq.calibrate.ranges import Ranges
    from onnxq.calibrate.session import Device
    from onnxq.calibrate.table import CalibrationTable
    from onnxq.graph.model import Model
    from onnxq.placement import Placement
    from onnxq.unfinished import Unfinished

PathLike = str | Path


def quantize(
    model: PathLike,
    output: PathLike | None = None,
    *,
    recipe: str | Recipe | None = None,
    target: str = DEFAULT_TARGET,
    calib: PathLike | Data | None = None,
    precision: Precision = "fp16",
    io: Literal["keep", "fp16"] = "keep",
    rules: Sequence[str] = (),
    changes: Sequence[str] = (),
    calibrator: str | None = None,
    memory: int | None = None,
    device: Device = "auto",
    save_calib: PathLike | None = None,
    load_calib: Sequence[PathLike] = (),
    requantize: bool = False,
    resume: bool = False,
    recipe_from: PathLike | None = None,
    announce: Callable[[str], None] = lambda line: None,
    progress: Progress = silent,
) -> Quantized:
    """Write a quantized copy of an ONNX model.

    Args:
        model: the full-precision model; never written to.
        output: default: beside the model, `<name>.<recipe>.onnx`.
        recipe: a preset, a YAML file, or a Recipe. None: fp8 or int8 with `calib`, else the dynamic
            recipe of the target.
        calib: calibration data (a path, or `Data`); dynamic recipes need none.
        precision: what an FP32 model becomes where it is not quantized.
        io: `fp16` makes the floating-point inputs and outputs 16 bits wide too.
        rules: overrides such as `leave node=/fc1` (see `recipe.Rule`).
        changes: other fields of the recipe, such as `block_size=32` (see `recipe.Recipe`).
        calibrator: replaces the recipe's.
        memory: bytes that the process may take while it calibrates: a model that needs more is run
            in segments. None: what the machine has.
        save_calib, load_calib: keep the calibration table; use saved ones instead of data.
        requantize: take out the quantization that the model has; else such a model is refused.
        resume: keep what is finished beside the output until that is written, and go on from
            what a run that was stopped has kept there.
        recipe_from: a model onnxq wrote: its recipe, target and precision, with `rules` and
            `changes` on top. Nothing measured is taken from it: static scales need data again.
        announce: is told the recipe, and why it was chosen, before anything that takes long.

    Raises:
        OnnxqError: anything wrong with the input; nothing has been written then.
    """
    from onnxq.algorithms import STEPS
    from onnxq.graph.model import Model
    from onnxq.inputs import layer_inputs, unsolvable
    from onnxq.solving import Solver
    from onnxq.transform import activation_ranges, apply_placement, settle
    from onnxq.unfinished import Unfinished, unfinished_beside

    started = time.monotonic()
    source, data = Path(model), Data.of(calib)
    if recipe_from is not None:
        recipe, target, precision = recalled(Path(recipe_from), recipe)
    chosen, reason = choose_recipe(
        recipe, target, rules, calibrator, changes, has_ranges=data.given or bool(load_calib)
    )
    if recipe_from is not None:
        reason = f"as {Path(recipe_from).name} was made"
    destination = destination_of(source, output, chosen.name)
    refuse_missing_data(chosen, data, load_calib, recipe_from)
    report = Report(f"recipe {chosen.name} for {target}: {reason}")
    announce(report.title)

    graph, placement = placed(source, chosen, target, report, precision, requantize)
    report.facts.update(
        **_facts_before(graph), target=target, recipe=chosen.as_dict(), calibration=None
    )
    if not placement.quantized and not requantize:
        report.notes[-1] += ": the model is copied as it is"
        report.edits.clear()
        return _saved(Model.load(source), destination, placement, report, started, progress)
    samples = data.open(graph.inputs(), progress) if data.given else None
    if samples is not None:
        refuse_little_memory(graph, precision, samples, memory)
    kept = (
        unfinished_beside(
            destination, _run(source, graph, chosen, target, precision, io, samples, load_calib)
        )
        if resume and chosen.steps
        else nullcontext(Unfinished())
    )
    with kept as unfinished:
        measured = Measured(destination, memory, device, progress, report)
        unsolved = unsolvable(placement, memory)
        table = calibrate(graph, placement, samples, load_calib, measured, unfinished, unsolved)
        if table is not None:
            report.notes += table.notes
            if save_calib is not None:
                table.save(Path(save_calib))
        digest = table.digest if table is not None else None
        if table is not None and any(STEPS[name][0] == "rescale" for name in chosen.steps):
            placement, table = _rescaled(graph, placement, table, samples, measured, unfinished)
        if table is not None:
            say_steps(placement, table, report)
        ranges = activation_ranges(placement, table) if table is not None else None
        if chosen.keeps:
            placement, chosen = _kept(graph, placement, ranges, samples, measured)
        with layer_inputs(graph, placement, table, samples, device, unsolved) as inputs:
            report.edits += convert_base(
                graph,
                precision,
                convert_io=io == "fp16",
                samples=samples,
                calibrated=table.peaks() if table else None,
                beside=destination,
                memory=memory,
                device=device,
                progress=progress,
            )
            placement = settle(placement, ranges)
            sites = [decision.site for decision in placement.quantized]
            solver = None
            if inputs is not None:
                solver = Solver(chosen.steps, inputs, sites, unfinished, chosen.pattern, unsolved)
            report.edits += apply_placement(graph, placement, ranges, progress, solver)
        if solver is not None:
            report.edits += solver.edits()
            report.facts["rounding"] = solver.facts()
        if unfinished.found:
            report.notes.append(f"{unfinished.found} parts were finished by a run that was stopped")
        record.stamp(graph, chosen, target, precision, digest, report.edits)
        report.facts.update(calibration=digest)
        return _saved(graph, destination, placement, report, started, progress)


def _run(
    source: Path,
    graph: Model,
    recipe: Recipe,
    target: str,
    precision: str,
    io: str,
    samples: Samples | None,
    tables: Sequence[PathLike],
) -> dict[str, Any]:
    """All that the results of a run depend on; the model to the last byte of its weights."""
    from onnxq import __version__
    from onnxq.files import sha256

    files = {source, *(values.extent.path for values in graph.stored_outside())}
    return {
        "version": __version__,
        "model": sorted(sha256(file) for file in files),
        "recipe": json.loads(json.dumps(recipe.as_dict())),
        "target": target,
        "precision": [precision, io],
        "data": [samples.digest if samples else "", *(sha256(Path(t)) for t in tables)],
    }


def _rescaled(
    graph: Model,
    placement: Placement,
    table: CalibrationTable,
    samples: Samples | None,
    measured: Measured,
    unfinished: Unfinished,
) -> tuple[Placement, CalibrationTable]:
    """The placement and the statistics behind the steps that rescale layers."""
    from onnxq.rescaling import rescale, summary

    placement, table, edits = rescale(
        graph,
        placement,
        table,
        measured.progress,
        samples,
        measured.device,
        beside=measured.destination,
        memory=measured.memory,
        unfinished=unfinished,
    )
    measured.report.edits += edits
    measured.report.facts["rescaling"] = summary(edits)
    if placement.recipe.needs_ranges:
        table = measured_again(graph, placement, table, samples, measured)
    return placement, table


def _kept(
    graph: Model,
    placement: Placement,
    ranges: Ranges | None,
    samples: Samples | None,
    measured: Measured,
) -> tuple[Placement, Recipe]:
    """The placement without the layers that cost too much, and the recipe that names them."""
    from onnxq.keeping import keep

    if samples is None:
        raise OnnxqError(
            "which layers cost the outputs most is measured on data: a calibration table is not "
            "enough",
            "give the data too, with --calib or --text",
        )
    placement, edits, facts = keep(
        graph, placement, ranges, samples, measured.device, measured.progress
    )
    measured.report.edits += edits
    measured.report.facts["kept"] = facts
    return placement, placement.recipe.keeping(tuple(edit.target for edit in edits))


def _saved(
    graph: Model,
    destination: Path,
    placement: Placement,
    report: Report,
    started: float,
    progress: Progress,
) -> Quantized:
    """Write the model, and the figures of the run into the report."""
    from onnxq.graph.save import save
    from onnxq.linting.verb import check_written

    written = save(graph, destination, progress=progress)
    if placement.target.tensorrt:
        check_written(report, graph, placement.target)
    report.facts.update(
        output=written[0],
        files=written,
        sites=site_counts(placement),
        bytes_after=sum(p.stat().st_size for p in written if p.exists()),  # another run may write
        seconds=round(time.monotonic() - started, 2),
    )
    return Quantized(report, True, tuple(written), placement)


def _facts_before(graph: Model) -> dict[str, Any]:
    outside = sum(values.nbytes for values in graph.stored_outside())
    return {
        "model": graph.path,
        "nodes": len(graph.graph.nodes),
        "bytes_before": graph.path.stat().st_size + outside,
        "fingerprint": graph.fingerprint,
    }


def site_counts(placement: Placement) -> dict[str, Any]:
    """Per kind: how many sites, how many quantized; and the reasons for what is left."""
    counts: dict[str, Any] = {}
    for decision in placement.decisions:
        entry = counts.setdefault(decision.site.kind, {"sites": 0, "quantized": 0})
        entry["sites"] += 1
        entry["quantized"] += decision.quantized
    left: dict[str, int] = {}
    for decision in placement.left:
        left[decision.reason] = left.get(decision.reason, 0) + 1
    return {**counts, "left": left}
