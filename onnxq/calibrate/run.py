"""Runs the model over the data and keeps statistics of the watched tensors, in bounded memory.

Watched tensors are fetched as outputs, and their statistics are updated before the next run, so
that at most one step's values are held. When one step's values are more than `memory`, the tensors
are divided into groups, in the order given, and the data is run over once for each group; a model
that is cut after its last watched tensor makes the early passes shorter.

The statistics do not depend on groups, batches or order. ONNX Runtime's own sums can: a matrix
product over another number of rows or threads may add in another order and differ in the last bits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from onnxq.calibrate.data import Samples
from onnxq.calibrate.passes import MakeModel, Opener, fetch, plan
from onnxq.calibrate.session import Device
from onnxq.calibrate.statistics import LARGE, PARKED, NotFiniteError, Statistic, make
from onnxq.calibrate.steps import NO_STEP, StepAmax, denoising_step
from onnxq.calibrate.table import CalibrationTable, DataOrigin
from onnxq.errors import OnnxqError
from onnxq.progress import Progress, silent
from onnxq.threads import cores

# Fewer values a step than this are counted before a second thread has begun.
_WORTH_THREADS = 1 << 18


def calibrate(
    make_model: MakeModel,
    watched: Mapping[str, str],
    samples: Samples,
    *,
    fingerprint: str = "",
    memory: int | None = None,
    device: Device = "auto",
    threads: int | None = None,
    progress: Progress = silent,
) -> CalibrationTable:
    """Statistics of the watched tensors over all samples.

    Args:
        make_model: gives the model with the tensors asked for as its outputs.
        watched: {tensor: statistics}, as `statistics.make` reads them: "amax", "histogram", ...
            In the model's own order, so that a pass over the first ones can stop early.
        samples: the data.
        fingerprint: the model's, kept in the table.
        memory: bytes of watched values held at a time; None: about what the loaded model takes.
        threads: ONNX Runtime's, and as many for the statistics; None: one per core.

    Raises:
        OnnxqError: a tensor becomes NaN or infinite (which one, in which sample), the model does
            not load or run.
    """
    notes = list(samples.notes)
    opener = Opener(make_model, device, threads)
    groups = (
        plan(opener, list(watched), samples.largest(), memory, _held(watched)) if watched else []
    )
    done, total = 0, len(groups) * len(samples)
    with Collector(watched, threads) as collector:
        for group in groups:
            session = opener(group)
            notes += [note for note in session.notes if note not in notes]
            for step, feed in enumerate(samples):
                label = samples.label(step)
                collector.at(feed, label)
                collector.update(fetch(session, group, feed, label), label)
                done += 1
                progress("calibrate", done, total)
            del session  # its memory goes before the next pass's comes
            if len(groups) > 1:
                collector.park(group)
        return collector.table(samples, fingerprint, notes)


def _held(watched: Mapping[str, str]) -> Callable[[str, int], int]:
    """What a pass keeps beside the values: Gram matrices; all else is a few kilobytes."""
    return lambda name, channels: sum(
        statistic.bytes_for(channels)
        for statistic in make(watched[name]).values()
        if isinstance(statistic, LARGE)
    )


class Collector:
    """Statistics of tensors, updated by several threads; a context manager.

    Args:
        watched: {tensor: statistics}.
    """

    def __init__(self, watched: Mapping[str, str], threads: int | None = None) -> None:
        self._collected = {tensor: make(names) for tensor, names in watched.items()}
        self._workers = threads or cores()
        self._pool = ThreadPoolExecutor(self._workers)

    def __enter__(self) -> Collector:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown()

    def at(self, feed: Mapping[str, NDArray[Any]], label: str) -> None:
        """Say which sample the next values come from, to what is kept by denoising step.

        Raises:
            OnnxqError: it has rows of several steps.
        """
        by_step = [
            statistic
            for statistics in self._collected.values()
            for statistic in statistics.values()
            if isinstance(statistic, StepAmax)
        ]
        now = denoising_step(feed, label) if by_step else NO_STEP
        for statistic in by_step:
            statistic.now = now

    def update(self, values: Iterator[tuple[str, NDArray[Any]]], label: str) -> None:
        """Add one step's values.

        Raises:
            OnnxqError: of the first tensor in order that is not finite.
        """
        _update(self._pool, self._workers, values, self._collected, label)

    def park(self, names: Iterable[str], folder: Path | None = None) -> None:
        """Move what is large of some tensors' statistics, which are done, to disk."""
        for name in names:
            for statistic in self._collected[name].values():
                if isinstance(statistic, PARKED):
                    statistic.park(folder)

    def table(self, samples: Samples, fingerprint: str, notes: Iterable[str]) -> CalibrationTable:
        """What was found."""
        return CalibrationTable(
            fingerprint=fingerprint,
            statistics=self._collected,
            data=(DataOrigin(samples.description, samples.digest, samples.count),),
            notes=tuple(notes),
        )


def _update(
    pool: ThreadPoolExecutor,
    workers: int,
    values: Iterator[tuple[str, NDArray[Any]]],
    collected: Mapping[str, Mapping[str, Statistic]],
    label: str,
) -> None:
    """Several tensors at a time."""
    waiting = deque(values)
    if sum(array.size for _, array in waiting) < _WORTH_THREADS:
        workers = 1
    names = [name for name, _ in waiting]
    errors: dict[str, OnnxqError] = {}

    def work() -> None:
        while True:
            try:
                name, array = waiting.popleft()
            except IndexError:  # nothing left
                return
            try:
                for statistic in collected[name].values():
                    statistic.update(array)
            except (NotFiniteError, OnnxqError) as error:
                errors[name] = _said(error, name, label)

    others = [pool.submit(work) for _ in range(workers - 1)]
    work()
    for other in others:
        other.result()
    for name in names:
        if name in errors:
            raise errors[name]


def _said(error: Exception, name: str, label: str) -> OnnxqError:
    """What stopped a tensor's statistics, with its name and the sample."""
    if isinstance(error, OnnxqError):
        return OnnxqError(f"the tensor {name!r} in {label}: {error.message}", error.hint)
    return OnnxqError(
        f"the tensor {name!r} is not finite in {label}: {error}",
        "repair or leave out that sample; if every sample does it, the model overflows by "
        "itself: give its FP32 original",
    )
