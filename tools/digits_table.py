"""The trained digits model through every recipe, beside ModelOpt's, on the same calibration data.

    python -m tools.digits_table [--samples 200] [--recipes NAME ...] [--peers] [--out DIR]

quantizes models/out/digits, samples from each result and from the original from the same noise
(`onnxq evaluate diffusion`, 20 steps, guidance 2, noise the calibration never saw), and compiles it
for sm89. A recipe's name may be followed by changes, as in sdxl-fp8:level=3. Beside ModelOpt, each
is held against the best of ModelOpt's in the same format, sample by sample, since the same noise
makes the same samples hard for all: the mean difference, its standard error, and the means of five
parts of the samples. Prints a Markdown table and saves it with all figures and a picture of each
recipe in models/out/bench/digits. What is there is not made again; delete the folder for a fresh
run.

ModelOpt is run by its documented call in an environment of its own (--peers makes it: 3 GB), but
for its pass on Concat, which fails here (tools/bench/recipes/modelopt_peer.py).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from tools.bench.models import OUT
from tools.bench.peers import PEERS

DIGITS = OUT / "digits"
SHAPES = ["sample:2x1x16x16", "timestep:2", "encoder_hidden_states:2x32x32"]
SEED = 40_000  # beyond that of calib.npz
STEPS, GUIDANCE, BATCH = 20, 2.0, 20
RECIPES = (
    "fp16",
    "fp8",
    "fp8-dynamic",
    "fp8-attention",
    "fp8-gptq",
    "sdxl-fp8:level=3",
    "sdxl-fp8:level=4",
    "int8",
    "int8-dynamic",
    "int8-smoothquant",
    "sdxl-int8",
    "sdxl-int8:conv_calibrator=max",
    "sdxl-int8:conv_calibrator=steps",
    "int4-rtn:block_size=32",
    "int4-best:block_size=32",
)
MODELOPT = tuple(f"{name}-no-concat" for name in ("fp8", "int8", "int8-max", "int8-max-no-add"))

Row = dict[str, Any]


def quantized(folder: Path, recipe: str, output: Path) -> None:
    """Ours."""
    import onnxq
    from onnxq.base import write_fp16
    from onnxq.calibrate.data import open_samples
    from onnxq.graph.model import Model

    source, calib = folder / "model.onnx", folder / "calib.npz"
    if recipe == "fp16":  # the price of 16 bits alone
        samples = open_samples(calib, Model.load(source).inputs())
        made = write_fp16(source, output.parent, samples=samples)
        assert made is not None
        made.rename(output)
        return
    name, *changes = recipe.split(":")
    needs = None if name.endswith(("-dynamic", "-rtn")) else calib
    onnxq.quantize(source, output, recipe=name, calib=needs, changes=changes)


def by_modelopt(folder: Path, recipe: str, output: Path) -> None:
    """Theirs, from a copy: it writes beside its input."""
    calib = (folder / "calib.npz").resolve()
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, "model.onnx")
        shutil.copyfile(folder / "model.onnx", copy)
        words = PEERS["modelopt"].command(recipe, copy, calib, output.resolve())
        done = subprocess.run(words, capture_output=True, text=True, cwd=scratch)
    if done.returncode or not output.exists():
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1][:300])


def judged(folder: Path, model: Path, samples: int, picture: Path) -> Row:
    """PSNR and class-match, and what the compiler makes of it."""
    import onnxq
    from onnxq.errors import OnnxqError

    files = [model, *model.parent.glob("*.data")]
    row: Row = {"bytes": sum(file.stat().st_size for file in files)}
    row["share"] = row["bytes"] / (folder / "model.onnx").stat().st_size
    try:
        row["samples"] = onnxq.evaluate_diffusion(
            model,
            folder / "model.onnx",
            conditions=folder / "conditions.npz",
            classifier=folder / "classifier.onnx",
            steps=STEPS,
            samples=samples,
            seed=SEED,
            guidance=GUIDANCE,
            batch=BATCH,
            picture=picture,
        ).as_dict()
    except OnnxqError as error:
        row["failed"] = error.message
    try:
        built = onnxq.build(model, model.with_suffix(".plan"), target="sm89", shapes=SHAPES)
        row["compiled"] = built.report.facts["products"]
    except OnnxqError as error:
        row["refused"] = error.message
    return row


def ratios(row: Row) -> list[float]:
    """PSNR of each sample; empty where there are none, or some are NaN or exact."""
    each = [float(ratio) for ratio in row.get("samples", {}).get("each", [])]
    return each if all(map(math.isfinite, each)) else []


def form(row: Row) -> str:
    """The format that a recipe multiplies in, of those that ModelOpt has."""
    name = row["recipe"].partition(":")[0]
    return next((word for word in ("fp8", "int8") if word in name), "")


def beside(row: Row, peers: list[Row]) -> str:
    """What a recipe has more than the best of the peer's in its format, in dB, by sample."""
    others = [one for one in peers if form(one) == form(row) and ratios(one)]
    if not form(row) or not others or not ratios(row):
        return ""
    best = max(others, key=lambda one: statistics.fmean(ratios(one)))
    more = [a - b for a, b in zip(ratios(row), ratios(best), strict=True)]
    bounds = [i * len(more) // 5 for i in range(6)]
    parts = [statistics.fmean(more[i:j]) for i, j in pairwise(bounds)]
    error = statistics.stdev(more) / math.sqrt(len(more))
    return f"{statistics.fmean(more):+.2f} +- {error:.2f} ({min(parts):+.1f} to {max(parts):+.1f})"


def line(row: Row, peers: list[Row]) -> list[str]:
    """A row of the table."""
    cells = [row["tool"], f"`{row['recipe'].replace(':', ' ')}`", f"{row.get('share', 0):.2f} x"]
    found = row.get("samples")
    if found is None:
        cells += [row.get("failed", "")[:60], "", "", ""]
    else:
        cells.append(
            "NaN"
            if found["broken"]
            else f"{found['psnr']:.2f} +- {found['psnr_error']:.2f}, worst {found['worst']:.1f}"
        )
        cells.append("" if row in peers else beside(row, peers))
        match = found["match"]
        cells.append(f"{match['share']:.3f} ({match['difference']:+.3f})")
        cells.append(
            f"{match['difference_low']:+.3f} to {match['difference_high']:+.3f}",
        )
    return [*cells, compiled(row)]


def compiled(row: Row) -> str:
    """How many products of each kind are multiplied in 8 bits."""
    if "compiled" not in row:
        return f"refused: {row.get('refused', '')[:60]}" if "share" in row else ""
    products = row["compiled"]
    said = [
        f"{sum(products[kind].get(form, 0) for form in ('fp8', 'int8'))} of "
        f"{sum(products[kind].values())} {name}"
        for kind, name in (("gemm", "linear"), ("conv", "convolutions"))
    ]
    fused = ", ".join(f"{count} {how}" for how, count in products["attention"].items())
    return f"{', '.join(said)}; attention {fused}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.digits_table", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--peers", action="store_true", help="ModelOpt too")
    parser.add_argument("--model", type=Path, default=DIGITS, metavar="DIR")
    parser.add_argument("--out", type=Path, default=OUT / "bench/digits", metavar="DIR")
    given = parser.parse_args()
    if not (given.model / "model.onnx").exists():
        sys.exit("run `python -m models.digits` first, where torch is")
    jobs = [("onnxq", recipe, quantized) for recipe in given.recipes]
    if given.peers:
        PEERS["modelopt"].environment()
        jobs += [("ModelOpt", recipe, by_modelopt) for recipe in MODELOPT]
    rows = []
    for tool, recipe, make in jobs:
        place = given.out / f"{tool}.{recipe.replace(':', '.').replace('=', '-')}"
        place.mkdir(parents=True, exist_ok=True)
        result = place / f"result.{given.samples}.json"
        if not result.exists():
            print(f"{tool} {recipe} ...", file=sys.stderr, flush=True)
            row: Row = {"tool": tool, "recipe": recipe}
            try:
                if not (place / "model.onnx").exists():
                    make(given.model, recipe, place / "model.onnx")
                row |= judged(
                    given.model, place / "model.onnx", given.samples, place / "samples.png"
                )
            except RuntimeError as error:
                row["failed"] = str(error)
            result.write_text(json.dumps(row, indent=2))
        rows.append(json.loads(result.read_text()))
    head = ["tool", "recipe", "file", "PSNR dB", "more than ModelOpt's best, by fifths"]
    head += ["class as asked", "95 %", "compiled for sm89"]
    peers = [row for row in rows if row["tool"] != "onnxq"]
    table = [head, ["---"] * len(head), *(line(row, peers) for row in rows)]
    text = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    (given.out / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
