"""Calibration data: what the user has, as checked feeds for the model's inputs.

    samples = open_samples(Path("calib.npz"), session.inputs, batch=4)
    for feed in samples:                  # {input name: array}, as often as needed
        session.run(None, feed)

Everything is checked when it is opened, by one reading: names, ranks, fixed dimensions, dtypes,
sample counts, NaN and infinity. What had to be converted is in `notes`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.batches import BatchArrays, check_names, check_rank
from onnxq.calibrate.session import InputSpec
from onnxq.calibrate.sources import (
    ArrayFiles,
    LoaderScript,
    SampleFiles,
    Source,
    polygraphy_json,
)
from onnxq.errors import OnnxqError
from onnxq.progress import Progress, silent

Array = NDArray[Any]
Feed = dict[str, Array]

# Feeds up to this many bytes are kept from the first reading; more are read again for each pass.
_KEEP_BYTES = 64 << 20


class ShapeRange(NamedTuple):
    """The smallest, the middle and the largest shape an input is given, dimension by dimension."""

    minimum: tuple[int, ...]
    median: tuple[int, ...]
    maximum: tuple[int, ...]


class Samples:
    """Checked feeds. Iterate as often as needed; every reading gives the same or raises.

    Attributes:
        inputs: the model's inputs that the feeds fit.
        description: what the data is, for people.
        digest: SHA-256 of all rows in order, the same for any batch size.
        count: samples: rows of a batch, or one per step where arrays are fed as they are.
        peaks: max |x| of each floating-point input over all samples.
        notes: what was converted or left out.
    """

    def __init__(
        self, source: Source, inputs: Sequence[InputSpec], progress: Progress = silent
    ) -> None:
        self.inputs = tuple(inputs)
        self.description = source.description
        self.notes: list[str] = list(getattr(source, "notes", []))
        self._source = source
        self._kept: list[Feed] | None = None
        self._shapes: dict[str, list[tuple[int, ...]]] = {spec.name: [] for spec in self.inputs}
        self._length = 0
        self.peaks: dict[str, float] = {}
        self.digest, self.count = "", 0
        try:
            self._read_once(progress)
        except MemoryError:
            raise OnnxqError(
                f"{self.label(self._length)} of {self.description} does not fit into memory",
                "give smaller samples, or lower --batch",
            ) from None

    def __len__(self) -> int:
        """Steps, not samples: how many feeds a reading gives."""
        return self._length

    def __iter__(self) -> Iterator[Feed]:
        if self._kept is not None:
            for feed in self._kept:
                yield dict(feed)
            return
        digest = DataDigest(self.inputs)
        for step, raw in enumerate(self._source):
            feed = self._fit(raw, step)
            digest.add(feed)
            yield feed
        if digest.hexdigest() != self.digest:
            raise OnnxqError(
                f"{self.description} gave other data when it was read again",
                "give a seed to its random numbers, and do not change files while onnxq runs",
            )

    def label(self, step: int) -> str:
        """Step i in a message: `sample 12`, `sample 8 to 11`, `sample 3 (cat.npz)`."""
        return self._source.label(step)

    def shapes(self) -> dict[str, ShapeRange]:
        """Per input the smallest, median and largest shape, for building profiles."""
        return {
            name: ShapeRange(
                *(
                    tuple(int(n) for n in reduce(np.array(shapes).reshape(len(shapes), -1)))
                    for reduce in (_minimum, _median, _maximum)
                )
            )
            for name, shapes in self._shapes.items()
        }

    def largest(self) -> Feed:
        """The feed with the most elements: what memory must be enough for."""
        sizes = [
            sum(int(np.prod(shapes[step], dtype=np.int64)) for shapes in self._shapes.values())
            for step in range(self._length)
        ]
        wanted = sizes.index(max(sizes))
        for step, raw in enumerate(self._kept if self._kept is not None else self._source):
            if step == wanted:
                return self._fit(raw, step)
        raise AssertionError("a reading is as long as the first one")

    def _read_once(self, progress: Progress) -> None:
        digest, kept, size = DataDigest(self.inputs), [], 0
        for step, raw in enumerate(self._source):
            feed = self._fit(raw, step)
            self._measure(feed, raw, step)
            digest.add(feed)
            for name, array in feed.items():
                self._shapes[name].append(array.shape)
            size += sum(array.nbytes for array in feed.values())
            if size <= _KEEP_BYTES:
                kept.append(feed)
            self._length = step + 1
            progress("read the data", self._length, 0)
        if not self._length:
            raise OnnxqError(f"{self.description} holds no sample", "give at least one")
        self._kept = kept if len(kept) == self._length else None
        self.digest = digest.hexdigest()
        self.count = getattr(self._source, "samples", digest.rows)

    def _fit(self, raw: Mapping[str, Array], step: int) -> Feed:
        where = f"{self.label(step)} of {self.description}"
        check_names(raw, self.inputs, where)
        return {spec.name: self._fit_array(spec, raw[spec.name], where) for spec in self.inputs}

    def _fit_array(self, spec: InputSpec, array: Array, where: str) -> Array:
        check_rank(spec, array.ndim, f"{spec.name!r} in {where}")
        for axis, (dim, size) in enumerate(zip(spec.shape, array.shape, strict=True)):
            if isinstance(dim, int) and dim != size:
                raise OnnxqError(
                    f"{spec.name!r} in {where} has the shape {list(array.shape)}, but the input "
                    f"{spec} fixes dimension {axis} at {dim}",
                    "give arrays of the shape that the model was exported with",
                )
        if array.dtype == spec.dtype:
            return array
        converted = _converted(array, spec.dtype)
        if converted is None:
            raise OnnxqError(
                f"{spec.name!r} in {where} is {array.dtype}, but the input {spec} is not",
                f"save it as {spec.dtype.name}",
            )
        swapped = "" if array.dtype.isnative else " of the other byte order"
        note = f"{spec.name}: {array.dtype.name}{swapped} converted to {spec.dtype.name}"
        if note not in self.notes:
            self.notes.append(note)
        return converted

    def _measure(self, feed: Feed, raw: Mapping[str, Array], step: int) -> None:
        """Keep what floats reach; refuse those that are not finite."""
        for name, array in feed.items():
            if not _is_float(array.dtype) or not array.size:
                continue
            finite = np.isfinite(array)
            if not finite.all():
                first = raw[name][~finite][0]
                what = "NaN" if np.isnan(first) else "infinity"
                if np.isfinite(first):
                    what = f"{first:.3g}, too large for {array.dtype.name},"
                raise OnnxqError(
                    f"{name!r} holds {what} in {self.label(step)} of {self.description}",
                    "take that sample out or repair it",
                )
            peak = max(float(array.max()), -float(array.min()))
            self.peaks[name] = max(peak, self.peaks.get(name, 0.0))


class DataDigest:
    """SHA-256 of rows as they come, and their number; the same however they are batched."""

    def __init__(self, inputs: Sequence[InputSpec]) -> None:
        self.rows = 0
        self._hashes = {spec.name: hashlib.sha256(str(spec.dtype).encode()) for spec in inputs}
        self._batched = {s.name for s in inputs if s.shape and not isinstance(s.shape[0], int)}

    def add(self, feed: Feed) -> None:
        batched = [feed[name].shape[0] for name in feed if name in self._batched]
        rows = batched[0] if batched and len(set(batched)) == 1 else 1
        self.rows += rows
        for name, array in feed.items():
            whole = name not in self._batched or array.shape[0] != rows
            for row in [array] * rows if whole else array:
                self._hashes[name].update(str(row.shape).encode())
                # Its bytes, not a copy of them: a sample may be large.
                plain = np.ascontiguousarray(row).reshape(-1).view(np.uint8)
                self._hashes[name].update(plain.data)

    def hexdigest(self) -> str:
        total = hashlib.sha256()
        for name in sorted(self._hashes):
            total.update(f"{name}={self._hashes[name].hexdigest()};".encode())
        return total.hexdigest()


def open_samples(
    source: Path | str,
    inputs: Sequence[InputSpec],
    *,
    batch: int | None = None,
    progress: Progress = silent,
) -> Samples:
    """The data at `source`, by its kind:

    - `FILE.npz`: an array per input, samples along the first dimension
    - a folder of `.npy`: the same, one array per input, named by the file
    - a folder of `.npz`: one sample each, fed as it is, in the order of the names
    - `FILE.json`: inputs as `polygraphy run --save-inputs` writes them
    - `FILE.py` or `FILE.py:FUNCTION`: Polygraphy's data loader script (`load_data` when not said)

    Args:
        inputs: the model's, from `Session.inputs`.
        batch: rows fed at a time where the model leaves it open; None: 1.

    Raises:
        OnnxqError: the data does not fit; one line says which array, which sample and why.
    """
    if batch is not None and batch < 1:
        raise OnnxqError(f"the batch is {batch}", "give 1 or more")
    found = _source(str(source), inputs, batch)
    samples = Samples(found, inputs, progress)
    if batch is not None and not isinstance(found, BatchArrays):
        samples.notes.append(f"the batch of {batch} changes nothing: {source} holds whole feeds")
    return samples


def _source(source: str, inputs: Sequence[InputSpec], batch: int | None) -> Source:
    path = Path(source)
    script, _, function = source.rpartition(":")
    if script.endswith(".py"):
        return LoaderScript(Path(script), function)
    try:
        path.stat()
    except FileNotFoundError:
        raise OnnxqError(f"{path} does not exist", "give the calibration data's path") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OnnxqError(
            f"cannot read the data {path}: {reason}", "give the calibration data's path"
        ) from None
    if path.is_dir():
        return _folder(path, inputs, batch)
    if path.suffix == ".py":
        return LoaderScript(path)
    if path.suffix == ".json":
        return polygraphy_json(path)
    if path.suffix == ".npz":
        return BatchArrays(ArrayFiles(path), inputs, batch)
    raise OnnxqError(
        f"{path} is no calibration data that onnxq reads",
        "give .npz, a folder of .npy or .npz, Polygraphy's .json, or a .py with load_data()",
    )


def _folder(path: Path, inputs: Sequence[InputSpec], batch: int | None) -> Source:
    arrays, samples = any(path.glob("*.npy")), any(path.glob("*.npz"))
    if arrays and samples:
        raise OnnxqError(
            f"{path} holds both .npy and .npz files",
            "keep one kind: .npy are whole inputs, .npz single samples",
        )
    if arrays:
        return BatchArrays(ArrayFiles(path), inputs, batch)
    if samples:
        return SampleFiles(path)
    raise OnnxqError(f"the folder {path} holds no .npy and no .npz file", "give the data's folder")


def _converted(array: Array, dtype: np.dtype[Any]) -> Array | None:
    """The array as `dtype` when both are floats, or whole numbers that all fit; else None."""
    if _is_float(array.dtype) and _is_float(dtype):
        with np.errstate(over="ignore"):  # what overflows is infinite, which the check names
            return np.asarray(array.astype(dtype))
    if array.dtype.kind in "biu" and dtype.kind in "iu":
        converted = array.astype(dtype)
        return converted if np.array_equal(converted, array) else None
    return None


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def _minimum(shapes: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(shapes.min(axis=0))


def _median(shapes: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(np.sort(shapes, axis=0)[len(shapes) // 2])


def _maximum(shapes: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(shapes.max(axis=0))
