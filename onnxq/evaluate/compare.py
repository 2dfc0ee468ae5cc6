"""Run models on the same samples and measure how far each is from the first, through Polygraphy.

One sample is in memory at a time. Models run side by side where they fit; where they do not, one
after the other, with the outputs of the first kept in a temporary folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.evaluate.comparison import Comparison, Row, Tolerances
from onnxq.evaluate.metrics import OutputError
from onnxq.evaluate.outputs import SaveOutputs, saving_outputs
from onnxq.evaluate.runners import Device, Model, Samples, any_model, runnable
from onnxq.evaluate.spool import Spool, spool
from onnxq.memory import available_memory, resident_memory
from onnxq.progress import Progress, silent

Array = NDArray[Any]
Outputs = dict[str, Array]


def compare(
    models: Mapping[str, Path | Model],
    samples: Samples,
    *,
    min_snr: float | None = None,
    min_cosine: float | None = None,
    max_abs_error: float | None = None,
    min_equal: float | None = None,
    outputs: Sequence[str] | None = None,
    device: Device = "auto",
    sequential: bool | None = None,
    save_outputs: Path | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Compare every model with the first one, output by output, over all samples.

    Args:
        models: label -> .onnx, engine (.plan, .engine; on a GPU), or a ready `Model`. The first
            is the reference.
        samples: feeds, in the reference's names, shapes and dtypes; floats are cast for a model
            whose inputs have another precision, and that is noted.
        min_snr, min_cosine, max_abs_error, min_equal: see `Tolerances`.
        outputs: outputs to compare; None = all of the reference's.
        sequential: True = one model in memory at a time; None = only if the reference took more
            memory than the others would find, which is then noted.
        save_outputs: keep all outputs in Polygraphy's RunResults JSON: one file if the path has a
            suffix, else a folder with a file a sample.

    Raises:
        OnnxqError: no sample, unreadable model, data that does not fit, or outputs whose shapes
            differ between models.
    """
    if len(models) < 2:
        raise OnnxqError("a comparison needs a reference and at least one other model")
    if not len(samples):
        raise OnnxqError("there is no sample to compare on")
    with ExitStack() as stack, spool() as kept, saving_outputs(save_outputs) as save:
        opened = [
            model if isinstance(model, Model) else _ready(stack, label, model, outputs, device)
            for label, model in models.items()
        ]
        run = _Run(opened, samples, outputs or (), kept, save, progress)
        if not run.side_by_side(sequential):
            run.one_after_the_other()
    return run.result(Tolerances(min_snr, min_cosine, max_abs_error, min_equal))


def _ready(
    stack: ExitStack, label: str, path: Path, outputs: Sequence[str] | None, device: Device
) -> Model:
    """The model at `path`; a simulated copy, kept as long as `stack`, where kernels are lacking."""
    usable, notes = stack.enter_context(runnable(path))
    model = any_model(label, usable, outputs, device)
    for note in notes:
        model.note(note)
    return model


class _Run:
    """The state of one comparison: error sums by (label, output), and what is in the spool."""

    def __init__(
        self,
        models: Sequence[Model],
        samples: Samples,
        wanted: Sequence[str],
        kept: Spool,
        save: SaveOutputs | None,
        progress: Progress,
    ) -> None:
        self.reference, *self.others = models
        self.samples, self.wanted = samples, wanted
        self.kept, self.save, self.progress = kept, save, progress
        self.sums: dict[tuple[str, str], OutputError] = {}
        self.remarks: list[str] = []
        self.done = 0

    def side_by_side(self, sequential: bool | None) -> bool:
        """Run the reference over all samples, and the others with it where they fit beside it.

        Returns False if they did not run; the reference's outputs are then in the spool.
        """
        before = resident_memory()
        together = sequential is False
        with ExitStack() as stack:
            stack.enter_context(self.reference)
            for index, feed in enumerate(self.samples):
                expected = self._expected(feed)
                if index == 0:
                    together = together or self._fits(resident_memory() - before, sequential)
                    for model in self.others if together else ():
                        stack.enter_context(model)
                if not together:
                    self.kept.put(self.reference.label, index, expected)
                    continue
                found = {self.reference.label: expected}
                for model in self.others:
                    actual = self._infer(model, feed)
                    self._measure(index, model, expected, actual)
                    if self.save:
                        found[model.label] = actual
                if self.save:
                    self.save(found)
        return together

    def one_after_the_other(self) -> None:
        """Run the others, each alone, against the reference's outputs in the spool."""
        for model in self.others:
            with model:
                for index, feed in enumerate(self.samples):
                    actual = self._infer(model, feed)
                    expected = self.kept.get(self.reference.label, index)
                    self._measure(index, model, expected, actual)
                    if self.save:
                        self.kept.put(model.label, index, actual)
        if self.save:
            labels = [model.label for model in (self.reference, *self.others)]
            for index in range(len(self.samples)):
                self.save({label: self.kept.get(label, index) for label in labels})

    def _expected(self, feed: Mapping[str, Array]) -> Outputs:
        found = self._infer(self.reference, feed)
        for name in self.wanted:
            if name not in found:
                raise OnnxqError(
                    f"{self.reference.label!r} has no output {name!r}",
                    f"it gives: {', '.join(found)}",
                )
        return {name: found[name] for name in self.wanted or found}

    def _infer(self, model: Model, feed: Mapping[str, Array]) -> Outputs:
        found = model.infer(feed)
        self.done += 1
        total = len(self.samples) * (1 + len(self.others))
        self.progress(f"compare: {model.label}", self.done, total)
        return found

    def _fits(self, taken: int, sequential: bool | None) -> bool:
        """True if each of the others may take what the reference took."""
        available = available_memory()
        if sequential is None and (available is None or taken * len(self.others) < available):
            return True
        if sequential is None and available is not None:
            self.remarks.append(
                f"models were run one after the other: the reference took {taken / 1e9:.1f} GB, "
                f"{available / 1e9:.1f} GB were left"
            )
        return False

    def _measure(self, index: int, model: Model, expected: Outputs, actual: Outputs) -> None:
        for name, reference in expected.items():
            sums = self.sums.setdefault((model.label, name), OutputError())
            candidate = actual.get(name)
            if candidate is None:
                continue
            if reference.shape != candidate.shape:
                raise OnnxqError(
                    f"output {name!r}, sample {index}: {self.reference.label!r} gives "
                    f"{list(reference.shape)}, {model.label!r} gives {list(candidate.shape)}",
                    "models of different shapes cannot be compared",
                )
            sums.add(reference, candidate)
        for name in actual.keys() - expected.keys():
            model.note(f"output {name!r} is not in {self.reference.label!r} and is not compared")

    def result(self, tolerances: Tolerances) -> Comparison:
        """The rows, in the order of the models and of the reference's outputs."""
        rows = tuple(
            Row(label, output, found, tolerances.failures(found))
            for (label, output), found in sorted(self.sums.items(), key=self._order)
        )
        if all(row.found.error is None for row in rows):
            raise OnnxqError(
                f"no output of {self.reference.label!r} is in any other model",
                "compare models that give the same outputs",
            )
        notes = {model.label: tuple(model.notes) for model in (self.reference, *self.others)}
        return Comparison(
            self.reference.label, rows, len(self.samples), tolerances, notes, tuple(self.remarks)
        )

    def _order(self, item: tuple[tuple[str, str], OutputError]) -> int:
        return [model.label for model in self.others].index(item[0][0])
