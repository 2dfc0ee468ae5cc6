"""Runs the model over the data and keeps statistics of the watched tensors, in bounded memory.

Watched tensors are fetched as outputs, and their statistics are updated before the next run, so
that at most one step's values are held. When one step's values are more than `memory`, the tensors
are divided into groups, in the order given, and the data is run over once for each group; a model
that is cut after its last watched tensor makes the early passes shorter.

The statistics do not depend on groups, batches or order. ONNX Runtime's own sums can: a matrix
product over another number of rows or threads may add in another order and differ in the last bits.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from onnxq.calibrate.data import Feed, Samples
from onnxq.calibrate.session import Device, InputSpec, Session, open_session
from onnxq.calibrate.statistics import NotFiniteError, Statistic, as_float32, make
from onnxq.calibrate.table import CalibrationTable, DataOrigin
from onnxq.errors import OnnxqError
from onnxq.progress import Progress, silent

# Given tensor names: the serialized model with exactly these outputs, what they do not need cut
# away, and the folder that its external weights are read from.
MakeModel = Callable[[Sequence[str]], tuple[bytes, Path]]


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
        memory: bytes of watched values held at a time; None: a quarter of what is free.
        threads: ONNX Runtime's; None: one per core.

    Raises:
        OnnxqError: a tensor becomes NaN or infinite (which one, in which sample), the model does
            not load or run.
    """
    collected = {tensor: make(names) for tensor, names in watched.items()}
    notes = list(samples.notes)
    budget = _free_memory() // 4 if memory is None else memory
    opener = _Opener(make_model, device, threads)
    groups = _groups(opener, list(watched), samples.largest(), budget) if watched else []
    if len(groups) > 1:
        notes.append(f"calibrated in {len(groups)} passes: one step's values exceed the memory")
    done, total = 0, len(groups) * len(samples)
    for group in groups:
        session = opener(group)
        notes += [note for note in session.notes if note not in notes]
        for step, feed in enumerate(samples):
            _update(session, group, feed, collected, samples.label(step))
            done += 1
            progress("calibrate", done, total)
        del session  # its memory goes before the next pass's comes
    return CalibrationTable(
        fingerprint=fingerprint,
        statistics=collected,
        data=(DataOrigin(samples.description, samples.digest, samples.count),),
        notes=tuple(notes),
    )


def ranges_of_all(
    make_model: MakeModel,
    tensors: Sequence[str],
    feed: Feed,
    *,
    memory: int | None = None,
    device: Device = "auto",
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, float]:
    """max |x| of many tensors on one feed: what FP16 would not hold.

    Infinity and NaN are given as they are found, not raised; tensors that are no floats are left
    out; an empty one is 0.0. Memory as in `calibrate`.
    """
    opener = _Opener(make_model, device, threads)
    budget = _free_memory() // 4 if memory is None else memory
    ranges: dict[str, float] = {}
    groups = _groups(opener, list(tensors), feed, budget) if tensors else []
    for done, group in enumerate(groups, 1):
        session = opener(group)
        for name, values in _values(session, group, feed):
            if values.dtype.kind in "biu":
                continue
            widened = as_float32(values)
            extremes = (widened.max(), -widened.min()) if widened.size else (0.0,)
            ranges[name] = float(np.max(extremes))  # NaN wins, as it should
        del session
        progress("measure ranges", done, len(groups))
    return ranges


class _Opener:
    """Opens the model with the outputs asked for; the last one is kept for the next to ask."""

    def __init__(self, make_model: MakeModel, device: Device, threads: int | None) -> None:
        self._make_model, self._device, self._threads = make_model, device, threads
        self._last: tuple[list[str], Session] | None = None

    def __call__(self, outputs: list[str], keep: bool = False) -> Session:
        if self._last is not None and self._last[0] == outputs:
            session = self._last[1]
        else:
            self._last = None
            model, folder = self._make_model(outputs)
            session = open_session(model, folder=folder, device=self._device, threads=self._threads)
        self._last = (outputs, session) if keep else None
        return session


def _update(
    session: Session,
    group: list[str],
    feed: Feed,
    collected: Mapping[str, Mapping[str, Statistic]],
    label: str,
) -> None:
    """Run one step and add its values to the statistics."""
    for name, values in _values(session, group, feed, label):
        try:
            for statistic in collected[name].values():
                statistic.update(values)
        except NotFiniteError as error:
            raise OnnxqError(
                f"the tensor {name!r} is not finite in {label}: {error}",
                "repair or leave out that sample; if every sample does it, the model overflows "
                "by itself: give its FP32 original",
            ) from error
        except OnnxqError as error:
            raise OnnxqError(
                f"the tensor {name!r} in {label}: {error.message}", error.hint
            ) from error


def _values(
    session: Session, group: list[str], feed: Feed, label: str = "the sample"
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, values) of each output, each let go before the next."""
    try:
        arrays = session.run(group, feed)
    except OnnxqError as error:
        raise OnnxqError(f"{label}: {error.message}", error.hint) from error
    arrays.reverse()
    for name in group:
        yield name, arrays.pop()


def _groups(opener: _Opener, names: list[str], feed: Feed, memory: int) -> list[list[str]]:
    """The names in groups whose values on `feed` fit `memory`; at least one name a group.

    Sizes come from ONNX Runtime's shape inference with the feed's dimensions put in. What it does
    not know is measured by running the feed once.
    """
    session = opener(names, keep=True)
    dims = _dimensions(session.inputs, feed)
    sizes = {output.name: _size(output, dims) for output in session.outputs}
    unknown = [name for name in names if sizes[name] is None]
    known = [size for size in sizes.values() if size is not None]
    guess = max(known, default=sum(array.nbytes for array in feed.values()))
    guessed = {name: guess if size is None else size for name, size in sizes.items()}
    if unknown and sum(guessed.values()) > memory // 4:
        for group in _packed(unknown, guessed, memory):
            for name, values in _values(opener(group), group, feed):
                guessed[name] = values.nbytes
    return _packed(names, guessed, memory)


def _packed(names: list[str], sizes: Mapping[str, int], memory: int) -> list[list[str]]:
    groups: list[list[str]] = []
    room = -1
    for name in names:
        if sizes[name] > room or not groups:
            groups.append([])
            room = memory
        groups[-1].append(name)
        room -= sizes[name]
    return groups


def _dimensions(inputs: Sequence[InputSpec], feed: Feed) -> dict[str, int]:
    """What the inputs' named dimensions are in this feed."""
    return {
        dim: size
        for spec in inputs
        for dim, size in zip(spec.shape, feed[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }


def _size(output: InputSpec, dims: Mapping[str, int]) -> int | None:
    """Bytes of an output; None where a dimension is not known, or none is (an unknown rank)."""
    if not output.shape:
        return None
    size = output.dtype.itemsize
    for dim in output.shape:
        known = dims.get(dim) if isinstance(dim, str) else dim
        if known is None:
            return None
        size *= known
    return size


def _free_memory() -> int:
    """Bytes of memory that are free now; 4 GiB where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return 4 << 30
