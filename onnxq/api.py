"""The spine: load -> place -> calibrate -> convert -> emit -> save; then build and compare.

Every function imports what it needs when it is called, so that `import onnxq` stays light.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnxq
from onnxq.errors import OnnxqError
from onnxq.gpus import DEFAULT_TARGET
from onnxq.gpus import target as find_target
from onnxq.progress import Progress, silent
from onnxq.recipe import Recipe, check_calibrator, default_for, parse_rule
from onnxq.recipe import load as load_recipe
from onnxq.report import Edit, Report

if TYPE_CHECKING:
    from onnxq.calibrate.data import Samples
    from onnxq.calibrate.table import CalibrationTable
    from onnxq.engine.build import BuildResult
    from onnxq.engine.coverage import Coverage
    from onnxq.evaluate.comparison import Comparison
    from onnxq.evaluate.layers import LayerErrors
    from onnxq.graph.model import Model
    from onnxq.placement import Placement

Precision = Literal["fp16", "bf16", "keep"]
Device = Literal["auto", "cpu", "cuda"]
PathLike = str | Path

METADATA = "onnxq"
"""Key of the output's metadata_props that records the run, as JSON."""


@dataclass(frozen=True)
class Data:
    """Where samples come from: one of `path`, `text` with `tokenizer`, or `random`.

    Attributes:
        path: npz, folder of npy or npz, Polygraphy's JSON, or a loader script.
        text: UTF-8 text for a language model; `tokenizer` is its tokenizer.json.
        seq_len: tokens a window of text.
        samples: how many windows of text, or random samples.
        random: seed of random data, None for none.
        batch: rows fed at a time where the model leaves the batch open.
    """

    path: PathLike | None = None
    text: PathLike | None = None
    tokenizer: PathLike | None = None
    seq_len: int | None = None
    samples: int | None = None
    random: int | None = None
    batch: int | None = None

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return self.path is not None or self.text is not None or self.random is not None


@dataclass
class Result:
    """What a verb gives back: a report to read, and whether its checks passed."""

    report: Report
    passed: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return self.report.as_dict()

    def save(self, path: PathLike) -> None:
        """Write the report as JSON."""
        self.report.save(path)


@dataclass
class Quantized(Result):
    """Result of `quantize`: the files written and the placement behind them."""

    files: tuple[Path, ...] = ()
    placement: Placement | None = field(default=None, repr=False)


@dataclass
class Built(Result):
    """Result of `build`: the engine's description, and what each product became."""

    engine: BuildResult | None = None
    coverage: Coverage | None = None


@dataclass
class Compared(Result):
    """Result of `compare`."""

    comparison: Comparison | None = None
    layers: LayerErrors | None = None


