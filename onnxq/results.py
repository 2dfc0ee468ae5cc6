"""What the verbs give back: a report to read and save, and whether the checks passed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxq.report import Report

if TYPE_CHECKING:
    from onnxq.advice import Advice
    from onnxq.engine.build import BuildResult
    from onnxq.engine.coverage import Coverage
    from onnxq.evaluate.comparison import Comparison
    from onnxq.evaluate.diffusion import Diffusion
    from onnxq.linting.finding import Finding
    from onnxq.placement import Placement
    from onnxq.predicting import Prediction


@dataclass
class Result:
    """A verb's result.

    Attributes:
        report: what was done, and the figures.
        passed: False if a check failed (a tolerance, `strict`).
    """

    report: Report
    passed: bool = True

    def as_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return self.report.as_dict()

    def save(self, path: str | Path) -> None:
        """Write the report as JSON; where the name ends in .html, as a page to read."""
        self.report.save(path)


@dataclass
class Quantized(Result):
    """Of `quantize`: the files written (the model first) and the placement behind them."""

    files: tuple[Path, ...] = ()
    placement: Placement | None = field(default=None, repr=False)


@dataclass
class Inspected(Result):
    """Of `inspect`: the placement; None for a model that onnxq wrote."""

    placement: Placement | None = field(default=None, repr=False)


@dataclass
class Built(Result):
    """Of `build`: the engine's description, what each product became, and its predicted speed."""

    engine: BuildResult | None = field(default=None, repr=False)
    coverage: Coverage | None = field(default=None, repr=False)
    predicted: Prediction | None = field(default=None, repr=False)


@dataclass
class Compared(Result):
    """Of `compare`."""

    comparison: Comparison | None = field(default=None, repr=False)


@dataclass
class Sampled(Result):
    """Of `evaluate_diffusion`."""

    found: Diffusion | None = field(default=None, repr=False)


@dataclass
class Linted(Result):
    """Of `lint`: what was found, worst first, and the files written by `fix`."""

    findings: tuple[Finding, ...] = ()
    files: tuple[Path, ...] = ()


@dataclass
class Checked(Result):
    """Of `check_zeros`."""


@dataclass
class Recommended(Result):
    """Of `recommend`."""

    advice: Advice | None = field(default=None, repr=False)
