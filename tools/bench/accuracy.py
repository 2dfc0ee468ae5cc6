"""Recipes on a model: what each took, its error on held-out data, its task, what sm89 makes of it.

The rows go into a file one by one; rows that are there, made by the same source, are not made
again, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxq.gpus import target
from onnxq.recipe import Recipe, load
from tools.bench.child import onnxq
from tools.bench.models import Case
from tools.bench.peers import ROOT, fingerprint

Row = dict[str, Any]


@dataclass(frozen=True)
class Measuring:
    """What is measured.

    Attributes:
        recipes: names, each with changes behind colons: `w4a8-gptq:activations=fp8`; empty: the
            model's own.
        windows: of the evaluation text, for perplexities.
        samples: of calibration text; None: the model's own.
        task_only: no comparison and no compiling.
    """

    recipes: tuple[str, ...] = ()
    windows: int = 16
    samples: int | None = None
    task_only: bool = False

    def calib(self, case: Case) -> tuple[str, ...]:
        """The options that name the calibration data."""
        words = list(case.calib)
        if self.samples is not None and "--samples" in words:
            words[words.index("--samples") + 1] = str(self.samples)
        return tuple(words)

    def task(self, case: Case, model: Path) -> float | None:
        """The task's measure of a model."""
        if case.yardstick is None:
            return None
        title, measure = case.yardstick
        if title == "perplexity":
            from tools.bench.models import perplexity

            return perplexity(model, self.windows)
        return measure(model)


def measure(
    cases: Sequence[Case], measuring: Measuring, rows: list[Row], keep: Callable[[], None]
) -> None:
    """Add to `rows` what it lacks: for each model the original and its recipes.

    Args:
        keep: called after every row.
    """
    code = fingerprint(*sorted(f for f in (ROOT / "onnxq").rglob("*") if f.suffix in _SOURCES))
    for case in cases:
        for recipe in ("original", *(measuring.recipes or case.recipes)):
            key = {
                "model": case.name,
                "recipe": recipe,
                "code": code,
                "windows": measuring.windows,
                "calib": list(measuring.calib(case)),
                "task_only": measuring.task_only,
            }
            if any(key.items() <= row.items() for row in rows):
                continue
            print(f"{case.name} {recipe} ...", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory() as folder:
                found = _row(case, recipe, measuring, Path(folder))
            rows[:] = [r for r in rows if (r["model"], r["recipe"]) != (case.name, recipe)]
            rows.append(key | found)
            keep()


_SOURCES = (".py", ".yaml")


def _target(recipe: Recipe) -> str:
    """Ada; for its formats Blackwell."""
    formats = [f for f in (recipe.weight_format, recipe.activation_format) if f is not None]
    return "sm89" if all(target("sm89").runs(f.name) for f in formats) else "sm120"


def _row(case: Case, recipe: str, measuring: Measuring, folder: Path) -> Row:
    title = case.yardstick[0] if case.yardstick else ""
    if recipe == "original":
        return {"yardstick": title, "value": measuring.task(case, case.model)}
    output, report = folder / "model.onnx", folder / "report.json"
    name, *changes = recipe.split(":")
    words = ["--recipe", name, *(w for change in changes for w in ("--set", change))]
    words += measuring.calib(case) if load(name).needs_data else ()
    card = ("--target", _target(load(name).with_changes(changes)))
    usage = onnxq("quantize", case.model, "-o", output, "--report", report, *card, *words)
    made = json.loads(report.read_text())
    row = {
        "size": made["bytes_after"] / made["bytes_before"],
        "seconds": usage.wall,
        "cpu": usage.cpu,
        "peak": usage.peak,
        "yardstick": title,
        "value": measuring.task(case, output),
    }
    if measuring.task_only:
        return row
    shapes = [word for shape in case.shapes for word in ("--shapes", shape)]
    onnxq("build", output, "-o", folder / "model.plan", "--report", report, *card, *shapes)
    built = json.loads(report.read_text())
    onnxq("compare", case.model, output, *case.heldout, "--no-fp16", "--report", report)
    errors = json.loads(report.read_text())["comparison"]["rows"][0]
    shutil.rmtree(folder)
    folder.mkdir()
    return row | {
        "snr": errors["snr_db"],
        "cosine": errors["cosine"],
        "products": built["products"],
        "missed": len(built["coverage"]["missed"]),
    }