def choose_recipe(
    recipe: str | Recipe | None,
    target: str,
    rules: Sequence[str] = (),
    calibrator: str | None = None,
    data_given: bool = False,
) -> tuple[Recipe, str]:
    """The recipe to run and why: the one named, else the target's default without data."""
    gpu = find_target(target)
    if recipe is None:
        if data_given:
            name = "fp8" if gpu.runs("fp8") else "int8"
            chosen, reason = (
                load_recipe(name),
                f"the data calibrates it, and {gpu.name} multiplies {name.upper()}",
            )
        else:
            chosen, reason = default_for(gpu)
    else:
        chosen = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        reason = "as asked"
    if calibrator is not None:
        check_calibrator(calibrator)
        chosen = replace(chosen, calibrator=calibrator)
    return chosen.with_rules(tuple(parse_rule(r) for r in rules)), reason


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
    calibrator: str | None = None,
    memory: int | None = None,
    device: Device = "auto",
    save_calib: PathLike | None = None,
    load_calib: Sequence[PathLike] = (),
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
        io: `fp16` makes the floating-point inputs and outputs FP16 too.
        rules: overrides such as `leave node=/fc1` (see `recipe.Rule`).
        calibrator: replaces the recipe's.
        memory: bytes of watched activations held at a time.
        save_calib, load_calib: keep the calibration table; use saved ones instead of data.

    Raises:
        OnnxqError: anything wrong with the input; nothing has been written then.
    """
    from onnxq.formats import quant_format
    from onnxq.graph.model import Model
    from onnxq.graph.prepare import prepare
    from onnxq.graph.save import save
    from onnxq.placement import place
    from onnxq.transform import activation_ranges, apply_placement

    started = time.monotonic()
    source = Path(model)
    data = calib if isinstance(calib, Data) else Data(path=calib)
    chosen, reason = choose_recipe(
        recipe, target, rules, calibrator, data.given or bool(load_calib)
    )
    destination = _destination(source, output, chosen.name)
    _refuse_missing_data(chosen, data, load_calib)
    report = Report(f"recipe {chosen.name}: {reason}")

    graph = Model.load(source)
    original_nodes, bytes_before = len(graph.graph.nodes), _size(source, graph)
    graph, edits = prepare(graph, quant_format(chosen.weights).min_opset)
    report.extend(edits)
    placement = place(graph, chosen, find_target(target))
    if not placement.quantized:
        report.notes.append("no node to quantize: only the base precision was applied")
    samples = _open(graph, data, progress) if data.given else None
    table = _calibration(graph, placement, samples, load_calib, memory, device, progress)
    if table is not None and save_calib is not None:
        table.save(Path(save_calib))
    ranges = activation_ranges(placement, table) if table is not None else None
    report.extend(
        _convert(graph, placement, precision, io, table, samples, memory, device, progress)
    )
    report.extend(apply_placement(graph, placement, ranges, progress))
    _stamp(graph, chosen, target, precision, table)
    written = save(graph, destination, progress=progress)

    sizes = sum(p.stat().st_size for p in written)
    report.notes += _notes(table)
    report.facts.update(
        model=source,
        output=written[0],
        files=written,
        target=target,
        recipe=chosen.as_dict(),
        nodes=original_nodes,
        sites=_site_counts(placement),
        bytes_before=bytes_before,
        bytes_after=sizes,
        fingerprint=graph.fingerprint,
        calibration=table.digest if table else None,
        seconds=round(time.monotonic() - started, 2),
    )
    return Quantized(report, True, tuple(written), placement)


def inspect(
    model: PathLike,
    *,
    recipe: str | Recipe | None = None,
    target: str = DEFAULT_TARGET,
    rules: Sequence[str] = (),
) -> Quantized:
    """What the recipe would do with each site and why; or, of a model onnxq wrote, what was done."""
    from onnxq.formats import quant_format
    from onnxq.graph.model import Model
    from onnxq.graph.prepare import prepare
    from onnxq.placement import place

    graph = Model.load(Path(model))
    record = {e.key: e.value for e in graph.header.metadata_props}.get(METADATA)
    if record is not None and recipe is None:
        content = json.loads(record)
        return Quantized(Report(f"written by onnxq {content.get('version', '?')}", dict(content)))
    chosen, reason = choose_recipe(recipe, target, rules)
    graph, edits = prepare(graph, quant_format(chosen.weights).min_opset)
    placement = place(graph, chosen, find_target(target))
    report = Report(f"recipe {chosen.name}: {reason}", edits=edits)
    report.facts.update(
        model=Path(model),
        target=target,
        recipe=chosen.as_dict(),
        sites=_site_counts(placement),
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
    return Quantized(report, True, (), placement)


def build(
    model: PathLike,
    output: PathLike | None = None,
    *,
    target: str = DEFAULT_TARGET,
    shapes: Sequence[str] = (),
    backend: str | None = None,
    strict: bool = False,
    progress: Progress = silent,
) -> Built:
    """Compile a model into a TensorRT engine, and read what became of each product.

    Args:
        output: default: beside the model, `<name>.plan`. The sidecar `<output>.json` is written too.
        target: compute capability, or several joined by commas (not for the backend `tensorrt`).
        shapes: `NAME:MIN[,OPT,MAX]`, once per dynamic input.
        strict: `passed` is False unless every quantized product runs in its format.
    """
    from onnxq.engine.build import build as compile_engine
    from onnxq.engine.coverage import cover
    from onnxq.engine.expected import expected_products
    from onnxq.graph.model import Model
    from onnxq.graph.prepare import infer_types

    source = Path(model)
    graph = Model.load(source)
    infer_types(graph)
    destination = Path(output) if output else source.with_suffix(".plan")
    built = compile_engine(
        source, destination, target=target, shapes=tuple(shapes), backend=backend, progress=progress
    )
    coverage = cover(built.layers, expected_products(graph), built.profiles)
    report = Report(f"{source.name} compiled for {target}")
    report.facts.update(
        engine=destination,
        engine_bytes=built.engine_bytes,
        versions=built.versions,
        targets=built.targets,
        seconds=round(built.parse_seconds + built.compile_seconds, 1),
        layers=len(built.layers),
        products=coverage.counts(),
        weight_bytes=dict(coverage.weight_bytes),
        missed=[
            {"node": m.node.name, "wanted": m.node.wanted, "ran": m.ran, "reason": m.reason}
            for m in coverage.missed
        ],
        warnings=list(built.warnings),
    )
    return Built(report, coverage.complete or not strict, built, coverage)


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
    from onnxq.graph.model import Model

    reference, other = Path(model), Path(candidate)
    given = data if isinstance(data, Data) else Data(path=data)
    if not given.given:
        raise OnnxqError(
            "compare needs data",
            "give --data heldout.npz, --text with --tokenizer, or --random-data",
        )
    graph = Model.load(reference)
    samples = _open(graph, given, progress)
    tolerances = {"min_snr": min_snr, "min_cosine": min_cosine, "max_abs_error": max_abs_error}
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        models: dict[str, Path] = {"original": reference}
        if fp16 and (half := _fp16_conversion(reference, Path(folder), samples, device)):
            models["fp16"] = half
        models["candidate"] = other
        comparison = compare_models(
            models,
            samples,
            **tolerances,
            device=device,
            save_outputs=Path(save_outputs) if save_outputs else None,
            progress=progress,
        )
    layers = _per_layer(reference, other, samples, device, progress) if per_layer else None
    facts: dict[str, Any] = {"model": reference, "candidate": other, **comparison.as_dict()}
    if layers is not None:
        facts["layers"] = layers.as_dict()
    passed = all(row.passed for row in comparison.rows if row.candidate == "candidate")
    report = Report(f"{other.name} against {reference.name}", facts)
    return Compared(report, passed, comparison, layers)


def _destination(source: Path, output: PathLike | None, recipe: str) -> Path:
    path = Path(output) if output else source.with_name(f"{source.stem}.{recipe}.onnx")
    if path.exists() and source.exists() and path.samefile(source):
        raise OnnxqError(f"the output is the input: {path}", "give another path with -o")
    if path.is_dir():
        raise OnnxqError(f"the output is a folder: {path}", "name the file to write")
    if not path.parent.is_dir():
        raise OnnxqError(f"no such folder: {path.parent}", "create it first")
    return path


def _refuse_missing_data(recipe: Recipe, data: Data, tables: Sequence[PathLike]) -> None:
    if recipe.needs_data and not data.given and not tables:
        raise OnnxqError(
            f"recipe {recipe.name} has static scales and needs calibration data",
            "give --calib data.npz or --text with --tokenizer; or use the recipes fp8-dynamic or "
            "int8-dynamic, which need none; or --random-calib for a trial with random data",
        )


def _open(graph: Model, data: Data, progress: Progress) -> Samples:
    from onnxq.calibrate.data import open_samples
    from onnxq.calibrate.random_data import random_samples
    from onnxq.calibrate.text import text_samples

    inputs = graph.inputs()
    if data.text is not None:
        if data.tokenizer is None:
            raise OnnxqError("text needs its tokenizer", "give --tokenizer tokenizer.json")
        count = {} if data.samples is None else {"samples": data.samples}
        return text_samples(
            Path(data.text),
            Path(data.tokenizer),
            inputs,
            seq_len=data.seq_len,
            batch=data.batch,
            progress=progress,
            **count,
        )
    if data.path is not None:
        return open_samples(data.path, inputs, batch=data.batch, progress=progress)
    count = {} if data.samples is None else {"samples": data.samples}
    return random_samples(inputs, seed=data.random or 0, progress=progress, **count)


def _calibration(
    graph: Model,
    placement: Placement,
    samples: Samples | None,
    tables: Sequence[PathLike],
    memory: int | None,
    device: Device,
    progress: Progress,
) -> CalibrationTable | None:
    """The ranges a static recipe needs: from saved tables, or from one pass over the data."""
    from onnxq.calibrate.run import calibrate
    from onnxq.calibrate.table import load_table
    from onnxq.transform import watched_tensors

    recipe = placement.recipe
    if not recipe.needs_data:
        return None
    statistic = "amax" if recipe.calibrator == "max" else "histogram"
    watched = dict.fromkeys(watched_tensors(placement), statistic)
    if not tables:
        assert samples is not None
        return calibrate(
            graph.session_model,
            watched,
            samples,
            fingerprint=graph.fingerprint,
            memory=memory,
            device=device,
            progress=progress,
        )
    table = load_table(Path(tables[0]), graph.fingerprint)
    for path in tables[1:]:
        table = table.merge(load_table(Path(path), graph.fingerprint))
    table.require(graph.fingerprint, watched)
    return table


def _convert(
    graph: Model,
    placement: Placement,
    precision: Precision,
    io: str,
    table: CalibrationTable | None,
    samples: Samples | None,
    memory: int | None,
    device: Device,
    progress: Progress,
) -> list[Edit]:
    """Bring an FP32 graph to its base precision; measured ranges decide where there is data."""
    from onnxq.calibrate.run import ranges_of_all
    from onnxq.graph.precision import BASES, apply_precision, is_fp32, plan_precision

    if precision == "keep":
        return []
    sites = [d.site for d in placement.decisions if d.site.operand is not None]
    halves = [s for s in sites if not is_fp32(s.node.inputs[0])]
    if sites and len(halves) * 2 > len(sites):
        return [Edit("precision", "keep", graph.path.name, "its layers are in 16 bits already")]
    ranges: dict[str, float] = {}
    if samples is not None and precision == "fp16":
        names = [t.name for n in graph.graph.nodes for t in n.outputs if t.name and is_fp32(t)]
        ranges = ranges_of_all(
            graph.session_model,
            names,
            samples.largest(),
            memory=memory,
            device=device,
            progress=progress,
        )
    if table is not None:
        for name in table.statistics:
            ranges[name] = max(ranges.get(name, 0.0), table.range(name, "max"))
    plan = plan_precision(graph, BASES[precision], ranges)
    return apply_precision(graph, plan, convert_io=io == "fp16")


def _fp16_conversion(source: Path, folder: Path, samples: Samples, device: Device) -> Path | None:
    """The model in FP16 and nothing else, or None where it is in 16 bits already."""
    from onnxq.graph.model import Model
    from onnxq.graph.prepare import prepare
    from onnxq.graph.save import save
    from onnxq.placement import Decision, Placement, find_sites

    graph, _ = prepare(Model.load(source), 19)
    sites = tuple(Decision(s, False, "") for s in find_sites(graph))
    placement = Placement(load_recipe("fp8-dynamic"), find_target(DEFAULT_TARGET), sites)
    edits = _convert(graph, placement, "fp16", "keep", None, samples, None, device, silent)
    if any(e.verb == "keep" for e in edits):
        return None
    return save(graph, folder / "fp16.onnx", external=True)[0]


def _per_layer(
    reference: Path, candidate: Path, samples: Samples, device: Device, progress: Progress
) -> LayerErrors:
    from onnxq.evaluate.layers import per_layer
    from onnxq.graph.model import Model
    from onnxq.graph.query import float_tensors, label

    first, second = Model.load(reference), Model.load(candidate)
    theirs = set(float_tensors(second))
    shared = [name for name in float_tensors(first) if name in theirs]
    producers = {t.name: label(n) for n in first.graph.nodes for t in n.outputs}
    return per_layer(
        first.session_model,
        second.session_model,
        shared,
        samples,
        producers=producers,
        device=device,
        progress=progress,
    )


def _stamp(
    graph: Model, recipe: Recipe, target: str, precision: str, table: CalibrationTable | None
) -> None:
    """Record the run in the model's metadata; nothing in it depends on when or where it ran."""
    record = {
        "version": onnxq.__version__,
        "recipe": recipe.as_dict(),
        "target": target,
        "precision": precision,
        "source": graph.fingerprint,
        "calibration": table.digest if table else None,
    }
    entry = graph.header.metadata_props.add()
    entry.key, entry.value = METADATA, json.dumps(record, sort_keys=True)


def _site_counts(placement: Placement) -> dict[str, Any]:
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


def _notes(table: CalibrationTable | None) -> Iterator[str]:
    yield from table.notes if table is not None else ()


def _size(source: Path, graph: Model) -> int:
    """Bytes of the model file and of the external data its weights take."""
    outside = sum(v.nbytes for v in graph.stored_outside())
    return source.stat().st_size + outside


__all__ = [
    "Built",
    "Compared",
    "Data",
    "Quantized",
    "Result",
    "build",
    "compare",
    "inspect",
    "quantize",
]
