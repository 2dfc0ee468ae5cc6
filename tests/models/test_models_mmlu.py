"""Questions out of lm-eval's YAML."""

from __future__ import annotations

import csv
import zipfile
from pathlib import Path

import pytest

from models import mmlu_dev, packages

YAML = """
task: mmlu_flan_cot_fewshot_some_law
doc_to_text: !function utils.text
fewshot_config:
  sampler: first_n
  samples:
  - question: 'What, "exactly"?

      (A) one (B) two words (C) 3, or 4 (D) none'
    target: Let's think. The answer is (C).
  - question: "Which?\\n(A) a (B) b (C) c (D) d (E) e"
    target: The answer is (E).
  - question: "Says (A) or (B) nothing?\\n(A) yes (B) no (C) both (D) neither"
    target: "Sure. The answer is B."
"""


def test_samples_become_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "lm_eval.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("lm_eval/tasks/mmlu/flan_cot_fewshot/mmlu_some_law.yaml", YAML)
        archive.writestr("lm_eval/tasks/mmlu/default/mmlu_other.yaml", "task: other")
    monkeypatch.setattr(packages, "download", lambda package: wheel)
    mmlu_dev.build(tmp_path / "mmlu")
    (path,) = (tmp_path / "mmlu").iterdir()
    assert path.name == "some_law_dev.csv"
    with path.open(newline="") as stream:
        rows = list(csv.reader(stream))
    assert rows == [
        ['What, "exactly"?', "one", "two words", "3, or 4", "none", "C"],
        ["Says (A) or (B) nothing?", "yes", "no", "both", "neither", "B"],
    ]
