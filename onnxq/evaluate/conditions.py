"""What a diffusion model is asked for: its inputs beside the noisy sample and the timestep.

conditions.npz   an array for each of these inputs, a condition along the first dimension;
                 `negative.<input>` (as many rows, or one for all) for guidance; `label`, the
                 class of each condition, for a classifier
a capture        arrays of all inputs as a pipeline fed them (tools/capture_diffusers.py): an
                 .npz or a folder of them. Where its two halves, or its rows two by two, are
                 the same noisy sample, the first of each pair is guidance's. A condition that
                 comes at several steps is taken once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.sources import ArrayFiles
from onnxq.errors import OnnxqError

Array = NDArray[Any]

NEGATIVE = "negative."
LABEL = "label"
_HINT = "an .npz with an array for each input but sample and timestep, or captures of a pipeline"


@dataclass(frozen=True)
class Conditions:
    """`count` conditions.

    Attributes:
        wanted: input name -> [count, ...].
        negative: the same for what guidance leads away from; None: there is none.
        labels: the class of each, int64 [count].
        size: of a captured sample, without its rows.
    """

    count: int
    wanted: Mapping[str, Array]
    negative: Mapping[str, Array] | None = None
    labels: NDArray[np.int64] | None = None
    size: tuple[int, ...] | None = None

    def rows(self, samples: NDArray[np.int64], guided: bool) -> dict[str, Array]:
        """The inputs for these samples, which take the conditions in turn; behind those of
        guidance where it is wanted."""
        turn = samples % self.count
        if not guided or self.negative is None:
            return {name: array[turn] for name, array in self.wanted.items()}
        return {
            name: np.concatenate([self.negative[name][turn], array[turn]])
            for name, array in self.wanted.items()
        }


def read_conditions(path: Path | None, names: Sequence[str]) -> Conditions:
    """The conditions for a model's inputs `names` (without sample and timestep).

    Raises:
        OnnxqError: unreadable, an input without array or an array without input, or arrays that
            do not fit each other.
    """
    if path is None:
        if names:
            asked = ", ".join(names)
            raise OnnxqError(f"the model takes {asked} too", f"give --conditions: {_HINT}")
        return Conditions(1, {})
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise OnnxqError(f"{path} holds no .npz", _HINT)
    return _joined([_of_file(file, names) for file in files], path)


def _of_file(path: Path, names: Sequence[str]) -> Conditions:
    with ExitStack() as stack:
        streams = ArrayFiles(path).open(stack)
        inputs = {name.removeprefix(NEGATIVE) for name in streams} - {LABEL, *_STEPPED}
        for problem, found in (
            ("lacks the input", sorted(set(names) - streams.keys())),
            ("has no input of the model's:", sorted(inputs - set(names))),
        ):
            if found:
                raise OnnxqError(f"{path} {problem} {', '.join(map(repr, found))}", _HINT)
        arrays = {name: stream.all() for name, stream in streams.items()}
    rows = {name: array.shape[:1] for name, array in arrays.items() if name in (*names, LABEL)}
    count = next(iter(rows.values()), ()) or (1,)
    if not count[0] or any(found != count for found in rows.values()):
        said = ", ".join(f"{name} {list(arrays[name].shape)}" for name in rows)
        raise OnnxqError(f"{path}: not the same number of conditions: {said}", _HINT)
    wanted = {name: arrays[name] for name in names}
    labels = _labels(arrays[LABEL], path) if LABEL in arrays else None
    if "sample" in arrays:
        return _captured(arrays["sample"], wanted, labels)
    given = [name for name in names if NEGATIVE + name in arrays]
    if not given:
        return Conditions(count[0], wanted, labels=labels)
    if len(given) < len(names):
        lacking = ", ".join(repr(NEGATIVE + n) for n in names if n not in given)
        raise OnnxqError(f"{path} lacks {lacking}", "guidance needs all inputs")
    negative = {n: _as_many(arrays[NEGATIVE + n], wanted[n], f"{path}: {n}") for n in names}
    return Conditions(count[0], wanted, negative, labels)


_STEPPED = ("sample", "timestep")


def _as_many(negative: Array, wanted: Array, where: str) -> Array:
    try:
        return np.broadcast_to(negative, wanted.shape)
    except ValueError:
        raise OnnxqError(
            f"{where} is {list(wanted.shape)}, its negative {list(negative.shape)}",
            "as many negative rows as conditions, or one",
        ) from None


def _labels(array: Array, path: Path) -> NDArray[np.int64]:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise OnnxqError(f"{path}: labels are whole numbers, one a condition")
    return array.astype(np.int64)


def _captured(
    sample: Array, wanted: Mapping[str, Array], labels: NDArray[np.int64] | None
) -> Conditions:
    """The conditions of a capture's rows."""
    count, size = len(sample), sample.shape[1:]
    halves = (slice(0, count // 2), slice(count // 2, count))
    turns = (slice(0, count, 2), slice(1, count, 2))
    for first, second in (halves, turns) if count % 2 == 0 else ():
        if np.array_equal(sample[first], sample[second]):
            return Conditions(
                count // 2,
                {name: array[second] for name, array in wanted.items()},
                {name: array[first] for name, array in wanted.items()},
                None if labels is None else labels[second],
                size,
            )
    return Conditions(count, wanted, labels=labels, size=size)


def _joined(parts: Sequence[Conditions], path: Path) -> Conditions:
    """All of them, each once."""
    first = parts[0]
    kind = (first.negative is None, first.labels is None, first.size)
    if any((p.negative is None, p.labels is None, p.size) != kind for p in parts):
        raise OnnxqError(f"the files in {path} are of different kinds", _HINT)
    wanted = _stacked([part.wanted for part in parts], path)
    negative = None
    if first.negative is not None:
        negative = _stacked([part.negative for part in parts if part.negative is not None], path)
    labels = None
    if first.labels is not None:
        labels = np.concatenate([part.labels for part in parts if part.labels is not None])
    count = sum(part.count for part in parts)
    if first.size is None or not wanted:
        return Conditions(count if wanted else 1, wanted, negative, labels, first.size)
    seen: dict[bytes, int] = {}
    for index in range(count):
        rows = [array[index].tobytes() for a in (wanted, negative or {}) for array in a.values()]
        seen.setdefault(b"".join(rows), index)
    once = np.array(list(seen.values()))
    return Conditions(
        len(once),
        {name: array[once] for name, array in wanted.items()},
        None if negative is None else {name: array[once] for name, array in negative.items()},
        None if labels is None else labels[once],
        first.size,
    )


def _stacked(parts: Sequence[Mapping[str, Array]], path: Path) -> dict[str, Array]:
    try:
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except ValueError:
        raise OnnxqError(f"the files in {path} hold arrays of different shapes", _HINT) from None
