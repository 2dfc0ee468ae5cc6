"""Quantizing a model from a calibration table, beside copying its files to the disk.

    python -m tools.from_table models/out/sdxl-unet-full-fp16/model.onnx
    python -m tools.from_table MODEL.onnx --recipes sdxl-int8 --rounds 5 --table sdxl-int8=TABLE.npz

In turn: `cp` and `sync` of the model's files into a temporary folder (of TMPDIR), and `onnxq
quantize --load-calib`; the first of each, which fills the page cache, does not count. Prints how
many times the copy's time quantizing took (the median), CPU seconds, peak memory, and the seconds
of every round. Without --table one is made up: random numbers of every statistic that the recipe
asks for, so that all is computed that real ones would have computed.
"""

from __future__ import annotations

import argparse
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tools.bench.child import Usage, measured, onnxq

_RECIPES = ("sdxl-fp8", "sdxl-int8")
_STEPS = (981.0, 1.0)  # denoising steps of made-up statistics, the first of them louder
_ROWS = 300
_COPY = 'folder=$1; shift; cp "$@" "$folder" && sync "$folder"/*'


@dataclass(frozen=True)
class Round:
    """One copy, and one run of onnxq behind it."""

    copy: Usage
    ours: Usage

    @property
    def ratio(self) -> float:
        """Seconds of ours over those of the copy."""
        return self.ours.wall / self.copy.wall


def made_up(model: Path, recipe: str, out: Path) -> None:
    """Save a calibration table of random numbers that fits the recipe."""
    from onnxq.calibrate.statistics import make
    from onnxq.calibrate.table import CalibrationTable, DataOrigin
    from onnxq.choosing import placed
    from onnxq.ranging import watched_tensors
    from onnxq.recipe import load
    from onnxq.report import Report

    graph, placement = placed(model, load(recipe), "sm89", Report(""), "fp16")
    channels = {}
    for site in (decision.site for decision in placement.quantized):
        if site.operand is not None:
            axis = -2 if site.kind == "linear" else 1
            channels[site.node.inputs[0].name] = site.operand.shape[axis]
    statistics = {}
    for name, kinds in watched_tensors(placement).items():
        statistics[name] = make(kinds)
        random = np.random.default_rng(zlib.crc32(name.encode()))
        peaks = random.lognormal(0, 0.5, channels.get(name, 64)).astype(np.float32)
        for statistic in statistics[name].values():
            _fill(statistic, peaks, random)
    origin = DataOrigin("made up", "0", len(_STEPS))
    CalibrationTable(graph.fingerprint, statistics, (origin,)).save(out)


def _fill(statistic: Any, peaks: Any, random: np.random.Generator) -> None:
    """Let a statistic see rows whose channels reach `peaks`."""
    rows = (random.uniform(-1, 1, (_ROWS, peaks.size)) * peaks).astype(np.float32)
    rows[0] = peaks
    if getattr(statistic, "axis", -1) != -1:  # channels are axis 1 of a convolution's input
        rows = rows.T[None]
    for loudness, step in enumerate(reversed(_STEPS), 1):
        if hasattr(statistic, "now"):
            statistic.now = step
        statistic.update(rows * np.float32(loudness / len(_STEPS)))


def rounds(model: Path, recipe: str, table: Path, count: int) -> list[Round]:
    """Copy and quantize in turn; the first of each does not count."""
    from onnxq.graph.model import Model

    files = [model, *sorted({v.extent.path for v in Model.load(model).stored_outside()})]
    found = []
    for _ in range(count + 1):
        with tempfile.TemporaryDirectory() as folder:
            copy = measured(["sh", "-c", _COPY, "copy", folder, *files])
        with tempfile.TemporaryDirectory() as folder:
            options = ("--recipe", recipe, "--load-calib", table)
            ours = onnxq("quantize", model, "-o", Path(folder, "model.onnx"), *options)
        if copy.code != 0:
            raise RuntimeError(f"copying {model}: {copy.said}")
        found.append(Round(copy, ours))
    return found[1:]


def lines(recipe: str, found: Sequence[Round]) -> list[str]:
    """What to print of a recipe's rounds."""
    each = ", ".join(f"{r.ours.wall:.1f} / {r.copy.wall:.1f}" for r in found)
    cpu, peak = median(r.ours.cpu for r in found), max(r.ours.peak for r in found)
    return [
        f"{recipe}: {median(r.ratio for r in found):.1f} x copying the file, "
        f"{cpu:.1f} CPU seconds, {peak / 1e6:.0f} MB",
        f"  seconds of each round, quantizing / copying: {each}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time quantizing from a calibration table.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipes", default=",".join(_RECIPES), help="joined by commas")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--table", action="append", default=[], help="RECIPE=TABLE.npz")
    options = parser.parse_args()
    given = dict(entry.split("=", 1) for entry in options.table)
    with tempfile.TemporaryDirectory() as folder:
        for recipe in options.recipes.split(","):
            table = Path(given.get(recipe) or Path(folder, f"{recipe}.npz"))
            if recipe not in given:
                made_up(options.model, recipe, table)
            print(*lines(recipe, rounds(options.model, recipe, table, options.rounds)), sep="\n")


if __name__ == "__main__":
    main()
