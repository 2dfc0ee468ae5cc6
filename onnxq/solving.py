"""Second-order methods: the steps of a recipe on one weight, kept only where they help.

Each weight is first rounded to nearest, then by every step asked for; what is stored is the
candidate with the least output error tr(E^T H E) on the calibration data, and the error before and
after is recorded. Codes wait in a temporary file until the model is written.

Where zeros are asked for, the first candidate is the pruned weight, rounded to nearest; none is
without them. Zeros that a weight comes with stay, if they are too many to be chance.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np

from onnxq import numerics
from onnxq.algorithms import STEPS
from onnxq.candidates import Candidate, Candidates, output_error, output_power
from onnxq.errors import OnnxqError
from onnxq.formats import PerTensor, QuantScheme, dtype_named
from onnxq.graph.dtypes import numpy_dtype
from onnxq.graph.weights import constant_type
from onnxq.inputs import Inputs, Parts
from onnxq.layouts import Layout, layout_of
from onnxq.report import Edit, decibels
from onnxq.rounding import Array, Nearest, Rounded, finite_peaks
from onnxq.sites import Site
from onnxq.sparsity import Pattern
from onnxq.store import Store
from onnxq.threads import Once, in_order
from onnxq.unfinished import Unfinished

_ROOM = 2.0
"""How many times the largest weight fits the scales of two levels where steps move weights."""


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
        pattern: of the zeros that a step puts in.
        unsolved: layers that no second-order method works on, and why (see `inputs.unsolvable`).
    """

    def __init__(
        self,
        steps: tuple[str, ...],
        inputs: Inputs,
        sites: Sequence[Site],
        unfinished: Unfinished | None = None,
        pattern: Pattern | None = None,
        unsolved: Mapping[int, str] = {},
    ) -> None:
        self.unsolved = unsolved
        self.steps, self.ahead, self.pattern = steps, inputs.independent, pattern
        self._inputs, self._sites = inputs, sites
        self._unfinished = unfinished or Unfinished()
        self._nearest, self._store = Nearest(), Store()
        self._said: dict[int, Solved | Edit] = {}
        self._unpruned: dict[int, Edit] = {}
        self._known: dict[tuple[Any, ...], Once[Rounded]] = {}
        self._pruned: dict[tuple[Any, ...], Once[Callable[[], Array]]] = {}
        self._candidates = Candidates(steps, pattern)
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
        reason = self.unsolved.get(id(site.node))
        if reason is not None:
            self._said[id(site.node)] = Edit("round", "nearest", site.name, reason)
            return self._nearest.one(site, scheme)
        W, layout = _matrix(site)
        inner = layout.scheme(scheme)
        obstacle = "" if self.pattern is None else self.pattern.obstacle(layout.channels)
        if obstacle:
            self._unpruned[id(site.node)] = Edit("sparsify", "leave", site.name, obstacle)
        if scheme.format.two_level:
            largest = float(np.abs(W).max(initial=0))
            if {"sparsify", "target"} & {STEPS[name][0] for name in self.steps}:
                largest *= _ROOM
            inner = inner.with_unit(numerics.tensor_unit(largest, scheme.format))

        def read(arrays: Mapping[str, Array]) -> _Solution:
            found = _Solution.of(arrays, W, inner.format.dtype(), inner.scale_type)
            if found.scale.shape != numerics.scale_shape(W.shape, inner.granularity):
                raise ValueError("scales of another weight")
            return found

        solution = self._unfinished.part(
            f"layer {self._place(site)} {site.weight_name} {inner}",
            lambda: self._solve(site, W, inner, layout.channels),
            _Solution.arrays,
            read,
        )
        self._said[id(site.node)] = solution.solved
        stored = solution.values(inner)
        self._inputs.rounded(site, layout.weight(stored))
        unit = np.array(inner.unit, np.float32)

        def put(values: Array) -> Callable[[], Array]:
            return self._store.put(layout.spread(values))

        return Rounded(
            scheme,
            put(solution.codes),
            put(solution.scale),
            (lambda: unit) if scheme.format.two_level else None,
            None if solution.zero is None else put(solution.zero),
        )

    def pruned(self, site: Site) -> Callable[[], Array] | None:
        """The weight with zeros, not rounded, in its own type; None where no step can be done."""
        if id(site.node) in self.unsolved:
            return None
        assert site.operand is not None
        key = (id(site.operand.constant), site.operand.permutation)
        with self._lock:
            once = self._pruned.setdefault(key, Once(partial(self._with_zeros, site)))
        return once()

    def _with_zeros(self, site: Site) -> Callable[[], Array]:
        assert site.operand is not None
        W, layout = _matrix(site)

        def found() -> _Solution:
            parts = self._inputs.of(site)
            with _soluble(site, parts):
                *_, draft = self._candidates.drafts.of(W, parts, layout.channels)
            error = output_error(W, draft.values, parts) / output_power(W, parts)
            solved = Solved(site.name, {draft.name: error}, draft.name)
            return _Solution(draft.values.astype(np.float32), np.ones((), np.float32), solved)

        kept = self._unfinished.part(
            f"zeros {self._place(site)} {site.weight_name}",
            found,
            _Solution.arrays,
            lambda arrays: _Solution.of(arrays, W, np.float32, "float32"),
        )
        self._said[id(site.node)] = kept.solved
        values = layout.weight(kept.codes)
        self._inputs.rounded(site, values)
        return self._store.put(values.astype(numpy_dtype(constant_type(site.operand.constant))))

    def _place(self, site: Site) -> int:
        return next(i for i, other in enumerate(self._sites) if other.node is site.node)

    def _solve(self, site: Site, W: Array, scheme: QuantScheme, channels: int) -> _Solution:
        parts = self._inputs.of(site)
        with _soluble(site, parts):
            return self._best(site, W, scheme, parts, channels)

    def _best(
        self, site: Site, W: Array, scheme: QuantScheme, parts: Parts, channels: int
    ) -> _Solution:
        power = output_power(W, parts)
        errors: dict[str, float] = {}
        best: Candidate | None = None
        for candidate in self._candidates.of(site, W, scheme, parts, channels):
            values = candidate.grid * numerics.steps(candidate.scale, scheme, W.shape)
            error = output_error(W, values, parts) / power
            if best is None or error < min(errors.values()):
                best = candidate
            errors[candidate.name] = error
        assert best is not None
        grid, zero = best.grid, best.zero
        if zero is not None:
            grid = grid + numerics.zeros(zero, scheme, W.shape)
        solved = Solved(site.name, errors, best.name)
        return _Solution(grid.astype(scheme.format.dtype()), best.scale, solved, zero)

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
        said = [self._said[id(s.node)] for s in self._sites if id(s.node) in self._said]
        left = [self._unpruned[id(s.node)] for s in self._sites if id(s.node) in self._unpruned]
        return left + [s.edit() if isinstance(s, Solved) else s for s in said]


