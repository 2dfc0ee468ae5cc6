"""Second-order rounding: the steps of a recipe on one weight, kept only where they help.

Each weight is first rounded to nearest, then by every step asked for; what is stored is the
candidate with the least output error tr(E^T H E) on the calibration data, and the error before and
after is recorded. Codes wait in a temporary file until the model is written.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxq import numerics
from onnxq.algorithms import STEPS
from onnxq.algorithms.descent import descend
from onnxq.algorithms.gptq import DAMP, Sweep
from onnxq.algorithms.hessian import damped, output_errors
from onnxq.algorithms.search import search_scales
from onnxq.algorithms.target import corrected_target
from onnxq.errors import OnnxqError
from onnxq.formats import PerTensor, QuantScheme
from onnxq.inputs import Inputs, Moments
from onnxq.report import Edit, decibels
from onnxq.rounding import Array, Nearest, Rounded, finite_peaks
from onnxq.schemes import summed_axis
from onnxq.sites import Site


@dataclass(frozen=True)
class Solved:
    """What became of one weight.

    Attributes:
        errors: output error, as a share of the output's power, by candidate in the order tried;
            the first is rounding to nearest.
        kept: the candidate that is stored.
    """

    site: str
    errors: Mapping[str, float]
    kept: str

    @property
    def gain(self) -> float:
        """How much less error than rounded to nearest, in dB."""
        first = next(iter(self.errors.values()))
        least = self.errors[self.kept]
        return 10 * float(np.log10(first / least)) if first > 0 and least > 0 else 0.0

    def edit(self) -> Edit:
        """For the report: every candidate's error in dB of the output."""
        said = ", ".join(f"{name} {decibels(e)}" for name, e in self.errors.items())
        return Edit("round", self.kept, self.site, f"output error {said}")


