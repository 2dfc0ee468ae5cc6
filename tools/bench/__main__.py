"""Measure onnxq on real models and print the table of the README.

    python -m tools.bench [--models minilm,smollm2,ppocr,sdxl-tiny] [--no-speed] [--json FILE]

Accuracy is taken on data the calibration never saw. Times compare within this run only: they are
given as ratios to the floor, which is ONNX Runtime's bare forward passes over the same data for a
calibration, and the time and memory of copying the file for what needs no data.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.bench.child import onnxq
from tools.bench.models import CASES, Case
from tools.bench.speed import speed_rows

_PACKAGES = ("onnxq", "onnx", "onnxruntime", "tensorrt-rtx", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure onnxq on real models.")
    parser.add_argument("--models", default=",".join(CASES), help="names, joined by commas")
    parser.add_argument("--no-speed", action="store_true", help="accuracy and coverage only")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    console = Console(width=150)
    console.print(f"$ python -m tools.bench {' '.join(sys.argv[1:])}")
    console.print(_machine())
    figures: dict[str, Any] = {"machine": _machine(), "accuracy": [], "speed": []}
    for name in options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            figures["accuracy"] += _measure(CASES[name], Path(folder))
    console.print(_accuracy_table(figures["accuracy"]))
    if not options.no_speed:
        figures["speed"] = speed_rows([n for n in options.models.split(",") if n != "ppocr"])
        console.print(_speed_table(figures["speed"]))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def _machine() -> str:
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in _PACKAGES)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores "
        f"({platform.machine()}), {memory:.0f} GiB, no GPU"
    )


def _measure(case: Case, folder: Path) -> list[dict[str, Any]]:
    """A row for the original and one for each recipe."""
    title, measure = case.yardstick or ("", None)
    rows = [
        {
            "model": case.name,
            "recipe": "original",
            "yardstick": title,
            "value": measure(case.model) if measure else None,
        }
    ]
    for recipe in case.recipes:
        print(f"{case.name} {recipe} ...", file=sys.stderr, flush=True)
        output, report = folder / "model.onnx", folder / "report.json"
        data = case.calib if "dynamic" not in recipe else ()
        usage = onnxq(
            "quantize", case.model, "-o", output, "--recipe", recipe, "--report", report, *data
        )
        made = json.loads(report.read_text())
        shapes = [word for shape in case.shapes for word in ("--shapes", shape)]
        onnxq("build", output, "-o", folder / "model.plan", "--report", report, *shapes)
        built = json.loads(report.read_text())
        onnxq("compare", case.model, output, *case.heldout, "--no-fp16", "--report", report)
        errors = json.loads(report.read_text())["comparison"]["rows"][0]
        rows.append(
            {
                "model": case.name,
                "recipe": recipe,
                "size": made["bytes_after"] / made["bytes_before"],
                "snr": errors["snr_db"],
                "cosine": errors["cosine"],
                "yardstick": title,
                "value": measure(output) if measure else None,
                "products": built["products"],
                "missed": len(built["coverage"]["missed"]),
                "seconds": usage.wall,
                "peak": usage.peak,
            }
        )
        shutil.rmtree(folder)
        folder.mkdir()
    return rows


def _accuracy_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="held-out accuracy, and what sm89 compiles")
    headings = "model,recipe,size,SNR dB,cosine,yardstick,compiled,missed,s,peak MB"
    for heading in headings.split(","):
        table.add_column(heading, justify="left" if heading in ("model", "recipe") else "right")
    for row in rows:
        value = f"{row['yardstick']} {row['value']:.3f}" if row["value"] is not None else ""
        if row["recipe"] == "original":
            table.add_row(row["model"], "original", "1", "", "", value)
            continue
        compiled = "; ".join(
            f"{kind} " + ", ".join(f"{n} {what}" for what, n in counts.items())
            for kind, counts in row["products"].items()
            if counts
        )
        table.add_row(
            row["model"], row["recipe"], f"{row['size']:.2f}", f"{float(row['snr']):.2f}",
            f"{row['cosine']:.5f}", value, compiled, str(row["missed"]),
            f"{row['seconds']:.1f}", f"{row['peak'] / 1e6:.0f}",
        )  # fmt: skip
    return table


def _speed_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="time and memory against the floor, measured alternately")
    headings = "model,what,floor s,ours s,ratio,floor CPU s,ours,ratio,floor MB,ours,ratio"
    for heading in headings.split(","):
        table.add_column(heading, justify="left" if heading in ("model", "what") else "right")
    for row in rows:
        table.add_row(
            row["model"], row["what"], f"{row['floor_s']:.2f}", f"{row['ours_s']:.2f}",
            f"{row['ours_s'] / row['floor_s']:.2f}", f"{row['floor_cpu']:.2f}",
            f"{row['ours_cpu']:.2f}", f"{row['ours_cpu'] / row['floor_cpu']:.2f}",
            f"{row['floor_mb']:.0f}",
            f"{row['ours_mb']:.0f}", f"{row['ours_mb'] / row['floor_mb']:.2f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main()