@contextmanager
def _soluble(site: Site, parts: Parts) -> Iterator[None]:
    """Name the layer whose second moments cannot be worked with."""
    wrong = ""
    if not all(np.isfinite(np.diag(m.full) + np.diag(m.rounded)).all() for m in parts):
        wrong = "overflow"
    try:
        if not wrong:
            yield
    except np.linalg.LinAlgError as error:
        wrong = f"are those of no input ({error})"
    if wrong:
        raise OnnxqError(
            f"the second moments of what {site.name!r} reads {wrong}",
            f"calibrate again, or leave the layer: --rule 'leave weight={site.weight_name}'",
        )


@dataclass(frozen=True)
class _Solution:
    """A weight's codes [K, N] in the format's type, its scales, and what is said of it."""

    codes: Array
    scale: Array
    solved: Solved
    zero: Array | None = None

    def values(self, scheme: QuantScheme) -> Array:
        """What the codes stand for, in float32."""
        return numerics.dequantize(self.codes, self.scale, scheme, self.zero)

    def arrays(self) -> dict[str, Array]:
        """As arrays of plain numbers; `of` reads them."""
        about = json.dumps(vars(self.solved)).encode()
        plain = {"codes": self.codes, "scale": self.scale, "about": np.frombuffer(about, np.uint8)}
        if self.zero is not None:
            plain["zero"] = self.zero
        return {name: array.view(f"u{array.itemsize}") for name, array in plain.items()}

    @classmethod
    def of(cls, arrays: Mapping[str, Array], W: Array, dtype: Any, scale_type: str) -> _Solution:
        """What `arrays` gave of a solution for W in that type.

        Raises:
            Exception: they are something else.
        """
        codes, solved = arrays["codes"].view(dtype), Solved(**json.loads(arrays["about"].tobytes()))
        if codes.shape != W.shape or solved.kept not in solved.errors:
            raise ValueError("codes of another weight")
        zero = arrays["zero"].view(dtype) if "zero" in arrays else None
        return cls(codes, arrays["scale"].view(dtype_named(scale_type)), solved, zero)


def _matrix(site: Site) -> tuple[Array, Layout]:
    """W [K, N] in float32, and how the node's weight becomes it."""
    assert site.operand is not None
    values, layout = site.operand.load().astype(np.float32), layout_of(site)
    finite_peaks(site, values, PerTensor())
    return layout.matrix(values), layout
