"""What a comparison found: rows of figures, verdicts, and the same as JSON and as plain text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from onnxq.evaluate.layers import LayerErrors
from onnxq.evaluate.metrics import DiscreteError, FloatError, OutputError
from onnxq.evaluate.tables import decibels, table

_HEAD = ["candidate", "output", "SNR dB", "cosine", "max error", "mean error", "worst sample"]


@dataclass(frozen=True)
class Tolerances:
    """What a candidate must reach at each output; None = not checked.

    An output with NaN or inf where the reference has none, and one that the candidate lacks,
    fails as soon as any tolerance is given.
    """

    min_snr: float | None = None  # dB, over all elements of all samples
    min_cosine: float | None = None
    max_abs_error: float | None = None
    min_equal: float | None = None  # share of equal elements; integer and boolean outputs only

    @property
    def any_given(self) -> bool:
        return any(value is not None for value in vars(self).values())

    def failures(self, found: OutputError) -> tuple[str, ...]:
        """Why `found` is out of tolerance, in words; empty when it is not."""
        if not self.any_given:
            return ()
        if found.error is None:
            return ("the candidate lacks this output",)
        if isinstance(found.error, DiscreteError):
            share = found.error.share
            if self.min_equal is not None and share < self.min_equal:
                return (f"share of equal elements {share:.6g} < {self.min_equal:g}",)
            return ()
        return self._float_failures(found.error)

    def _float_failures(self, error: FloatError) -> tuple[str, ...]:
        snr, cosine = error.snr, error.cosine
        if snr is None or cosine is None:
            return ("NaN or inf",)
        failures = []
        if self.min_snr is not None and snr < self.min_snr:
            failures.append(f"SNR {snr:.4g} dB < {self.min_snr:g} dB")
        if self.min_cosine is not None and cosine < self.min_cosine:
            failures.append(f"cosine {cosine:.6f} < {self.min_cosine:g}")
        if self.max_abs_error is not None and error.max_error > self.max_abs_error:
            failures.append(f"max error {error.max_error:.4g} > {self.max_abs_error:g}")
        return tuple(failures)


@dataclass(frozen=True)
class Row:
    """One output of one candidate against the reference."""

    candidate: str
    output: str
    found: OutputError
    failures: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def problem(self) -> str:
        """What makes the figures meaningless, whatever the tolerances; empty when nothing does."""
        error = self.found.error
        if error is None:
            return f"{self.candidate!r} lacks the output {self.output!r}"
        if isinstance(error, FloatError) and error.broken:
            return (
                f"{self.candidate!r}, output {self.output!r}: {error.broken} of {error.elements} "
                "elements are NaN or infinite on one side only"
            )
        return ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "candidate": self.candidate,
            "output": self.output,
            **self.found.as_dict(),
            "passed": self.passed,
            "failures": list(self.failures),
            "problem": self.problem,
        }


@dataclass(frozen=True)
class Comparison:
    """All candidates against the reference, over `samples` samples.

    Attributes:
        notes: label -> remarks on how that model was run (session options, casts).
        remarks: on the comparison as a whole.
        layers: label -> where that model's error enters, if that was asked.
    """

    reference: str
    rows: tuple[Row, ...]
    samples: int
    tolerances: Tolerances = Tolerances()
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    layers: dict[str, LayerErrors] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True if every output of every candidate is within the tolerances that were given."""
        return all(row.passed for row in self.rows)

    @property
    def problems(self) -> tuple[str, ...]:
        """Candidates' outputs that are missing, NaN or infinite, one line each."""
        return tuple(row.problem for row in self.rows if row.problem)

    def row(self, candidate: str, output: str) -> Row:
        """The row of one candidate's output.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.candidate, row.output) == (candidate, output):
                return row
        raise KeyError((candidate, output))

    def as_dict(self) -> dict[str, Any]:
        """For JSON. Infinities are the strings "inf" and "-inf"."""
        return {
            "reference": self.reference,
            "samples": self.samples,
            "passed": self.passed,
            "tolerances": vars(self.tolerances),
            "rows": [row.as_dict() for row in self.rows],
            "notes": {label: list(notes) for label, notes in self.notes.items() if notes},
            "remarks": list(self.remarks),
            "layers": {label: errors.as_dict() for label, errors in self.layers.items()},
        }

    def lines(self) -> list[str]:
        """A table as plain text, then what must be said about it."""
        head = [*_HEAD, "verdict"] if self.tolerances.any_given else _HEAD
        body = [self._cells(row) for row in self.rows]
        plural = "" if self.samples == 1 else "s"
        title = f"against {self.reference!r}, {self.samples} sample{plural}"
        said = [f"problem: {problem}" for problem in self.problems]
        said += [f"note: {label}: {note}" for label in self.notes for note in self.notes[label]]
        said += [f"note: {remark}" for remark in self.remarks]
        inside = [
            line
            for label, errors in self.layers.items()
            for line in ("", f"{label}: {errors.lines()[0]}", *errors.lines()[1:])
        ]
        return [title, *table(head, body), *said, *inside]

    def _cells(self, row: Row) -> list[str]:
        cells = [row.candidate, row.output, *_figures(row.found)]
        if self.tolerances.any_given:
            cells.append("ok" if row.passed else "FAILED: " + ", ".join(row.failures))
        return cells


def _figures(found: OutputError) -> list[str]:
    error = found.error
    if error is None:
        return ["missing", "-", "-", "-", "-"]
    if isinstance(error, DiscreteError):
        return [f"{100 * error.share:.4g} % equal", "-", "-", "-", "-"]
    if error.snr is None or error.cosine is None or error.mean_error is None:
        return [f"{error.broken} NaN/inf", "-", "-", "-", f"#{found.worst_sample}"]
    worst = "-" if found.samples < 2 else f"{decibels(found.worst_snr)} (#{found.worst_sample})"
    return [
        decibels(error.snr),
        f"{error.cosine:.6f}",
        f"{error.max_error:.4g}",
        f"{error.mean_error:.4g}",
        worst,
    ]
