"""Whether a recipe beats rounding to nearest on every draw of calibration data, or just on one.

    python -m tools.bench.seeds MODEL [RECIPE] [--draws 5] [--samples N] [--windows N] [--json FILE]

Draws are disjoint pieces of the calibration data. SmolLM2: perplexity of the first windows of the
evaluation text; others: SNR of the first output over the held-out data.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from onnxq.files import write_json
from tools.bench.models import CASES, SMOLLM2, WIKI, Case, data, perplexity

_TOKENS = 256  # of a window of calibration text


def main() -> None:
    parser = argparse.ArgumentParser(description="A recipe on several draws of calibration data.")
    parser.add_argument("model", choices=[name for name, case in CASES.items() if case.four])
    parser.add_argument("recipe", nargs="?", default="int4-gptq")
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--samples", type=int, default=8, help="of each draw")
    parser.add_argument("--windows", type=int, default=4, help="of the evaluation text")
    parser.add_argument("--json", type=Path, help="also write the figures here, one by one")
    options = parser.parse_args()
    case = CASES[options.model]
    columns = _columns(case, options.draws * options.samples)
    figures: dict[str, float] = {}
    if options.json and options.json.exists():
        figures = json.loads(options.json.read_text())
    with TemporaryDirectory() as folder:
        for draw in range(options.draws + 1):
            name = "int4-rtn" if draw == 0 else f"{options.recipe} {draw}"
            if name not in figures:
                first = (draw - 1) * options.samples
                rows = {n: a[first : first + options.samples] for n, a in columns.items()}
                np.savez(Path(folder, "calib.npz"), **rows)
                figures[name] = _figure(case, name.split()[0], Path(folder), options.windows)
                if options.json:
                    write_json(options.json, figures)
            print(f"{case.name} {name:14} {figures[name]:.3f}", flush=True)


def _columns(case: Case, rows: int) -> dict[str, Any]:
    """The model's inputs, a row a sample."""
    from onnxq.graph.model import Model
    from onnxq.samples import Data

    given = data(case.calib)
    if given.text is not None:
        tokenizer = SMOLLM2 / "tokenizer.json"
        given = Data(
            text=WIKI / "wiki_calib.txt", tokenizer=tokenizer, seq_len=_TOKENS, samples=rows
        )
    feeds = list(given.open(Model.load(case.model).inputs()))
    columns = {name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]}
    if len(next(iter(columns.values()))) < rows:
        raise SystemExit(f"there are fewer than {rows} samples: ask for smaller draws")
    return columns


def _figure(case: Case, recipe: str, folder: Path, windows: int) -> float:
    import onnxq

    made = folder / "model.onnx"
    calib = None if recipe == "int4-rtn" else folder / "calib.npz"
    changes = [f"block_size={case.block}"]
    onnxq.quantize(case.model, made, recipe=recipe, changes=changes, calib=calib)
    if case.tokens:
        return perplexity(made, windows)
    found = onnxq.compare(case.model, made, data=data(case.heldout_four), fp16=False)
    snr = found.comparison.rows[0].found.error.snr if found.comparison else None
    return float("nan") if snr is None else snr


if __name__ == "__main__":
    main()
