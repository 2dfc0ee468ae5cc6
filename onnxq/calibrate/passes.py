"""Which tensors are fetched together: as many as fit the memory, in as few passes as possible."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from onnxq.calibrate.data import Feed
from onnxq.calibrate.session import Device, InputSpec, Session, open_session
from onnxq.errors import OnnxqError
from onnxq.memory import available_memory, resident_memory

# Given tensor names: the serialized model with exactly these outputs, what they do not need cut
# away, and the folder that its external weights are read from.
MakeModel = Callable[[Sequence[str]], tuple[bytes, Path]]


class Opener:
    """Opens the model with the outputs asked for; a session to `keep` serves the next such call."""

    def __init__(self, make_model: MakeModel, device: Device, threads: int | None) -> None:
        self._make_model, self._device, self._threads = make_model, device, threads
        self._kept: tuple[list[str], Session] | None = None

    def __call__(self, outputs: list[str], keep: bool = False) -> Session:
        kept, self._kept = self._kept, None  # let go before another one takes memory
        if kept is not None and kept[0] == outputs:
            session = kept[1]
        else:
            del kept
            model, folder = self._make_model(outputs)
            session = open_session(model, folder=folder, device=self._device, threads=self._threads)
        if keep:
            self._kept = (outputs, session)
        return session


def plan(
    opener: Opener,
    names: list[str],
    feed: Feed,
    memory: int | None,
    held: Callable[[str, int], int] = lambda name, channels: 0,
) -> list[list[str]]:
    """The names in groups whose values on `feed` fit `memory` bytes; at least one a group.

    Sizes come from the shapes that ONNX Runtime infers. Tensors with dimensions it does not know
    are measured by running the feed, unless all fit even if these are as long as can be expected.

    Args:
        memory: None: as much again as the process takes with the model loaded, 1 GiB at least.
        held: bytes a statistic of a tensor with so many channels (its last axis) keeps in a pass.
    """
    session = opener(names, keep=True)
    memory = _allowance() if memory is None else memory
    dims = _dimensions(session.inputs, feed)
    longest = _longest(dims, feed)
    shapes = {output.name: output for output in session.outputs}
    del session
    sizes = {name: _size(shapes[name], dims, longest) for name in names}
    kept = {name: held(name, _channels(shapes[name], dims, longest)) for name in names}
    if sum(sizes.values()) + sum(kept.values()) > memory:
        sure = {name: _size(shapes[name], dims, 0) for name in names}
        unknown = [name for name in names if not sure[name]]
        largest = max(sure.values()) or sum(array.nbytes for array in feed.values())
        measured = _in_growing_groups(opener, unknown, feed, largest, memory)
        for name, values in measured:
            sizes[name] = values.nbytes
            kept[name] = held(name, values.shape[-1] if values.ndim else 1)
    return _packed(names, {name: sizes[name] + kept[name] for name in names}, memory)


def fetch(
    session: Session, names: list[str], feed: Feed, label: str = ""
) -> Iterator[tuple[str, NDArray[Any]]]:
    """(name, values) of each output of one run, each let go before the next is given."""
    try:
        arrays = session.run(names, feed)
    except OnnxqError as error:
        raise OnnxqError(
            f"{label}: {error.message}" if label else error.message, error.hint
        ) from error
    arrays.reverse()
    for name in names:
        yield name, arrays.pop()


def _in_growing_groups(
    opener: Opener, names: list[str], feed: Feed, largest: int, memory: int
) -> Iterator[tuple[str, NDArray[Any]]]:
    """(name, values) of tensors of unknown size, at first as many as fit if all are `largest`.

    Then as many as fit if they are as large as those before on average, with a quarter to spare
    (a model's layers repeat), but four times as many as the last time at most.
    """
    count = max(1, memory // max(1, largest))
    total, done = 0, 0
    while names:
        group, names = names[:count], names[count:]
        for name, values in fetch(opener(group), group, feed):
            total, done = total + values.nbytes, done + 1
            yield name, values
        fitting = int(memory * 0.8 * done / max(1, total))
        count = max(1, min(fitting, 4 * count))


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


def _longest(dims: Mapping[str, int], feed: Feed) -> int:
    """What an unknown dimension may be: all open ones, or the largest input, flattened."""
    return max(math.prod(dims.values()), *(array.size for array in feed.values()))


def _size(output: InputSpec, dims: Mapping[str, int], unknown: int) -> int:
    """Bytes of an output whose unknown dimensions, or dimension if its rank is, are `unknown`."""
    size = output.dtype.itemsize
    for dim in output.shape or (None,):
        known = dims.get(dim) if isinstance(dim, str) else dim
        size *= unknown if known is None else known
    return size


def _channels(output: InputSpec, dims: Mapping[str, int], unknown: int) -> int:
    """The size of the last axis, `unknown` where it is."""
    last = (output.shape or (None,))[-1]
    known = dims.get(last) if isinstance(last, str) else last
    return unknown if known is None else known


def _allowance() -> int:
    """As many bytes as the process takes now, 1 GiB at least; half of what is free at most.

    Counting from what the loaded model takes keeps the peak within twice a bare run's, and a
    model of gigabytes from being run over once for every few tensors.
    """
    least = 1 << 30
    resident, free = resident_memory(), available_memory()
    return least if free is None else min(max(resident, least), free // 2)
