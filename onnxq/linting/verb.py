"""`onnxq.lint`, and the same look at what `quantize` has just written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxq.errors import OnnxqError
from onnxq.gpus import DEFAULT_TARGET, Target
from onnxq.gpus import target as find_target
from onnxq.progress import Progress, silent
from onnxq.report import Report
from onnxq.results import Linted

if TYPE_CHECKING:
    from onnxq.graph.model import Model


def lint(
    model: str | Path,
    output: str | Path | None = None,
    *,
    target: str = DEFAULT_TARGET,
    ignore: Sequence[str] = (),
    fix: bool = False,
    progress: Progress = silent,
) -> Linted:
    """Tell what TensorRT will refuse, run in 16 bits or compute wrongly, from the file alone.

    Weights are not read, scales are. Nothing is compiled: `onnxq build` asks the compiler itself.

    Args:
        output: with `fix`, what to write; default: beside the model, `<name>.fixed.onnx`.
        ignore: ids of rules, or severities, to leave out.
        fix: cure what can be cured safely, and write the cured model; the findings are then those
            of that model. Nothing is written where nothing could be cured.

    Raises:
        OnnxqError: no model, an unknown target or rule, or the output is the input.
    """
    from onnxq.graph.model import Model
    from onnxq.graph.save import save
    from onnxq.linting.fix import fix as cure
    from onnxq.linting.run import lint as look

    source, gpu = Path(model), find_target(target)
    if output is not None and not fix:
        raise OnnxqError("-o without --fix: nothing would be written", "add --fix")
    if fix and not gpu.tensorrt:
        raise OnnxqError(f"--fix cures models for TensorRT, not for {gpu.name}", "leave it out")
    graph = Model.load(source)
    report = Report(f"{source.name} for {target}", {"model": source, "target": target})
    written: list[Path] = []
    if fix:
        destination = Path(output) if output else source.with_name(f"{source.stem}.fixed.onnx")
        look(graph, gpu, ignore)  # says what is wrong with `ignore` before anything is done
        graph, report.edits = cure(graph, gpu)
        if report.edits:
            _refuse_input(source, destination)
            written = save(graph, destination, progress=progress)
            graph = Model.load(written[0])
            report.facts.update(output=written[0], files=written)
        else:
            report.notes.append("nothing here that --fix cures: nothing was written")
    found = look(graph, gpu, ignore)
    report.notes += found.notes
    report.title = f"{(written or [source])[0].name} for {target}"
    report.facts.update(
        products=found.products,
        quantized=found.quantized,
        findings=[f.as_dict() for f in found.findings],
    )
    return Linted(report, not found.findings, found.findings, tuple(written))


def check_written(report: Report, model: Model, target: Target) -> None:
    """Lint what `quantize` has written; findings go into its report, the serious ones as notes.

    Args:
        model: as it was written, in memory: the file may be another run's by now. It is prepared
            for the rules, and of no other use afterwards.
    """
    from onnxq.linting.finding import Severity
    from onnxq.linting.run import lint as look

    found = look(model, target)
    report.facts["lint"] = [f.as_dict() for f in found.findings]
    serious = [f for f in found.findings if f.severity is not Severity.PORTABILITY]
    for rule in dict.fromkeys(f.rule for f in serious):
        here: list[Any] = [f for f in serious if f.rule == rule]
        more = f" and {len(here) - 1} more" if len(here) > 1 else ""
        first = here[0]
        report.notes.append(f"lint: {first.node}{more}: {first.severity.value}: {first.reason}")


def _refuse_input(source: Path, destination: Path) -> None:
    if destination.exists() and destination.samefile(source):
        raise OnnxqError(f"the output is the input: {destination}", "give another path with -o")
