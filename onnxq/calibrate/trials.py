"""What the model's outputs lose with some of its layers rounded: one session, a run a choice."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.data import Feed, Samples
from onnxq.calibrate.session import Device, InputSpec, open_session
from onnxq.calibrate.statistics import is_float
from onnxq.errors import OnnxqError

_OUTPUT_BYTES = 32 << 20
_MOST = 4
_LEAST_LENGTH = 64


class Trials:
    """Runs the model of `graph.switches.with_switches` beside the original.

    Attributes:
        sizes: elements each layer gives, over all samples that are run.
        runs: how often the model was run over them.
    """

    def __init__(
        self,
        original: tuple[bytes, Path],
        switched: tuple[bytes, Path],
        samples: Samples,
        names: tuple[str, str],
        device: Device = "auto",
    ) -> None:
        """
        Args:
            samples: as many are run as have outputs of 32 MB, 4 at most, spread over them all; of
                a single one with larger outputs the beginning, where its inputs are sequences.
            names: of the switches' input and the sizes' output.
        """
        self.runs, self._switches = 0, names[0]
        session = open_session(original[0], folder=original[1], device=device)
        self._feeds, wanted = _chosen(session, samples)
        del session
        self._session = open_session(switched[0], folder=switched[1], device=device)
        floats = [i for i, array in enumerate(wanted[0]) if is_float(array.dtype)]
        if not floats:
            raise OnnxqError(
                "the model has no floating-point output to measure an error of",
                "leave out --keep-worst, --keep-flops and --snr; name layers with --rule",
            )
        self._names = [self._session.output_names[i] for i in floats]
        self._wanted = [[w[i].astype(np.float32) for i in floats] for w in wanted]
        self._powers = [
            sum(float(np.vdot(w[i], w[i])) for w in self._wanted) or 1.0 for i in range(len(floats))
        ]
        self._count = next(s.shape[0] for s in self._session.inputs if s.name == names[0])
        self.sizes = self._measured(names[1])

    def error(self, layers: Collection[int]) -> float:
        """Squared error of the outputs over their power, their mean, with these layers rounded."""
        self.runs += 1
        errors = [0.0] * len(self._names)
        for feed, wanted in zip(self._feeds, self._wanted, strict=True):
            found = self._session.run(self._names, {**feed, self._switches: self._choice(layers)})
            for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
                difference = (one.astype(np.float32) - other).reshape(-1)
                errors[i] += float(np.dot(difference, difference))
        shares = [error / power for error, power in zip(errors, self._powers, strict=True)]
        return float(np.nan_to_num(np.mean(shares), nan=np.inf))

    def _measured(self, name: str) -> NDArray[np.int64]:
        total = np.zeros(int(self._count or 0), np.int64)
        for feed in self._feeds:
            total += self._session.run([name], {**feed, self._switches: self._choice(())})[0]
        return total

    def _choice(self, layers: Collection[int]) -> NDArray[np.bool_]:
        chosen = np.zeros(int(self._count or 0), np.bool_)
        chosen[list(layers)] = True
        return chosen


def _chosen(session: Any, samples: Samples) -> tuple[list[Feed], Sequence[list[Any]]]:
    """Feeds spread over the samples, and the outputs in full precision."""
    feeds = iter(samples)
    first = next(feeds)
    outputs = session.run(None, first)
    taken = sum(array.nbytes for array in outputs)
    if taken > _OUTPUT_BYTES:
        first = beginning(session.inputs, first, _OUTPUT_BYTES / taken)
        return [first], [session.run(None, first)]
    count = int(min(max(_OUTPUT_BYTES // max(1, taken), 1), _MOST, len(samples)))
    picked = {round(i * len(samples) / count) for i in range(1, count)}
    others = [feed for step, feed in enumerate(feeds, 1) if step in picked]
    return [first, *others], [outputs, *(session.run(None, feed) for feed in others)]


def beginning(inputs: Sequence[InputSpec], feed: Feed, share: float) -> Feed:
    """A share of a sequence, at least 64 of it; all where the inputs are not sequences of a length.

    They are if the second axis of each is open, under one name.
    """
    axes = {spec.shape[1] if len(spec.shape) > 1 else None for spec in inputs}
    lengths = {feed[spec.name].shape[1] for spec in inputs if feed[spec.name].ndim > 1}
    (axis,) = axes if len(axes) == 1 else (None,)
    if not isinstance(axis, str) or not axis or len(lengths) != 1:
        return feed
    length = max(round(share * lengths.pop()), _LEAST_LENGTH)
    return {name: array[:, :length] for name, array in feed.items()}
