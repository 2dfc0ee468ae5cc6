"""Whether samples are of the class they were asked for, as a classifier sees them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.session import open_session
from onnxq.errors import OnnxqError
from onnxq.evaluate.conditions import LABEL, Conditions
from onnxq.evaluate.runners import Device
from onnxq.evaluate.shares import paired, wilson

Array = NDArray[Any]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Match:
    """How many of `samples` samples a classifier sees as the class they were asked for.

    Attributes:
        right, reference_right: of the model, of the original.
        low, high: 95 % interval of the model's share (Wilson 1927).
        difference: the model's share less the original's.
        difference_low, difference_high: its 95 % interval, from paired samples (Agresti and Min
            2005).
        agreement: share of samples that are seen as the same class, right or wrong.
    """

    samples: int
    right: int
    reference_right: int
    low: float
    high: float
    difference: float
    difference_low: float
    difference_high: float
    agreement: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        shares = {"share": self.right / self.samples}
        shares["reference_share"] = self.reference_right / self.samples
        return {**shares, **asdict(self)}

    def lines(self) -> list[str]:
        """The figures as plain text."""
        return [
            f"class as asked: {_percent(self.right / self.samples)} "
            f"({self.right} of {self.samples}), 95 % interval {_percent(self.low)} to "
            f"{_percent(self.high)}; the original {_percent(self.reference_right / self.samples)}",
            f"difference {100 * self.difference:+.2f} points, 95 % interval "
            f"{100 * self.difference_low:+.2f} to {100 * self.difference_high:+.2f}; "
            f"same class at {_percent(self.agreement)} of samples",
        ]


class Classifier:
    """An ONNX model: samples in, a score for each class out."""

    def __init__(self, model: Path, asked: Conditions, device: Device = "auto") -> None:
        """Open it.

        Raises:
            OnnxqError: unreadable, more than one input, or conditions without labels.
        """
        if asked.labels is None:
            raise OnnxqError(
                "a classifier needs to know what was asked for, and the conditions hold no labels",
                f"add an array {LABEL!r}, the class of each condition",
            )
        self._path, self._session = model, open_session(model, device=device)
        if len(self._session.inputs) != 1 or len(self._session.outputs) != 1:
            raise OnnxqError(
                f"{model} is no classifier: {len(self._session.inputs)} inputs and "
                f"{len(self._session.outputs)} outputs",
                "one of each: samples, and scores of classes",
            )
        self._most = int(asked.labels.max())

    def classes(self, samples: Array) -> Labels:
        """The likeliest class of each sample [samples, ...]; -1 where a score is NaN."""
        (spec,) = self._session.inputs
        first = spec.shape[0] if spec.shape else None
        each = first if isinstance(first, int) else 64
        found = []
        for start in range(0, len(samples), each):
            rows = np.arange(start, min(start + each, len(samples)))
            if isinstance(first, int):
                rows = np.arange(start, start + each).clip(max=len(samples) - 1)
            (scores,) = self._session.run(None, {spec.name: samples[rows].astype(spec.dtype)})
            if scores.ndim != 2 or scores.shape[0] != len(rows) or scores.shape[1] <= self._most:
                raise OnnxqError(
                    f"{self._path} gives scores of {list(scores.shape)} for {len(rows)} samples, "
                    f"and the labels go up to {self._most}",
                    "a classifier gives [samples, classes]",
                )
            broken = np.isnan(scores).any(axis=1)
            chosen = np.where(broken, -1, scores.argmax(axis=1))
            found.append(chosen[: len(samples) - start])
        return np.concatenate(found).astype(np.int64)


def match(classifier: Classifier, found: Array, expected: Array, labels: Labels) -> Match:
    """Both models' samples [samples, ...] against the classes they were asked for."""
    ours, theirs = classifier.classes(found), classifier.classes(expected)
    right, before = ours == labels, theirs == labels
    gained, lost = int((right & ~before).sum()), int((before & ~right).sum())
    count = len(labels)
    return Match(
        count,
        int(right.sum()),
        int(before.sum()),
        *wilson(int(right.sum()), count),
        (gained - lost) / count,
        *paired(gained, lost, count),
        float((ours == theirs).mean()),
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %" if math.isfinite(share) else "none"
