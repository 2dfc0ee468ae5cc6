"""Second-order rounding: the steps of a recipe on one weight, kept only where they help.

Each weight is first rounded to nearest, then by every step asked for; what is stored is the
candidate with the least output error tr(E^T H E) on the calibration data, and the error before and
after is recorded. Codes wait in a temporary file until the model is written.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from onnxq import numerics
from onnxq.algorithms import STEPS
from onnxq.algorithms.descent import descend
from onnxq.algorithms.gptq import DAMP, Sweep
from onnxq.algorithms.hessian import damped, output_errors
from onnxq.algorithms.search import search_scales
from onnxq.algorithms.target import corrected_target
from onnxq.errors import OnnxqError
from onnxq.formats import PerTensor, QuantScheme, dtype_named
from onnxq.inputs import Inputs, Moments
from onnxq.report import Edit, decibels
from onnxq.rounding import Array, Nearest, Rounded, finite_peaks
from onnxq.schemes import summed_axis
from onnxq.sites import Site
from onnxq.threads import Once, in_order
from onnxq.unfinished import Unfinished


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
    """A rounding (see `onnxq.rounding`) by the steps of a recipe.

    Args:
        sites: in graph order: what is said of them comes in this one.
        unfinished: where finished layers wait for a run that goes on after this one.
    """

    def __init__(
        self,
        steps: tuple[str, ...],
        inputs: Inputs,
        sites: Sequence[Site],
        unfinished: Unfinished | None = None,
    ) -> None:
        self.steps, self.ahead = steps, inputs.independent
        self._inputs, self._sites = inputs, sites
        self._unfinished = unfinished or Unfinished()
        self._nearest, self._store = Nearest(), _Store()
        self._said: dict[int, Solved | Edit] = {}
        self._known: dict[tuple[Any, ...], Once[Rounded]] = {}
        self._sweeps: WeakKeyDictionary[Moments, Once[Sweep]] = WeakKeyDictionary()
        self._lock = Lock()

    def __call__(self, jobs: Sequence[tuple[Site, QuantScheme]]) -> list[Rounded]:
        # Where layers can be rounded ahead, others are, by the threads there are.
        return list(in_order(self._one, jobs, 1 if self.ahead else None))

    def _one(self, job: tuple[Site, QuantScheme]) -> Rounded:
        site, scheme = job
        assert site.operand is not None
        key = (id(site.operand.constant), site.operand.permutation, scheme)
        with self._lock:
            once = self._known.setdefault(key, Once(partial(self._rounded, site, scheme)))
        return once()

    def _rounded(self, site: Site, scheme: QuantScheme) -> Rounded:
        if site.kind != "linear" or not scheme.format.symmetric:
            why = "it is no linear layer" if scheme.format.symmetric else "it has zero points"
            reason = f"{why}: no second-order method"
            self._said[id(site)] = Edit("round", "nearest", site.name, reason)
            return self._nearest.one(site, scheme)
        assert site.operand is not None
        across = summed_axis(site) == 1
        values = site.operand.load().astype(np.float32)
        finite_peaks(site, values, PerTensor())
        W, inner = (values.T, scheme.transposed()) if across else (values, scheme)
        if scheme.format.two_level:
            largest = float(np.abs(W).max(initial=0))
            inner = inner.with_unit(numerics.tensor_unit(largest, scheme.format))
        found = self._unfinished.arrays(
            f"layer {self._place(site)} {site.weight_name} {inner}",
            lambda: self._solve(site, np.ascontiguousarray(W), inner).arrays(),
        )
        solution = _Solution.of(found, inner)
        self._said[id(site)] = solution.solved
        stored = solution.values(inner)
        self._inputs.rounded(site, stored.T if across else stored)
        codes, scale = solution.codes, solution.scale
        unit = np.array(inner.unit, np.float32)
        return Rounded(
            scheme,
            self._store.put(codes.T if across else codes),
            self._store.put(scale.T if across and scale.ndim == 2 else scale),
            (lambda: unit) if scheme.format.two_level else None,
        )

    def _place(self, site: Site) -> int:
        return next(i for i, other in enumerate(self._sites) if other is site)

    def _solve(self, site: Site, W: Array, scheme: QuantScheme) -> _Solution:
        moments = self._inputs.of(site)
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
        codes = best.grid.astype(scheme.format.dtype())
        return _Solution(codes, best.scale, Solved(site.name, errors, best.name))

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
        """Layers that read one tensor share its factor."""
        with self._lock:
            once = self._sweeps.setdefault(moments, Once(partial(Sweep, moments.rounded)))
        return once()

    def facts(self) -> dict[str, Any]:
        """The figures for the report."""
        solved = [said for said in self._said.values() if isinstance(said, Solved)]
        gains = [s.gain for s in solved]
        return {
            "steps": list(self.steps),
            "layers": len(gains),
            "improved": sum(s.kept != "nearest" for s in solved),
            "gain_db": round(float(np.mean(gains)), 2) if gains else 0.0,
        }

    def edits(self) -> list[Edit]:
        """One a weight, in graph order."""
        said = [self._said[id(site)] for site in self._sites if id(site) in self._said]
        return [s.edit() if isinstance(s, Solved) else s for s in said]


@dataclass(frozen=True)
class _Solution:
    """A weight's codes [K, N] in the format's type, its scales, and what is said of it."""

    codes: Array
    scale: Array
    solved: Solved

    def values(self, scheme: QuantScheme) -> Array:
        """What the codes stand for, in float32."""
        step = numerics.steps(self.scale, scheme, self.codes.shape)
        return np.asarray(self.codes.astype(np.float32) * step)

    def arrays(self) -> dict[str, Array]:
        """As arrays of plain numbers; `of` reads them."""
        about = json.dumps(vars(self.solved)).encode()
        plain = {"codes": self.codes, "scale": self.scale, "about": np.frombuffer(about, np.uint8)}
        return {name: array.view(f"u{array.itemsize}") for name, array in plain.items()}

    @classmethod
    def of(cls, arrays: Mapping[str, Array], scheme: QuantScheme) -> _Solution:
        return cls(
            arrays["codes"].view(scheme.format.dtype()),
            arrays["scale"].view(dtype_named(scheme.scale_type)),
            Solved(**json.loads(arrays["about"].tobytes())),
        )


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
        self._lock = Lock()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this does)

    def put(self, values: Array) -> Callable[[], Array]:
        shape, dtype = values.shape, values.dtype
        try:
            with self._lock:
                start = self._file.seek(0, 2)
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
