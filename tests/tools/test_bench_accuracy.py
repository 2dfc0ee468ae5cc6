"""Rows of the accuracy table are saved one by one, and not measured twice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from onnxq.recipe import load
from tools.bench import accuracy
from tools.bench.accuracy import Measuring, measure
from tools.bench.models import CASES


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []

    def row(case: Any, recipe: str, measuring: Measuring, folder: Path) -> dict[str, Any]:
        seen.append(recipe)
        if recipe == "bad":
            raise RuntimeError("it is broken")
        return {"value": len(seen)}

    monkeypatch.setattr(accuracy, "_row", row)
    return seen


def test_what_is_there_is_not_measured_again(measured: list[str]) -> None:
    case, rows, kept = CASES["smollm2"], [], []
    asked = Measuring(("int8", "bad"))
    with pytest.raises(RuntimeError):
        measure([case], asked, rows, lambda: kept.append(len(rows)))
    assert measured == ["original", "int8", "bad"] and kept == [1, 2]
    measure([case], Measuring(("int8", "nvfp4")), rows, lambda: None)
    assert measured[3:] == ["nvfp4"]
    assert [row["value"] for row in rows] == [1, 2, 4]
    for other in (replace(asked, windows=4), replace(asked, samples=8)):
        measured.clear()
        measure([case], replace(other, recipes=("int8",)), rows, lambda: None)
        assert measured == ["original", "int8"]
    assert [row["recipe"] for row in rows] == ["nvfp4", "original", "int8"]


def test_rows_of_another_source_are_measured_again(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = []
    for code in ("a", "a", "b"):
        monkeypatch.setattr(accuracy, "fingerprint", lambda *files, code=code: code)
        measure([CASES["minilm"]], Measuring(("int8",)), rows, lambda: None)
    assert measured == 2 * ["original", "int8"]


@pytest.mark.parametrize(
    ("name", "card"), [("nvfp4", "sm120"), ("mxfp8", "sm120"), ("w4a8-rtn", "sm89")]
)
def test_formats_of_blackwell_are_measured_for_it(name: str, card: str) -> None:
    assert accuracy._target(load(name)) == card


def test_samples_replace_those_of_text_only() -> None:
    asked = Measuring(samples=3)
    text = asked.calib(CASES["smollm2"])
    assert text[text.index("--samples") + 1] == "3"
    assert asked.calib(CASES["minilm"]) == CASES["minilm"].calib
