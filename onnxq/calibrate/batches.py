"""Arrays whose first dimension counts samples, cut into the steps that a model takes.

Each input takes its own number of rows a step: its first dimension where the model fixes it, the
batch size where not. With a batch of 4, seven samples are a step of 4 and a step of 3. What has no
sample dimension is given again at every step: a 0-dim array (SDXL's `timestep`), and an array
that has just the rows of one step of an input whose first dimension is fixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from onnxq.calibrate.session import InputSpec
from onnxq.calibrate.sources import ArrayFiles, ArrayStream
from onnxq.errors import OnnxqError

Array = NDArray[Any]


@dataclass(frozen=True)
class _Cut:
    """How one array becomes steps: `rows` a step of `total`, or whole at every step (rows 0)."""

    rows: int
    total: int
    scalar: bool = False

    def steps(self, fixed: bool) -> int:
        return self.total // self.rows if fixed else -(-self.total // self.rows)


class BatchArrays:
    """The steps that one .npz, or a folder of .npy, makes for these inputs."""

    def __init__(
        self, files: ArrayFiles, inputs: Sequence[InputSpec], batch: int | None = None
    ) -> None:
        self.files, self.inputs = files, inputs
        self.batch = batch or _only_fixed_batch(inputs) or 1
        self.notes: list[str] = []
        with ExitStack() as stack:
            streams = files.open(stack)
        check_names(streams, inputs, str(files.path))
        self.cuts = {spec.name: self._cut(spec, streams[spec.name], batch) for spec in inputs}
        self.steps = self._agree()
        self.description = f"{self.samples} samples in {files.path}"

    @property
    def samples(self) -> int:
        """How many rows there are of the inputs that are cut; 1 when none is."""
        return max((min(c.total, c.rows * self.steps) for c in self.cuts.values()), default=1) or 1

    def _cut(self, spec: InputSpec, stream: ArrayStream, batch: int | None) -> _Cut:
        rank = len(stream.shape)
        if not spec.shape and rank == 1:
            return _Cut(1, stream.shape[0], scalar=True)
        check_rank(spec, rank, stream.where)
        if not spec.shape:
            return _Cut(0, 0)
        first, total = spec.shape[0], stream.shape[0]
        if not total:
            raise OnnxqError(
                f"{stream.where} holds no sample: its shape is {stream.shape}",
                "save at least one along the first dimension",
            )
        if not isinstance(first, int):
            return _Cut(self.batch, total)
        if batch is not None and batch != first:
            raise OnnxqError(
                f"the batch is to be {batch}, but the input {spec} takes {first} rows at a time",
                f"leave the batch out or give {first}",
            )
        if total < first:
            raise OnnxqError(
                f"{stream.where} has {total} rows, but the input {spec} takes {first} at a time",
                f"give a multiple of {first} samples",
            )
        return _Cut(first, total)

    def _agree(self) -> int:
        """The number of steps that all inputs make; arrays of a single step are repeated."""
        fixed = {s.name: bool(s.shape) and isinstance(s.shape[0], int) for s in self.inputs}
        steps = {n: c.steps(fixed[n] or c.scalar) for n, c in self.cuts.items() if c.rows}
        most = max(steps.values(), default=1)
        for name, cut in self.cuts.items():
            if name in steps and steps[name] == 1 < most and fixed[name] and cut.total == cut.rows:
                self.cuts[name] = _Cut(0, 0)
        dynamic = {c.total for n, c in self.cuts.items() if c.rows and not fixed[n]}
        if len({steps[n] for n, c in self.cuts.items() if c.rows}) > 1 or len(dynamic) > 1:
            counts = ", ".join(f"{n} {c.total}" for n, c in self.cuts.items() if c.rows)
            raise OnnxqError(
                f"the arrays in {self.files.path} hold different numbers of samples: {counts}",
                "the first dimension counts samples and must be the same for every input"
                + (" (or use the batch 1)" if self.batch > 1 else ""),
            )
        for name, cut in self.cuts.items():
            if cut.rows and fixed[name] and cut.total % cut.rows:
                self.notes.append(
                    f"the last {cut.total % cut.rows} of {cut.total} samples do not fill the "
                    f"{cut.rows} rows that the input {name} takes at a time; they are left out"
                )
        return most

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        with ExitStack() as stack:
            streams = self.files.open(stack)
            whole = {name: streams[name].all() for name, cut in self.cuts.items() if not cut.rows}
            by_row = {name: _rows(streams[name]) for name in self.cuts if name not in whole}
            for step in range(self.steps):
                feed = dict(whole)
                for name, take in by_row.items():
                    cut = self.cuts[name]
                    count = min(cut.rows, cut.total - step * cut.rows)
                    rows = take(step * cut.rows, count)
                    feed[name] = rows.reshape(rows.shape[1:]) if cut.scalar else rows
                yield feed

    def label(self, step: int) -> str:
        rows = max((cut.rows for cut in self.cuts.values()), default=1) or 1
        last = min((step + 1) * rows, self.samples) - 1
        return f"sample {step * rows}" + (f" to {last}" if last > step * rows else "")


def _rows(stream: ArrayStream) -> Any:
    """take(start, count) -> rows, in order. Column-major arrays have no rows: read whole."""
    if stream.by_column and len(stream.shape) > 1:
        array = stream.all()
        return lambda start, count: array[start : start + count]
    return lambda _, count: stream.rows(count)


def _only_fixed_batch(inputs: Sequence[InputSpec]) -> int | None:
    """The first dimension that the model fixes, when all inputs that fix one agree."""
    fixed = {spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)}
    (only,) = fixed if len(fixed) == 1 else (None,)
    return only if isinstance(only, int) else None


def check_names(given: Mapping[str, Any], inputs: Sequence[InputSpec], where: str) -> None:
    """Raise OnnxqError unless `given` has the model's input names, all and only."""
    names = [spec.name for spec in inputs]
    missing = [name for name in names if name not in given]
    unknown = [name for name in given if name not in names]
    parts = [f"does not have the input {name!r}" for name in missing[:3]]
    parts += [f"has {name!r}, which is no input" for name in unknown[:3]]
    if parts:
        raise OnnxqError(
            f"{where} {' and '.join(parts)} of the model",
            f"its inputs are {'; '.join(map(str, inputs))}",
        )


def check_rank(spec: InputSpec, rank: int, where: str) -> None:
    """Raise OnnxqError unless an array of `rank` can be this input."""
    if rank != len(spec.shape):
        raise OnnxqError(
            f"{where} has {rank} dimensions, but the input {spec} has {len(spec.shape)}",
            "save each input as the model takes it, samples along the first dimension",
        )
