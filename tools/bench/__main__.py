"""Measure onnxq on real models and print the table of the README.

    python -m tools.bench [--models minilm,smollm2,ppocr,sdxl-tiny] [--no-speed] [--json FILE]
    python -m tools.bench --models smollm2 --task-only --json FILE \
        --recipes w4a8-rtn,w4a8-rtn:activations=fp8,nvfp4,mxfp8
    python -m tools.bench --models minilm,smollm2 --peers modelopt,onnxruntime,nncf,onnxsim
    python -m tools.bench --bits 4 --models smollm2,minilm --peers modelopt,onnxruntime,onnxsim

The second gives the perplexity alone; what FILE has of it is not measured again. The third runs
onnxq and its peers side by side, each in an environment of its own, made the first time; the table,
its data and a picture go into models/out/bench/. Results are kept: `--fresh` measures again. The
fourth does that with the methods for INT4 weights, at equal bits.

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
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from onnxq.files import write_json
from tools.bench.models import CASES
from tools.bench.peers import FLOOR, OURS, PEERS
from tools.bench.speed import speed_rows

_RIVALS = tuple(name for name in PEERS if name not in (FLOOR, OURS))
_PACKAGES = ("onnxq", "onnx", "onnxruntime", "tensorrt-rtx", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure onnxq on real models.")
    parser.add_argument("--models", help=f"joined by commas, of {','.join(CASES)}")
    parser.add_argument("--peers", help=f"side by side: of {','.join(_RIVALS)}")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of the peers' methods")
    parser.add_argument("--limit", type=float, default=3600, help="seconds for a run of a peer")
    parser.add_argument("--fresh", action="store_true", help="run peers again that have results")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each; medians are shown")
    parser.add_argument("--no-speed", action="store_true", help="accuracy and coverage only")
    parser.add_argument("--recipes", help="instead of the model's: NAME[:FIELD=VALUE...], ...")
    parser.add_argument("--windows", type=int, default=16, help="of text, for perplexities")
    parser.add_argument("--samples", type=int, help="of calibration text")
    parser.add_argument("--task-only", action="store_true", help="nothing compared or compiled")
    parser.add_argument("--json", type=Path, help="also write the figures here, row by row")
    options = parser.parse_args()
    models = _names(parser, options.models, _taking_part(options.peers, options.bits))
    console = Console(width=170)
    command = f"python -m tools.bench {' '.join(sys.argv[1:])}"
    console.print(f"$ {command}")
    console.print(_machine())
    if options.peers:
        peers = _names(parser, options.peers, _RIVALS)
        _side_by_side(console, command, models, peers, options)
        return
    _measure(console, models, options)


def _measure(console: Console, models: list[str], options: argparse.Namespace) -> None:
    from tools.bench.accuracy import Measuring, measure

    figures: dict[str, Any] = {"accuracy": [], "speed": []}
    if options.json and options.json.exists():
        figures = json.loads(options.json.read_text())
    figures["machine"] = _machine()

    def keep() -> None:
        if options.json:
            write_json(options.json, figures)

    recipes = tuple(options.recipes.split(",")) if options.recipes else ()
    measuring = Measuring(recipes, options.windows, options.samples, options.task_only)
    measure([CASES[name] for name in models], measuring, figures["accuracy"], keep)
    console.print(_accuracy_table([r for r in figures["accuracy"] if r["model"] in models]))
    if not (options.no_speed or options.recipes):
        figures["speed"] = speed_rows([name for name in models if name != "ppocr"])
        console.print(_speed_table(figures["speed"]))
    keep()


def _taking_part(side_by_side: str | None, bits: int) -> tuple[str, ...]:
    """The models of a table."""
    if not side_by_side:
        return tuple(CASES)
    return tuple(n for n, case in CASES.items() if (case.four if bits == 4 else case.shared))


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
    options: argparse.Namespace,
) -> None:
    from tools.bench import plot, tables
    from tools.bench.bars import bars, bars_at_four_bits, losses
    from tools.bench.side_by_side import BENCH, side_by_side

    four = options.bits == 4
    settings = {name: getattr(options, name) for name in ("bits", "fresh", "rounds", "limit")}
    rows = side_by_side(models, peers, **settings)
    found = bars_at_four_bits(rows) if four else bars(rows)
    versions = list(dict.fromkeys(f"{r['peer']}: {_listed(r['versions'])}" for r in rows))
    for line in (*versions, *tables.notes(rows)):
        console.print(line, highlight=False)
    console.print(tables.terminal(rows))
    if found:
        console.print(tables.bars_table(found))
    if worse := losses(rows):
        console.print("where a peer does better:", *worse, sep="\n  ", highlight=False)
    content = {"command": command, "machine": _machine(), "rows": rows, "bars": found}
    base = BENCH / ("bench-4bit" if four else "bench")
    base.with_suffix(".json").write_text(json.dumps(content, indent=2, default=vars) + "\n")
    page = tables.markdown(command, _machine(), versions, rows, found)
    base.with_suffix(".md").write_text(page)
    drawn = base.with_suffix(".png")
    plot.draw(rows, drawn, f"{platform.machine()}, {os.cpu_count()} cores, no GPU")
    console.print(f"saved: {base}.json, .md, .png")


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _machine() -> str:
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in _PACKAGES)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"Python {platform.python_version()}, {versions}; {os.cpu_count()} cores "
        f"({platform.machine()}), {memory:.0f} GiB, no GPU"
    )


def _accuracy_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="held-out accuracy, and what sm89 compiles")
    headings = "model,recipe,size,SNR dB,cosine,yardstick,compiled,missed,s,CPU s,peak MB"
    for heading in headings.split(","):
        table.add_column(heading, justify="left" if heading in ("model", "recipe") else "right")
    for row in rows:
        value = f"{row['yardstick']} {row['value']:.3f}" if row["value"] is not None else ""
        if row["recipe"] == "original":
            table.add_row(row["model"], "original", "1", "", "", value)
            continue
        compared, compiled, missed = ("", ""), "", ""
        if "products" in row:
            compared = f"{float(row['snr']):.2f}", f"{row['cosine']:.5f}"
            compiled = "; ".join(
                f"{kind} " + ", ".join(f"{n} {what}" for what, n in counts.items())
                for kind, counts in row["products"].items()
                if counts
            )
            missed = str(row["missed"])
        table.add_row(
            row["model"], row["recipe"], f"{row['size']:.2f}", *compared, value, compiled, missed,
            f"{row['seconds']:.1f}", f"{row['cpu']:.1f}", f"{row['peak'] / 1e6:.0f}",
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
