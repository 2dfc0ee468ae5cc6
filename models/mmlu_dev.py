"""281 multiple-choice questions: MMLU's development set, from the lm-eval wheel.

    python -m models.mmlu_dev [--out DIR] [--force]

writes models/out/mmlu/<subject>_dev.csv, 57 files in MMLU's own format (no header; question, A, B,
C, D, letter of the answer), about five questions each; one question with five choices is left out.
Too few to tell models apart by accuracy (a standard error of 3 points), enough to see that a
quantized model still chooses as its original does.

License: MIT, both MMLU (Hendrycks et al. 2021) and lm-eval.
"""

from __future__ import annotations

import argparse
import csv
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from models import packages
from models.files import OUT, finished, shown, staged

FOLDER = OUT / "mmlu"
_TASKS = "lm_eval/tasks/mmlu/flan_cot_fewshot/mmlu_"

Row = tuple[str, str, str, str, str, str]


def row(sample: Mapping[str, str]) -> Row | None:
    """question, A, B, C, D, letter; None where the sample has no four choices or no answer."""
    text, _, rest = sample["question"].partition("\n(A)")
    choices = re.findall(r"\(([A-E])\)\s*(.*?)(?=\s*\([A-E]\)|$)", f"(A){rest}", re.S)
    answer = re.search(r"answer is \(?([A-D])\)?", sample["target"])
    if answer is None or [letter for letter, _ in choices] != list("ABCD"):
        return None
    a, b, c, d = (content.strip() for _, content in choices)
    return (text.strip(), a, b, c, d, answer[1])


def subjects(wheel: Path) -> Iterator[tuple[str, list[Row]]]:
    """Name and questions of each subject."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not (name.startswith(_TASKS) and name.endswith(".yaml")):
                continue
            # BaseLoader: text only, so that lm-eval's own tags construct nothing.
            task: Any = yaml.load(archive.read(name).decode(), Loader=yaml.BaseLoader)
            samples = task.get("fewshot_config", {}).get("samples", [])
            yield name[len(_TASKS) : -len(".yaml")], [r for s in samples if (r := row(s))]


def build(folder: Path = FOLDER) -> None:
    """Write the files into `folder`."""
    found = dict(subjects(packages.download(packages.LM_EVAL)))
    with staged(folder) as stage:
        for name, rows in found.items():
            with (stage / f"{name}_dev.csv").open("w", encoding="utf-8", newline="") as stream:
                csv.writer(stream).writerows(rows)
    count = sum(map(len, found.values()))
    print(f"{shown(folder)}: {count} questions on {len(found)} subjects")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.mmlu_dev", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="rebuild what is there")
    options = parser.parse_args()
    if not finished(options.out / "abstract_algebra_dev.csv", force=options.force):
        build(options.out)


if __name__ == "__main__":
    packages.script(main)
