"""What a layer reads behind layers already rounded, beside what it reads in full precision.

The model is run twice, piece by piece: each piece once for every sample, with its own weights and
with the rounded ones. What later pieces need waits in a temporary folder. All of it together costs
two forward passes, however many layers there are.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.data import Samples
from onnxq.calibrate.session import Device, open_session
from onnxq.calibrate.statistics import NotFiniteError, as_float32, finite_extremes
from onnxq.errors import OnnxqError
from onnxq.files import scratch
from onnxq.graph.segments import Segments
from onnxq.inputs import Moments

Array = NDArray[Any]


class Staged:
    """Runs the pieces in order; a context manager, whose temporary folder goes at its end."""

    def __init__(
        self,
        segments: Segments,
        samples: Samples,
        *,
        device: Device = "auto",
        threads: int | None = None,
    ) -> None:
        self._segments, self._samples = segments, samples
        self._device, self._threads = device, threads
        self._weights: dict[str, Array] = {}
        self._next = 0
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(scratch())
        self._full = _Run(self._folder / "full")
        self._rounded: _Run | None = None

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def replace(self, initializer: str, values: Array) -> None:
        """Give an initializer its rounded values, in its own type and layout, from here on."""
        if self._rounded is None:
            self._rounded = self._full.copy(self._folder / "rounded")
        self._weights[initializer] = values

    def moments(self, stop: str) -> Moments:
        """Of a stop, once; later ones must be asked for later.

        Raises:
            OnnxqError: a sample makes it NaN or infinite, or the model does not run.
        """
        index = self._segments.stops.index(stop, self._next)
        for passed in range(self._next, index):
            for _ in zip_longest(*self._passes(passed)):
                pass
        self._next = index + 1
        sums: list[Array] | None = None
        rows = 0
        runs = self._passes(index)
        # Both to their ends, where each lets go what nobody needs any more.
        for sample, values in enumerate(zip_longest(*runs)):
            both = [self._rows(v, stop, sample) for v in values]
            pairs = [(0, 0)] if len(both) == 1 else [(0, 0), (1, 1), (1, 0)]
            products = [both[i].T @ both[j] for i, j in pairs]
            sums = (
                products if sums is None else [s + p for s, p in zip(sums, products, strict=True)]
            )
            rows += len(both[0])
        assert sums is not None
        found = [s / np.float32(max(rows, 1)) for s in sums]
        return Moments(*found) if len(runs) > 1 else Moments(*(found * 3))

    def _passes(self, index: int) -> list[Iterator[Array]]:
        """The stop's values of each sample, in full precision and, once there is one, rounded."""
        runs = [self._pass(self._full, index, {})]
        if self._rounded is not None:
            runs.append(self._pass(self._rounded, index, self._weights))
        return runs

    def _rows(self, values: Array, stop: str, sample: int) -> Array:
        try:
            finite_extremes(values)
        except NotFiniteError as error:
            raise OnnxqError(
                f"the tensor {stop!r} is not finite in {self._samples.label(sample)}: {error}",
                "repair or leave out that sample",
            ) from error
        return np.ascontiguousarray(as_float32(values).reshape(-1, values.shape[-1]))

    def _pass(self, run: _Run, index: int, weights: Mapping[str, Array]) -> Iterator[Array]:
        """The stop's values of each sample; the frontier behind it takes the old one's place."""
        stop, frontier = self._segments.stops[index], self._segments.frontier(index)
        model = self._segments.piece(index, run.dtypes, weights)
        session = None
        if model is not None:
            session = open_session(
                model, folder=self._segments.folder, device=self._device, threads=self._threads
            )
        for sample, feed in enumerate(self._samples):
            known = _Known(run, sample, feed)
            made: dict[str, Array] = {}
            if session is not None:
                inputs = {spec.name: known[spec.name] for spec in session.inputs}
                names = list(session.output_names)
                made = dict(zip(names, session.run(names, inputs), strict=True))
            for name in frontier:
                if name in made:
                    run.put(name, sample, made[name])
            yield made[stop] if stop in made else known[stop]
        run.keep(frontier)


class _Known:
    """A sample's tensors by name: of its feed, or of the frontier."""

    def __init__(self, run: _Run, sample: int, feed: Mapping[str, Array]) -> None:
        self._run, self._sample, self._feed = run, sample, feed

    def __getitem__(self, name: str) -> Array:
        return self._feed[name] if name in self._feed else self._run.get(name, self._sample)


class _Run:
    """The frontier of one of the two runs: a file for each tensor of each sample."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self._files: dict[tuple[str, int], tuple[Path, tuple[int, ...]]] = {}
        self._count = 0

    def put(self, name: str, sample: int, values: Array) -> None:
        path = self._folder / str(self._count)
        self._count += 1
        try:
            path.write_bytes(np.ascontiguousarray(values).tobytes())
        except OSError as error:
            raise OnnxqError(
                f"cannot keep activations in {self._folder}: {error.strerror or error}",
                "set TMPDIR to a folder with more space, or give fewer samples",
            ) from error
        self._files[name, sample] = path, values.shape
        self.dtypes[name] = values.dtype

    def get(self, name: str, sample: int) -> Array:
        path, shape = self._files[name, sample]
        return np.fromfile(path, np.uint8).view(self.dtypes[name]).reshape(shape)

    def keep(self, names: Sequence[str]) -> None:
        """Drop all other tensors."""
        for key in [key for key in self._files if key[0] not in names]:
            self._files.pop(key)[0].unlink()
        self.dtypes = {name: dtype for name, dtype in self.dtypes.items() if name in names}

    def copy(self, folder: Path) -> _Run:
        """Another run that goes on from here. Files are never changed, so both may have them."""
        other = _Run(folder)
        other.dtypes, other._count = dict(self.dtypes), self._count
        for key, (path, shape) in self._files.items():
            link = folder / path.name
            try:
                os.link(path, link)
            except OSError:  # a file system without links
                shutil.copyfile(path, link)
            other._files[key] = link, shape
        return other
