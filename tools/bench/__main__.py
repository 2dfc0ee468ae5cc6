"""Measure onnxq on real models and print the table of the README.

    python -m tools.bench [--models minilm,smollm2,ppocr,sdxl-tiny] [--no-speed] [--json FILE]
    python -m tools.bench --models minilm,smollm2 --peers modelopt,onnxruntime,nncf,onnxsim

The second runs onnxq and its peers side by side, each in an environment of its own, made the first
time; the table, its data and a picture go into models/out/bench/. Results are kept: `--fresh`
measures again.

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

from onnxq.recipe import presets
from tools.bench.child import onnxq
from tools.bench.models import CASES, Case
from tools.bench.peers import FLOOR, OURS, PEERS
from tools.bench.speed import speed_rows

_RIVALS = tuple(name for name in PEERS if name not in (FLOOR, OURS))
_SHARED = tuple(name for name, case in CASES.items() if case.shared)
_PACKAGES = ("onnxq", "onnx", "onnxruntime", "tensorrt-rtx", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure onnxq on real models.")
    parser.add_argument("--models", help=f"joined by commas, of {','.join(CASES)}")
    parser.add_argument("--peers", help=f"side by side: of {','.join(_RIVALS)}")
    parser.add_argument("--fresh", action="store_true", help="run peers again that have results")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each; medians are shown")
    parser.add_argument("--no-speed", action="store_true", help="accuracy and coverage only")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    models = _names(parser, options.models, _SHARED if options.peers else tuple(CASES))
    console = Console(width=170)
    command = f"python -m tools.bench {' '.join(sys.argv[1:])}"
    console.print(f"$ {command}")
    console.print(_machine())
    if options.peers:
        peers = _names(parser, options.peers, _RIVALS)
        _side_by_side(console, command, models, peers, options.fresh, options.rounds)
        return
    figures: dict[str, Any] = {"machine": _machine(), "accuracy": [], "speed": []}
    for name in models:
        with tempfile.TemporaryDirectory() as folder:
            figures["accuracy"] += _measure(CASES[name], Path(folder))
    console.print(_accuracy_table(figures["accuracy"]))
    if not options.no_speed:
        figures["speed"] = speed_rows([name for name in models if name != "ppocr"])
        console.print(_speed_table(figures["speed"]))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


def _names(parser: argparse.ArgumentParser, given: str | None, known: tuple[str, ...]) -> list[str]:
    """The names asked for; all that are known by default."""
    names = list(known) if given is None else given.split(",")
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown: {', '.join(unknown)}; there are {', '.join(known)}")
    return names


def _side_by_side(
    console: Console,
    command: str,
    models: list[str],
    peers: list[str],
    fresh: bool,
    rounds: int,
) -> None:
    from tools.bench import plot, tables
    from tools.bench.bars import bars, losses
    from tools.bench.side_by_side import BENCH, side_by_side

    rows = side_by_side(models, peers, fresh=fresh, rounds=rounds)
    found = bars(rows)
    versions = list(dict.fromkeys(f"{r['peer']}: {_listed(r['versions'])}" for r in rows))
    for line in (*versions, *tables.notes(rows)):
        console.print(line, highlight=False)
    console.print(tables.terminal(rows))
    if found:
        console.print(tables.bars_table(found))
    if worse := losses(rows):
        console.print("where a peer does better:", *worse, sep="\n  ", highlight=False)
    content = {"command": command, "machine": _machine(), "rows": rows, "bars": found}
    (BENCH / "bench.json").write_text(json.dumps(content, indent=2, default=vars) + "\n")
    page = tables.markdown(command, _machine(), versions, rows, found)
    (BENCH / "bench.md").write_text(page)
    plot.draw(rows, BENCH / "bench.png", f"{platform.machine()}, {os.cpu_count()} cores, no GPU")
    console.print(f"saved: {BENCH}/bench.json, bench.md, bench.png")


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


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
        data = case.calib if presets()[recipe].needs_data else ()
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
