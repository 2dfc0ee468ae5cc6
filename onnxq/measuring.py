"""What `quantize` asks of data: the statistics of a recipe, measured once or read from tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from onnxq.errors import OnnxqError
from onnxq.recipe import Recipe, presets
from onnxq.samples import Data
from onnxq.work import Work

if TYPE_CHECKING:
    from onnxq.calibrate.table import CalibrationTable

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


def calibrate(work: Work, tables: Sequence[PathLike], save: PathLike | None = None) -> None:
    """Find the statistics a static recipe needs: in saved tables, or in one pass over the data.

    Args:
        save: where the table found is kept too.
    """
    from onnxq.ranging import watched_tensors

    recipe = work.placement.recipe
    if not (recipe.needs_ranges or recipe.statistics):
        return
    fingerprint = work.graph.fingerprint
    watched = watched_tensors(work.placement, work.unsolved)
    if tables:
        work.table = _merged(tables, fingerprint)
        work.table.require(fingerprint, watched)
    else:
        run = partial(_measured, work, watched, fingerprint)
        work.table = work.unfinished.table(run, fingerprint, watched)
    work.report.notes += work.table.notes
    if save is not None:
        work.table.save(Path(save))


def measure_again(work: Work) -> None:
    """Put the ranges of the rescaled model in the place of the original's.

    Without samples they follow from the channels' maxima, where the recipe asks for no more.

    Raises:
        OnnxqError: it asks for more, and there are no samples.
    """
    from onnxq.ranging import watched_tensors

    assert work.table is not None  # there was something to rescale by
    watched = {
        tensor: "+".join(n for n in names.split("+") if n in ("amax", "histogram", "steps"))
        for tensor, names in watched_tensors(work.placement).items()
    }
    if work.samples is None:
        work.report.notes.append("ranges behind rescaling follow from the channels' maxima")
        work.table = _followed(work.table, watched, work.placement.recipe)
        return
    watched = {tensor: names for tensor, names in watched.items() if names}
    again = _measured(work, watched, again=True)
    known = work.table.statistics
    tensors = known.keys() | again.statistics.keys()
    work.table = replace(
        work.table,
        statistics={t: {**known.get(t, {}), **again.statistics.get(t, {})} for t in tensors},
    )


def _measured(
    work: Work, watched: dict[str, str], fingerprint: str = "", *, again: bool = False
) -> CalibrationTable:
    """Run the model over the samples within the memory, and report how that went.

    Args:
        again: behind steps that rescale.
    """
    from onnxq.calibrate.within import calibrate_within

    def progress(step: str, done: int, total: int) -> None:
        work.progress(f"{step} again, rescaled" if again else step, done, total)

    assert work.samples is not None  # `refuse_missing_data` saw to it
    table, ran = calibrate_within(
        work.graph,
        watched,
        work.samples,
        beside=work.destination,
        memory=work.memory,
        fingerprint=fingerprint,
        device=work.device,
        progress=progress,
    )
    work.report.facts["calibrated_again" if again else "calibrated"] = ran.as_dict()
    return table


def _merged(tables: Sequence[PathLike], fingerprint: str) -> CalibrationTable:
    from onnxq.calibrate.table import load_table

    first, *others = (load_table(Path(path), fingerprint) for path in tables)
    for other in others:
        first = first.merge(other)
    return first


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


def say_steps(work: Work) -> None:
    """What a calibration that was kept by denoising step found."""
    from onnxq.loudness import lines, loudness, missing

    assert work.table is not None
    found = loudness(work.placement, work.table, work.ranges or {})
    if found is not None:
        work.report.facts["amax_by_step"] = found
        work.report.notes += lines(found)
    elif missing(work.table):
        work.report.notes.append(
            "the data says no denoising step (no input timestep): all samples count as one"
        )