class Solver:
    """A rounding (see `onnxq.rounding`) by the steps of a recipe."""

    def __init__(self, steps: tuple[str, ...], inputs: Inputs) -> None:
        self.steps, self._inputs = steps, inputs
        self.nearest = Nearest()
        self.solved: list[Solved] = []
        self.left: list[Edit] = []
        self._store = _Store()
        self._known: dict[tuple[Any, ...], Rounded] = {}
        self._sweep: tuple[Moments, Sweep] | None = None

    def __call__(self, site: Site, scheme: QuantScheme) -> Rounded:
        assert site.operand is not None
        key = (id(site.operand.constant), site.operand.permutation, scheme)
        if key not in self._known:
            self._known[key] = self._rounded(site, scheme)
        return self._known[key]

    def _rounded(self, site: Site, scheme: QuantScheme) -> Rounded:
        why = "" if scheme.format.symmetric else "its format has zero points"
        moments = None if why else self._inputs.of(site)
        if moments is None:
            why = why or "it is no linear layer"
            self.left.append(Edit("round", "nearest", site.name, f"{why}: no second-order method"))
            return self.nearest(site, scheme)
        assert site.operand is not None
        across = summed_axis(site) == 1
        values = site.operand.load().astype(np.float32)
        finite_peaks(site, values, PerTensor())
        W, inner = (values.T, scheme.transposed()) if across else (values, scheme)
        if scheme.format.two_level:
            largest = float(np.abs(W).max(initial=0))
            inner = inner.with_unit(numerics.tensor_unit(largest, scheme.format))
        found = self._solve(site, np.ascontiguousarray(W), inner, moments)
        stored = found.grid * numerics.steps(found.scale, inner, W.shape)
        self._inputs.rounded(site, stored.T if across else stored)
        codes, scale = found.grid.astype(scheme.format.dtype()), found.scale
        unit = np.array(inner.unit, np.float32)
        return Rounded(
            scheme,
            self._store.put(codes.T if across else codes),
            self._store.put(scale.T if across and scale.ndim == 2 else scale),
            (lambda: unit) if scheme.format.two_level else None,
        )

    def _solve(self, site: Site, W: Array, scheme: QuantScheme, moments: Moments) -> _Candidate:
        power = float(output_errors(W, moments.full).sum()) or 1.0
        errors: dict[str, float] = {}
        best: _Candidate | None = None
        for candidate in self._candidates(site, W, scheme, moments):
            values = candidate.grid * numerics.steps(candidate.scale, scheme, W.shape)
            error = _output_error(W, values, moments) / power
            if best is None or error < min(errors.values()):
                best = candidate
            errors[candidate.name] = error
        assert best is not None
        self.solved.append(Solved(site.name, errors, best.name))
        return best

    def _candidates(
        self, site: Site, W: Array, scheme: QuantScheme, moments: Moments
    ) -> Iterator[_Candidate]:
        """Rounding to nearest, then what each step makes with those before it."""
        fmt, H, done = scheme.format, moments.rounded, []
        peak = numerics.peaks(W, scheme.granularity)
        scale = _scales(site, peak, scheme)
        step = numerics.steps(scale, scheme, W.shape)
        grid = numerics.nearest(W / step, fmt)
        yield _Candidate("nearest", grid, scale)
        for name in self.steps:
            if name == "sequential":
                if moments.cross is moments.full:
                    continue  # nothing before it is rounded
                W = corrected_target(W, H, moments.cross)
                peak = numerics.peaks(W, scheme.granularity)
                scale = _scales(site, peak, scheme)
            elif name == "search":
                scale = search_scales(W, np.diag(H), peak, scheme)
            if STEPS[name][0] == "rescale":
                continue  # the weight has been, before
            if STEPS[name][0] in ("target", "scale"):
                step = numerics.steps(scale, scheme, W.shape)
                grid = numerics.nearest(W / step, fmt)
            elif name == "gptq":
                grid = self._sweep_of(moments).round(W, step, fmt)
            else:
                grid = descend(grid, W, step, damped(H, DAMP), fmt)
            done.append(name)
            yield _Candidate("+".join(done), grid, scale)

    def _sweep_of(self, moments: Moments) -> Sweep:
        """Layers that read one tensor come one after another, and share its factor."""
        if self._sweep is None or self._sweep[0] is not moments:
            self._sweep = moments, Sweep(moments.rounded)
        return self._sweep[1]

    def facts(self) -> dict[str, Any]:
        """The figures for the report."""
        gains = [s.gain for s in self.solved]
        return {
            "steps": list(self.steps),
            "layers": len(gains),
            "improved": sum(s.kept != "nearest" for s in self.solved),
            "gain_db": round(float(np.mean(gains)), 2) if gains else 0.0,
        }

    def edits(self) -> list[Edit]:
        """One a weight."""
        return [s.edit() for s in self.solved] + self.left


@dataclass(frozen=True)
class _Candidate:
    """A weight in the format's values (units of a step) [K, N], and the scales."""

    name: str
    grid: Array
    scale: Array


def _output_error(W: Array, values: Array, moments: Moments) -> float:
    """E||X W - Y V||^2 for the input X in full precision and Y behind rounded layers."""
    if moments.cross is moments.full:
        return float(output_errors(values - W, moments.full).sum())
    own = output_errors(W, moments.full).sum() + output_errors(values, moments.rounded).sum()
    return float(own - 2 * np.einsum("kn,kn->", moments.cross @ W, values, dtype=np.float64))


class _Store:
    """Arrays in a nameless temporary file, each read back when it is asked for."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this does)

    def put(self, values: Array) -> Callable[[], Array]:
        shape, dtype = values.shape, values.dtype
        start = self._file.seek(0, 2)
        try:
            self._file.write(values.tobytes())
            self._file.flush()
        except OSError as error:
            raise OnnxqError(
                f"cannot keep rounded weights in {tempfile.gettempdir()}: {error}",
                "set TMPDIR to a folder with more space",
            ) from error

        def get() -> Array:
            size = int(np.prod(shape)) * dtype.itemsize
            read = os.pread(self._file.fileno(), size, start)  # from any thread
            return np.frombuffer(read, dtype).reshape(shape)

        return get


def _scales(site: Site, peak: Array, scheme: QuantScheme) -> Array:
    try:
        return numerics.scales_for(peak, scheme)
    except numerics.ScaleRangeError as error:
        raise OnnxqError(
            f"weight {site.weight_name!r} of {site.name!r}: {error}",
            f"leave the layer: --rule 'leave weight={site.weight_name}'",
        ) from None
