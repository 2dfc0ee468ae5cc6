"""What a layer reads behind layers already rounded, beside what it reads in full precision.

The model is run twice, piece by piece: each piece once for every sample, with its own weights and
with the rounded ones. What later pieces need waits in a temporary folder. All of it together costs
two forward passes, however many layers there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import zip_longest
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.data import Samples
from onnxq.calibrate.frontier import Frontier
from onnxq.calibrate.patches import Patches
from onnxq.calibrate.session import Device, open_session
from onnxq.calibrate.statistics import Gram, NotFiniteError, make
from onnxq.errors import OnnxqError
from onnxq.files import scratch
from onnxq.graph.segments import Segments
from onnxq.inputs import Moments, Parts

Array = NDArray[Any]
_HINT = "set TMPDIR to a folder with more space, or give fewer samples"


class Staged:
    """Runs the pieces in order; a context manager, whose temporary folder goes at its end.

    Args:
        forms: by stop, the statistics that its readers ask for: `gram` where nothing is said, or
            `patches:...`.
        known: gives X^T X / rows [groups, K, K] of a stop in full precision, by the statistic's
            name, where it is summed already; else None.
    """

    def __init__(
        self,
        segments: Segments,
        samples: Samples,
        forms: Mapping[str, Iterable[str]] = {},
        *,
        device: Device = "auto",
        threads: int | None = None,
        known: Callable[[str, str], Array | None] = lambda stop, form: None,
    ) -> None:
        self._forms, self._known = forms, known
        self._segments, self._samples = segments, samples
        self._device, self._threads = device, threads
        self._weights: dict[str, Array] = {}
        self._next = 0
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(scratch())
        self._full = Frontier(self._folder / "full", _HINT)
        self._rounded: Frontier | None = None

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def replace(self, initializer: str, values: Array) -> None:
        """Give an initializer its rounded values, in its own type and layout, from here on."""
        if self._rounded is None:
            self._rounded = self._full.copy(self._folder / "rounded")
        self._weights[initializer] = values

    def moments(self, stop: str) -> dict[str, Parts]:
        """Of a stop, once, by statistic; later ones must be asked for later.

        Raises:
            OnnxqError: a sample makes it NaN or infinite, or the model does not run.
        """
        index = self._segments.stops.index(stop, self._next)
        for passed in range(self._next, index):
            for _ in zip_longest(*self._passes(passed)):
                pass
        self._next = index + 1
        forms = [_Form(name, self._known(stop, name)) for name in self._forms.get(stop, ("gram",))]
        runs, reached = self._passes(index), False
        # Both to their ends, where each lets go what nobody needs any more.
        for sample, values in enumerate(zip_longest(*runs)):
            for form in forms:
                self._update(form, values, stop, sample)
            if len(values) > 1:
                reached = reached or not np.array_equal(values[0], values[1])
        return {form.name: form.parts(reached) for form in forms}

    def _passes(self, index: int) -> list[Iterator[Array]]:
        """The stop's values of each sample, in full precision and, once there is one, rounded."""
        runs = [self._pass(self._full, index, {})]
        if self._rounded is not None:
            runs.append(self._pass(self._rounded, index, self._weights))
        return runs

    def _update(self, form: _Form, values: Sequence[Array], stop: str, sample: int) -> None:
        try:
            form.update(values)
        except NotFiniteError as error:
            raise OnnxqError(
                f"the tensor {stop!r} is not finite in {self._samples.label(sample)}: {error}",
                "repair or leave out that sample",
            ) from error

    def _pass(self, run: Frontier, index: int, weights: Mapping[str, Array]) -> Iterator[Array]:
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


class _Form:
    """The moments of a stop as one statistic takes them.

    Args:
        full: what it has found in full precision already, if it has.
    """

    def __init__(self, name: str, full: Array | None) -> None:
        self.name, self._known = name, full
        self._own = tuple(cast("Gram | Patches", make(name)[name]) for _ in range(2))
        self._cross: dict[int, _Cross] = {}
        self._rows = 0

    def update(self, values: Sequence[Array]) -> None:
        """One sample's values in full precision and, once there are some, behind rounded layers."""
        self._rows += math.prod(values[0].shape[:-1])
        for i, each in enumerate(values):
            if i > 0 or self._known is None:
                self._own[i].update(each)
        if len(values) > 1:
            full, rounded = (own.rows(each) for own, each in zip(self._own, values, strict=True))
            for (group, left), (_, right) in zip(rounded, full, strict=True):
                self._cross.setdefault(group, _Cross()).update(left, right)

    def parts(self, reached: bool) -> Parts:
        """The moments; one thing three times where no layer rounded so far lies before."""
        full = self._own[0].matrices if self._known is None else self._known
        patches = isinstance(self._own[0], Patches)
        rows = 0 if patches else self._rows
        if not reached:
            return tuple(Moments(H, H, H, patches, rows) for H in full)
        rounded = self._own[1].matrices
        found = zip(
            full, rounded, (self._cross[g].matrix for g in sorted(self._cross)), strict=True
        )
        return tuple(Moments(*each, patches, rows) for each in found)


class _Cross:
    """Y^T X, summed over rows."""

    def __init__(self) -> None:
        self._sum: Array | None = None
        self._rows = 0

    def update(self, left: Array, right: Array) -> None:
        from scipy.linalg.blas import sgemm

        y, x = np.ascontiguousarray(left), np.ascontiguousarray(right)
        # BLAS counts columns first: transposed, as they lie, these are x^T and y^T.
        self._sum = sgemm(1.0, x.T, y.T, 1.0, self._sum, trans_b=1, overwrite_c=1)
        self._rows += len(y)

    @property
    def matrix(self) -> Array:
        """Divided by the rows."""
        assert self._sum is not None
        return np.asarray(self._sum.T / np.float32(max(self._rows, 1)))


class _Known:
    """A sample's tensors by name: of its feed, or of the frontier."""

    def __init__(self, run: Frontier, sample: int, feed: Mapping[str, Array]) -> None:
        self._run, self._sample, self._feed = run, sample, feed

    def __getitem__(self, name: str) -> Array:
        return self._feed[name] if name in self._feed else self._run.get(name, self._sample)
