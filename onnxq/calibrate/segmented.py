"""Calibration of a model that does not fit in memory: segment by segment, all samples through each.

Each segment is a model of its own, which loads its weights and no others. What later ones read of
it waits on disk, in `Frontier`. Statistics are collected as in one piece.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.data import Feed, Samples
from onnxq.calibrate.division import Segment
from onnxq.calibrate.frontier import Frontier
from onnxq.calibrate.passes import fetch
from onnxq.calibrate.run import Collector
from onnxq.calibrate.session import Device, Session, open_session
from onnxq.calibrate.table import CalibrationTable
from onnxq.errors import OnnxqError
from onnxq.graph.pieces import Pieces
from onnxq.memory import megabytes, trim_memory
from onnxq.progress import Progress, silent

Array = NDArray[Any]
_HINT = "write the output to a disk with more space, or give fewer samples"


def calibrate_in_segments(
    pieces: Pieces,
    segments: Sequence[Segment],
    watched: Mapping[str, str],
    samples: Samples,
    folder: Path,
    *,
    fingerprint: str = "",
    device: Device = "auto",
    threads: int | None = None,
    progress: Progress = silent,
) -> tuple[CalibrationTable, int]:
    """Statistics of the watched tensors over all samples, as `run.calibrate` gives them.

    Args:
        pieces, segments: the model, and how it is divided.
        folder: for what waits; emptied on the way, but for its folders.

    Returns:
        The table, and how many bytes went through the disk.

    Raises:
        OnnxqError: a tensor becomes NaN or infinite, a segment does not load or run, or the disk is
            too small (what is needed is known beforehand, but for samples of different shapes).
    """
    _refuse_full(pieces, segments, len(samples), folder)
    frontier, notes = Frontier(folder / "frontier", _HINT), list(samples.notes)
    fed = [name for name in watched if name in pieces.inputs]
    total = len(segments) * len(samples)
    progress("calibrate", 0, total)
    with Collector(watched, threads) as collector:
        for index, segment in enumerate(segments):
            session = _open(pieces, segment, frontier, device, threads)
            notes += [note for note in session.notes if note not in notes]
            for step, feed in enumerate(samples):
                label = samples.label(step)
                collector.at(feed, label)
                values = _run(session, pieces, segment, frontier, feed, step, label)
                if not index:
                    collector.update(iter([(name, feed[name]) for name in fed]), label)
                collector.update(values, label)
                trim_memory()  # or what each run leaves scattered adds up to a seventh of its peak
                progress("calibrate", index * len(samples) + step + 1, total)
            del session, values, feed  # their memory goes before the next one's comes
            collector.park(segment.watched, folder)
            _let_go(pieces, segments[index + 1 :], frontier)
        return collector.table(samples, fingerprint, notes), frontier.written


def disk_bytes(segments: Sequence[Segment], samples: int) -> int:
    """The most bytes that wait on disk at a time."""
    alive: dict[str, int] = {}
    most = 0
    for index, segment in enumerate(segments):
        alive |= segment.gives
        most = max(most, sum(alive.values()))
        later = {name for s in segments[index + 1 :] for name in s.reads}
        alive = {name: size for name, size in alive.items() if name in later}
    return most * samples


def _refuse_full(pieces: Pieces, segments: Sequence[Segment], samples: int, folder: Path) -> None:
    free, what = shutil.disk_usage(folder).free, "activations"
    needed = disk_bytes(segments, samples) + sum(segment.parked for segment in segments)
    weights = max(pieces.computed_bytes(segment.steps) for segment in segments)
    if weights:
        needed, what = needed + weights, "activations and rescaled weights"
    if needed > free:
        raise OnnxqError(
            f"calibrating in segments keeps {megabytes(needed)} of {what} in "
            f"{folder.parent.parent}, which has {megabytes(free)} left",
            _HINT,
        )


def measure_in_segments(
    pieces: Pieces,
    segments: Sequence[Segment],
    tensors: Sequence[str],
    feed: Feed,
    folder: Path,
    *,
    device: Device = "auto",
    progress: Progress = silent,
) -> dict[str, float]:
    """max |x| of the tensors on one sample, as `probe.measure_ranges` gives them."""
    _refuse_full(pieces, segments, 1, folder)
    frontier, ranges = Frontier(folder / "frontier", _HINT), dict[str, float]()
    progress("measuring ranges", 0, len(segments))
    for index, segment in enumerate(segments):
        made = {name for i in segment.steps for name in pieces.steps[i].makes}
        probed = [name for name in tensors if name in made]
        session = _open(pieces, segment, frontier, device, None, probed)
        given = [pieces.wide(name) for name in segment.gives]
        outputs = [f"onnxq_probe_{i}" for i in range(len(probed))]
        inputs = _inputs(pieces, segment, frontier, feed, 0)
        for name, values in fetch(session, [*given, *outputs], inputs):
            if name in given:
                frontier.put(name, 0, np.asarray(values))
            else:
                ranges[probed[outputs.index(name)]] = float(values)
        del session, inputs
        _let_go(pieces, segments[index + 1 :], frontier)
        progress("measuring ranges", index + 1, len(segments))
    return ranges


def _open(
    pieces: Pieces,
    segment: Segment,
    frontier: Frontier,
    device: Device,
    threads: int | None,
    probed: Sequence[str] = (),
) -> Session:
    held = {name: frontier.dtypes[pieces.wide(name)] for name in segment.reads}
    spooled, watched = list(segment.gives), () if probed else segment.watched
    model = pieces.model(segment.steps, watched, held, spooled=spooled, probed=probed)
    trim_memory()  # what computing weights needed
    session = open_session(model, folder=pieces.folder, device=device, threads=threads, arena=False)
    if pieces.spool is not None:
        pieces.spool.clear()
    trim_memory()  # what loading needed: the weights once more
    return session


def _inputs(pieces: Pieces, segment: Segment, frontier: Frontier, feed: Feed, sample: int) -> Feed:
    kept = {pieces.wide(name) for name in segment.reads}
    return dict(feed) | {name: frontier.get(name, sample) for name in kept}


def _let_go(pieces: Pieces, left: Sequence[Segment], frontier: Frontier) -> None:
    """Of what no later segment reads, and of freed memory."""
    frontier.keep({pieces.wide(name) for segment in left for name in segment.reads})
    trim_memory()


def _run(
    session: Session,
    pieces: Pieces,
    segment: Segment,
    frontier: Frontier,
    feed: Feed,
    sample: int,
    label: str,
) -> Iterator[tuple[str, Array]]:
    """(name, values) of what is watched; what is given to later segments goes to disk before."""
    inputs = _inputs(pieces, segment, frontier, feed, sample)
    given = {pieces.wide(name) for name in segment.gives}
    names = list(dict.fromkeys((*segment.watched, *given)))
    watched = []
    for name, values in fetch(session, names, inputs, label):
        if name in given:
            frontier.put(name, sample, np.asarray(values))
        if name in segment.watched:
            watched.append((name, values))
    del inputs
    watched.reverse()
    while watched:
        yield watched.pop()
