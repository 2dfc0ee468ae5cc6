"""A diffusion model in ONNX: noisy samples and their timestep in, what it predicts for them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.session import InputSpec, open_session
from onnxq.calibrate.steps import INPUTS as TIMESTEPS
from onnxq.errors import OnnxqError
from onnxq.evaluate.runners import Device, runnable

Array = NDArray[Any]

SAMPLE = "sample"


class Ports:
    """Which input of a diffusion model is what.

    Attributes:
        sample, timestep: the specs of the two that sampling changes.
        others: the specs of its conditions, by name.
    """

    def __init__(self, inputs: Sequence[InputSpec], path: Path) -> None:
        """Tell the inputs by their names.

        Raises:
            OnnxqError: no sample with rows and a size, or no timestep.
        """
        specs = {spec.name: spec for spec in inputs}
        step = next((name for name in TIMESTEPS if name in specs), None)
        if SAMPLE not in specs or step is None or len(specs[SAMPLE].shape) < 2:
            raise OnnxqError(
                f"{path} has no inputs {SAMPLE!r} and {TIMESTEPS[0]!r}, so it is no diffusion model"
                " onnxq can sample from",
                f"its inputs are: {'; '.join(map(str, inputs))}",
            )
        self.sample, self.timestep = specs.pop(SAMPLE), specs.pop(step)
        self.others = specs
        self._path = path

    def size(self, given: tuple[int, ...] | None) -> tuple[int, ...]:
        """A sample's size without its rows: the model's where it is fixed, else the one given.

        Raises:
            OnnxqError: neither, or one that is not the model's.
        """
        own = self.sample.shape[1:]
        if given is None:
            given = tuple(dim for dim in own if isinstance(dim, int))
            if len(given) < len(own):
                raise OnnxqError(
                    f"{self._path} leaves the size of a sample open: {self.sample}",
                    "give --size, such as 4x128x128, or captures as --conditions",
                )
        if len(given) != len(own) or any(
            isinstance(want, int) and want != got for want, got in zip(own, given, strict=False)
        ):
            size = "x".join(map(str, given))
            raise OnnxqError(f"{self._path} takes {self.sample}, not samples of {size}")
        return given


class Denoiser:
    """Predicts for any number of rows, in as many runs as the model's own batch asks for."""

    def __init__(self, model: Path, device: Device = "auto", name: Path | None = None) -> None:
        """Open `model`; errors speak of `name` where `model` stands for it."""
        self._path = name or model
        self._session = open_session(model, device=device)
        self._ports = Ports(self._session.inputs, self._path)
        self._output = self._prediction()

    @property
    def notes(self) -> list[str]:
        """How the session had to be opened."""
        return list(self._session.notes)

    def predict(self, samples: Array, timestep: int, conditions: Mapping[str, Array]) -> Array:
        """What the model gives for samples [rows, ...] and the conditions of each, float32.

        Raises:
            OnnxqError: conditions of another shape than the model's, or a model that fails or
                gives something of another shape than its samples.
        """
        fixed = self._ports.sample.shape[0]
        each = fixed if isinstance(fixed, int) and fixed > 0 else len(samples)
        found = []
        for start in range(0, len(samples), each):
            rows = np.arange(start, start + each).clip(max=len(samples) - 1)  # the last one again
            feed = {self._ports.sample.name: _cast(samples[rows], self._ports.sample)}
            feed[self._ports.timestep.name] = self._timestep(timestep, each)
            for name, spec in self._ports.others.items():
                feed[name] = _cast(conditions[name][rows], spec)
            (predicted,) = self._session.run([self._output], feed)
            found.append(predicted[: len(samples) - start].astype(np.float32))
        whole = np.concatenate(found)
        if whole.shape != samples.shape:
            raise OnnxqError(
                f"{self._path}: output {self._output!r} is {list(whole.shape)} for samples "
                f"{list(samples.shape)}",
                "a model that predicts variances too is not supported",
            )
        return whole

    def _timestep(self, timestep: int, rows: int) -> Array:
        spec = self._ports.timestep
        shape = tuple(dim if isinstance(dim, int) else rows for dim in spec.shape)
        return np.full(shape, timestep, spec.dtype)

    def _prediction(self) -> str:
        names = list(self._session.output_names)
        if len(names) > 1 and "out_sample" in names:
            return "out_sample"
        if len(names) != 1:
            raise OnnxqError(
                f"{self._path} has no output 'out_sample' and no single other that could be the "
                "prediction",
                f"its outputs are: {', '.join(names)}",
            )
        return names[0]


@contextmanager
def denoiser(path: Path, device: Device = "auto") -> Iterator[tuple[Denoiser, list[str]]]:
    """The model at `path`, simulated where ONNX Runtime lacks kernels; and what to say of it."""
    with runnable(path) as (usable, said):
        opened = Denoiser(usable, device, path)
        yield opened, [*said, *opened.notes]


def _cast(array: Array, spec: InputSpec) -> Array:
    """The array in the model's type.

    Raises:
        OnnxqError: fractions for an input of whole numbers, or another number of dimensions.
    """
    if array.ndim != len(spec.shape):
        raise OnnxqError(f"the condition {spec.name!r} is {list(array.shape)}, the input is {spec}")
    found = array.astype(spec.dtype)
    if spec.dtype.kind in "iu" and not np.array_equal(found, array):
        raise OnnxqError(f"the condition {spec.name!r} holds {array.dtype}, the input is {spec}")
    return found
