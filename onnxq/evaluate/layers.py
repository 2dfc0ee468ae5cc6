"""Where the error enters: the tensors inside two models, compared in the order they are computed.

Both models are run with inner tensors as outputs, a group of tensors at a time, so that what is
held stays under a memory budget. The noise of a tensor is its squared error over its squared
reference (the inverse of the SNR as a ratio); what a layer *adds* is the noise of what it gives
less that of the noisiest tensor it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from onnxq.evaluate.metrics import FloatError, is_float, jsonable
from onnxq.evaluate.runners import Device, Feed, Model, Samples, onnx_model
from onnxq.evaluate.tables import decibels, table
from onnxq.progress import Progress, silent

Array = NDArray[Any]

# Gives a serialized model whose outputs are the tensors named, and the folder of its weights.
MakeModel = Callable[[Sequence[str]], tuple[bytes, Path]]

_FIRST_GROUP = 16
_WORST = 15


@dataclass(frozen=True)
class LayerError:
    """One tensor of the candidate against the reference's of the same name.

    Attributes:
        producer: the node it comes from, as the caller names it.
        noise_in: noise of the noisiest watched tensor that its layer takes; 0 if it takes none.
    """

    tensor: str
    producer: str
    error: FloatError
    noise_in: float | None

    @property
    def added(self) -> float:
        """Noise out less noise in; +inf where NaN or inf first appear, 0 behind that."""
        if self.error.noise is None or self.noise_in is None:
            return 0.0 if self.noise_in is None else math.inf
        if math.isinf(self.error.noise):
            return 0.0 if math.isinf(self.noise_in) else math.inf
        return self.error.noise - self.noise_in

    @property
    def snr_in(self) -> float | None:
        """`noise_in` in dB; +inf = exact inputs."""
        if not self.noise_in:
            return None if self.noise_in is None else math.inf
        return -10.0 * math.log10(self.noise_in) if math.isfinite(self.noise_in) else -math.inf

    def as_dict(self) -> dict[str, Any]:
        return {
            "tensor": self.tensor,
            "producer": self.producer,
            "snr_db": jsonable(self.error.snr),
            "snr_in_db": jsonable(self.snr_in),
            "added_noise": jsonable(self.added),
            "cosine": jsonable(self.error.cosine),
            "max_abs_error": self.error.max_error,
            "nan_or_inf": self.error.broken,
        }


@dataclass(frozen=True)
class LayerErrors:
    """All watched tensors in the order they are computed, over `samples` samples."""

    rows: tuple[LayerError, ...]
    samples: int
    notes: tuple[str, ...] = ()

    def worst(self, count: int = _WORST) -> list[LayerError]:
        """The tensors whose layers add most, worst first; those that add nothing are left out."""
        found = [row for row in self.rows if row.added > 0]
        return sorted(found, key=lambda row: -row.added)[:count]

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the tensors in the order they are computed."""
        return {
            "samples": self.samples,
            "tensors": [row.as_dict() for row in self.rows],
            "notes": list(self.notes),
        }

    def lines(self, count: int = _WORST) -> list[str]:
        """The worst jumps as a table in plain text."""
        worst = self.worst(count)
        title = f"where the error enters: {len(worst)} of {len(self.rows)} tensors, worst first"
        body = [
            [
                row.tensor,
                row.producer,
                decibels(row.snr_in),
                decibels(row.error.snr),
                f"{100 * row.added:.3g} %" if math.isfinite(row.added) else "all",
            ]
            for row in worst
        ]
        head = ["tensor", "made by", "SNR dB in", "out", "noise added"]
        return [title, *table(head, body), *(f"note: {note}" for note in self.notes)]


def per_layer(
    reference: MakeModel,
    candidate: MakeModel,
    tensors: Sequence[str],
    samples: Samples,
    *,
    inputs_of: Mapping[str, Sequence[str]] | None = None,
    producers: Mapping[str, str] | None = None,
    count: int = 1,
    memory: int = 1 << 30,
    device: Device = "auto",
    progress: Progress = silent,
) -> LayerErrors:
    """Compare inner tensors of two models on the first `count` samples.

    Args:
        tensors: names that both models have, in the order they are computed.
        inputs_of: tensor -> the nearest tensors before it that are in `tensors`; None = each
            tensor is compared with the one before it in the list.
        producers: tensor -> what to call the layer that gives it.
        memory: bytes of outputs to hold at a time, aimed at; the models come on top.

    Raises:
        OnnxqError: a model does not load or run, or lacks a tensor.
    """
    watch = _Watch(list(islice(samples, count)), device, memory)
    sums: dict[str, FloatError] = {}
    position, size = 0, _FIRST_GROUP
    while position < len(tensors):
        progress("compare inside", position, len(tensors))
        group = tensors[position : position + size]
        sums.update(watch.compare(reference(group), candidate(group), group))
        position += len(group)
        size = watch.next_size(len(group))
    progress("compare inside", len(tensors), len(tensors))
    if inputs_of is None:
        inputs_of = {name: (before,) for before, name in zip(sums, list(sums)[1:], strict=False)}
    rows = tuple(
        LayerError(name, (producers or {}).get(name, ""), error, _noisiest(sums, inputs_of, name))
        for name, error in sums.items()
    )
    return LayerErrors(rows, len(watch.feeds), tuple(dict.fromkeys(watch.notes)))


def _noisiest(
    sums: Mapping[str, FloatError], inputs_of: Mapping[str, Sequence[str]], name: str
) -> float | None:
    noises = [sums[before].noise for before in inputs_of.get(name, ()) if before in sums]
    known = [noise for noise in noises if noise is not None]
    return None if len(known) < len(noises) else max(known, default=0.0)


@dataclass
class _Watch:
    """Runs groups of watched tensors, one model in memory at a time."""

    feeds: list[Feed]
    device: Device
    memory: int
    held: int = 0  # bytes of outputs the last group needed at once
    notes: list[str] = field(default_factory=list)

    def compare(
        self, reference: tuple[bytes, Path], candidate: tuple[bytes, Path], group: Sequence[str]
    ) -> dict[str, FloatError]:
        """Error sums of the floating-point tensors of `group`, in its order."""
        expected = list(self._outputs("reference", reference, group))
        sums: dict[str, FloatError] = {}
        for want, got in zip(expected, self._outputs("candidate", candidate, group), strict=True):
            self.held = sum(_size(outputs) for outputs in (*expected, got))
            for name in group:
                if not is_float(want[name]):
                    continue
                if want[name].shape != got[name].shape:
                    self.notes.append(
                        f"tensor {name!r} is {list(want[name].shape)} in the reference and "
                        f"{list(got[name].shape)} in the candidate: not compared"
                    )
                    continue
                sums.setdefault(name, FloatError()).add(want[name], got[name])
        return sums

    def _outputs(
        self, label: str, made: tuple[bytes, Path], group: Sequence[str]
    ) -> Iterator[dict[str, Array]]:
        serialized, folder = made
        model: Model = onnx_model(
            label, serialized, folder=folder, outputs=group, device=self.device
        )
        with model:
            for feed in self.feeds:
                yield model.infer(feed)
        self.notes.extend(f"{label}: {note}" for note in model.notes)

    def next_size(self, size: int) -> int:
        """How many tensors to watch next: half of what would fill the budget at the last mean."""
        fitting = size * self.memory // (2 * self.held) if self.held else 4 * size
        return max(1, min(4 * size, fitting))


def _size(outputs: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in outputs.values())
