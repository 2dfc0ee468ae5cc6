"""`quantize`, the spine: load -> place -> calibrate -> convert -> emit -> save.

Functions import what they need when they need it: `import onnxq` stays light, and so does a run
that has no use for ONNX Runtime (25 MB).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from onnxq import record
from onnxq.algorithms import STEPS
from onnxq.base import Precision, convert_base, refuse_little_memory
from onnxq.choosing import choose_recipe, destination_of, placed, recalled
from onnxq.errors import OnnxqError
from onnxq.gpus import DEFAULT_TARGET
from onnxq.measuring import calibrate, measure_again, refuse_missing_data, say_steps
from onnxq.progress import Progress, silent
from onnxq.recipe import Recipe
from onnxq.report import Report
from onnxq.results import Quantized
from onnxq.samples import Data
from onnxq.unfinished import Unfinished, unfinished_beside
from onnxq.work import Work

if TYPE_CHECKING:
    from onnxq.calibrate.session import Device
    from onnxq.graph.model import Model
    from onnxq.placement import Placement

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
    from onnxq.inputs import unsolvable

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
    unsolved = unsolvable(placement, memory)
    work = Work(graph, placement, unsolved, report, destination, memory, device, progress)
    if not placement.quantized and not requantize:
        return _copied(work, source, started)
    if data.given:
        work.samples = data.open(graph.inputs(), progress)
        refuse_little_memory(graph, precision, work.samples, memory)

    kept: AbstractContextManager[Unfinished] = nullcontext(work.unfinished)
    if resume and chosen.steps:
        run = _run(work, source, target, precision, io, load_calib)
        kept = unfinished_beside(destination, run)
    with kept as work.unfinished:
        calibrate(work, load_calib, save_calib)
        digest = work.table.digest if work.table is not None else None
        _rescale(work)
        _choose_ranges(work)
        recorded = _leave_costly(work)
        _convert_and_emit(work, precision, io)
        record.stamp(graph, recorded, target, precision, digest, report.edits)
        report.facts.update(calibration=digest)
        return _saved(work, started)


def _copied(work: Work, source: Path, started: float) -> Quantized:
    """A model that the recipe does nothing to, written as it was read."""
    from onnxq.graph.model import Model

    work.report.notes[-1] += ": the model is copied as it is"
    work.report.edits.clear()
    work.graph = Model.load(source)
    return _saved(work, started)


def _rescale(work: Work) -> None:
    """Apply the step that rescales layers, if there is one, and measure behind it."""
    recipe = work.placement.recipe
    if work.table is None or all(STEPS[name][0] != "rescale" for name in recipe.steps):
        return
    from onnxq.rescaling import rescale, summary

    work.placement, work.table, edits = rescale(
        work.graph,
        work.placement,
        work.table,
        work.progress,
        work.samples,
        work.device,
        beside=work.destination,
        memory=work.memory,
        unfinished=work.unfinished,
    )
    work.report.edits += edits
    work.report.facts["rescaling"] = summary(edits)
    if recipe.needs_ranges:
        measure_again(work)


def _choose_ranges(work: Work) -> None:
    """Take ranges from what was measured, before the conversion renames tensors."""
    from onnxq.ranging import activation_ranges

    if work.table is not None:
        work.ranges = activation_ranges(work.placement, work.table)
        say_steps(work)


def _leave_costly(work: Work) -> Recipe:
    """Leave the layers that cost the outputs most, where the recipe says how many.

    Returns:
        The recipe to record, which then names them.
    """
    recipe = work.placement.recipe
    if not recipe.keeps:
        return recipe
    from onnxq.keeping import keep

    if work.samples is None:
        raise OnnxqError(
            "which layers cost the outputs most is measured on data: a calibration table is not "
            "enough",
            "give the data too, with --calib or --text",
        )
    work.placement, edits, facts = keep(
        work.graph, work.placement, work.ranges, work.samples, work.device, work.progress
    )
    work.report.edits += edits
    work.report.facts["kept"] = facts
    return recipe.keeping(tuple(edit.target for edit in edits))


def _convert_and_emit(work: Work, precision: Precision, io: str) -> None:
    """Convert the rest of the model to its base precision, round the weights, emit the Q/DQ."""
    from onnxq.inputs import layer_inputs
    from onnxq.ranging import settle
    from onnxq.solving import Solver
    from onnxq.transform import apply_placement

    graph, table, report = work.graph, work.table, work.report
    with layer_inputs(
        graph, work.placement, table, work.samples, work.device, work.unsolved
    ) as inputs:
        report.edits += convert_base(
            graph,
            precision,
            convert_io=io == "fp16",
            samples=work.samples,
            calibrated=table.peaks() if table else None,
            beside=work.destination,
            memory=work.memory,
            device=work.device,
            progress=work.progress,
        )
        placement = work.placement = settle(work.placement, work.ranges)
        sites = [decision.site for decision in placement.quantized]
        steps, pattern = placement.recipe.steps, placement.recipe.pattern
        solver = None
        if inputs is not None:
            solver = Solver(steps, inputs, sites, work.unfinished, pattern, work.unsolved)
        report.edits += apply_placement(graph, placement, work.ranges, work.progress, solver)
    if solver is not None:
        report.edits += solver.edits()
        report.facts["rounding"] = solver.facts()
    if work.unfinished.found:
        found = work.unfinished.found
        report.notes.append(f"{found} parts were finished by a run that was stopped")


def _run(
    work: Work,
    source: Path,
    target: str,
    precision: str,
    io: str,
    tables: Sequence[PathLike],
) -> dict[str, Any]:
    """All that the results of a run depend on; the model to the last byte of its weights."""
    from onnxq import __version__
    from onnxq.files import sha256

    files = {source, *(values.extent.path for values in work.graph.stored_outside())}
    return {
        "version": __version__,
        "model": sorted(sha256(file) for file in files),
        "recipe": json.loads(json.dumps(work.placement.recipe.as_dict())),
        "target": target,
        "precision": [precision, io],
        "data": [work.samples.digest if work.samples else "", *(sha256(Path(t)) for t in tables)],
    }


def _saved(work: Work, started: float) -> Quantized:
    """Write the model, and the figures of the run into the report."""
    from onnxq.graph.save import save
    from onnxq.linting.verb import check_written

    graph, placement, report = work.graph, work.placement, work.report
    written = save(graph, work.destination, progress=work.progress)
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
