"""What `quantize` asks of data: the statistics of a recipe, measured once or read from tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onnxq.errors import OnnxqError
from onnxq.progress import Progress
from onnxq.recipe import Recipe, presets
from onnxq.report import Report
from onnxq.samples import Data

if TYPE_CHECKING:
    from onnxq.calibrate.data import Samples
    from onnxq.calibrate.session import Device
    from onnxq.calibrate.table import CalibrationTable
    from onnxq.graph.model import Model
    from onnxq.placement import Placement
    from onnxq.unfinished import Unfinished

PathLike = str | Path


def refuse_missing_data(
    recipe: Recipe, data: Data, tables: Sequence[PathLike], source: PathLike | None
) -> None:
    """Refuse a recipe that needs data without any.

    Args:
        source: the model whose record the recipe was taken from, if it was.
    """
    if recipe.needs_data and not data.given and not tables:
        what = "static scales" if recipe.needs_ranges else "steps that look at its layers' inputs"
        others = ", ".join(n for n, r in presets().items() if not r.needs_data)
        carried = f"; what was measured for {source} is not carried over" if source else ""
        raise OnnxqError(
            f"recipe {recipe.name} has {what} and needs calibration data{carried}",
            f"give --calib data.npz or --text with --tokenizer; or use a recipe that needs none "
            f"({others}); or --random-calib for a trial with random data",
        )


@dataclass(frozen=True)
class Measured:
    """Runs the model over samples within the memory, and reports how that went."""

    destination: Path
    memory: int | None
    device: Device
    progress: Progress
    report: Report

    def __call__(
        self, graph: Model, watched: dict[str, str], samples: Samples, fingerprint: str = ""
    ) -> CalibrationTable:
        from onnxq.calibrate.within import calibrate_within

        table, ran = calibrate_within(
            graph,
            watched,
            samples,
            beside=self.destination,
            memory=self.memory,
            fingerprint=fingerprint,
            device=self.device,
            progress=self.progress,
        )
        self.report.facts["calibrated"] = ran.as_dict()
        return table


def calibrate(
    graph: Model,
    placement: Placement,
    samples: Samples | None,
    tables: Sequence[PathLike],
    measured: Measured,
    unfinished: Unfinished,
    unsolved: Mapping[int, str],
) -> CalibrationTable | None:
    """The statistics a static recipe needs: from saved tables, or from one pass over the data.

    Args:
        unsolved: layers that no second-order method works on.
    """
    from onnxq.calibrate.table import load_table
    from onnxq.transform import watched_tensors

    if not (placement.recipe.needs_ranges or placement.recipe.statistics):
        return None
    watched = watched_tensors(placement, unsolved)
    if not tables:
        assert samples is not None  # `refuse_missing_data` saw to it
        run = partial(measured, graph, watched, samples, graph.fingerprint)
        return unfinished.table(run, graph.fingerprint, watched)
    table = load_table(Path(tables[0]), graph.fingerprint)
    for path in tables[1:]:
        table = table.merge(load_table(Path(path), graph.fingerprint))
    table.require(graph.fingerprint, watched)
    return table


def measured_again(
    graph: Model,
    placement: Placement,
    table: CalibrationTable,
    samples: Samples | None,
    measured: Measured,
) -> CalibrationTable:
    """The table with the ranges of the rescaled model in the place of the original's.

    Without samples they follow from the channels' maxima, where the recipe asks for no more.

    Raises:
        OnnxqError: it asks for more, and there are no samples.
    """
    from onnxq.transform import watched_tensors

    watched = {
        tensor: "+".join(n for n in names.split("+") if n in ("amax", "histogram", "steps"))
        for tensor, names in watched_tensors(placement).items()
    }
    if samples is None:
        measured.report.notes.append("ranges behind rescaling follow from the channels' maxima")
        return _followed(table, watched, placement.recipe)
    again = measured(graph, {tensor: names for tensor, names in watched.items() if names}, samples)
    tensors = table.statistics.keys() | again.statistics.keys()
    return replace(
        table,
        statistics={
            t: {**table.statistics.get(t, {}), **again.statistics.get(t, {})} for t in tensors
        },
    )


def _followed(
    table: CalibrationTable, watched: Mapping[str, str], recipe: Recipe
) -> CalibrationTable:
    """The table with the range of each rescaled tensor, the largest of its channels' maxima."""
    from onnxq.calibrate.statistics import Amax, ChannelAmax

    statistics = dict(table.statistics)
    for tensor, names in watched.items():
        found = statistics.get(tensor, {})
        if not names or any(isinstance(statistic, Amax) for statistic in found.values()):
            continue
        channels = next((s for s in found.values() if isinstance(s, ChannelAmax)), None)
        if channels is None or channels.values is None or "histogram" in names:
            raise OnnxqError(
                f"recipe {recipe.name} rescales layers, whose ranges must be measured again",
                "give the data too, with --calib or --text: a calibration table is not enough",
            )
        peak = float(channels.values.max(initial=0))
        whole = Amax()
        whole.low, whole.high = -peak, peak
        statistics[tensor] = {**found, Amax.name: whole}
    return replace(table, statistics=statistics)


def say_steps(placement: Placement, table: CalibrationTable, report: Report) -> None:
    """What a calibration that was kept by denoising step found."""
    from onnxq.loudness import lines, loudness, missing

    found = loudness(placement, table)
    if found is not None:
        report.facts["amax_by_step"] = found
        report.notes += lines(found)
    elif missing(table):
        report.notes.append(
            "the data says no denoising step (no input timestep): all samples count as one"
        )
