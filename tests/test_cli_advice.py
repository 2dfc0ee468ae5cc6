"""`onnxq recommend` and `onnxq evaluate choice` as typed: what they print, save and refuse."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from tokenizers import Tokenizer, models, pre_tokenizers

from onnxq.cli_options import parse_share
from onnxq.errors import OnnxqError

Cli = Callable[..., "subprocess.CompletedProcess[str]"]

CONSTANT = """<ir_version: 10, opset_import: ["": 21]>
g (int64[B,S] input_ids) => (float[B,S,8] logits) { logits = Gather(t, input_ids) }"""


def test_recommend_prints_the_recipe_and_the_command(cli: Cli, tmp_path: Path) -> None:
    words = ["recommend", "--gpu", "h100", "--workload", "offline", "--accuracy-budget", "0.5%"]
    done = cli(*words, "--report", tmp_path / "report.json")
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("recipe fp8-gptq (W8A8: FP8")
    assert lines[-1].startswith("onnxq quantize model.onnx --recipe fp8-gptq --target sm90 --text")
    assert [line.split()[0] for line in lines[1:5]] == [
        *("workload", "GPU", "concurrency", "accuracy")
    ]
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved["recipe"] == "fp8-gptq" and saved["gpu"]["name"] == "H100 SXM"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--gpu h999 --workload online", "unknown GPU 'h999'"),
        ("--gpu h100 --workload online --accuracy-budget much", "cannot read the share 'much'"),
        ("--gpu h100 --workload online --accuracy-budget 0", "out of range"),
        ("none.onnx --gpu h100 --workload online", "no such file: none.onnx"),
    ],
)
def test_recommend_refuses_in_one_line(cli: Cli, words: str, message: str) -> None:
    done = cli("recommend", *words.split())
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr


def test_shares() -> None:
    assert parse_share("0.5%") == parse_share(" 0.005 ") == parse_share(".5 %") == 0.005
    for text in ("", "%", "-1%", "1%%", "1,5%", "nan"):
        with pytest.raises(OnnxqError, match="cannot read the share"):
            parse_share(text)


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """A model that always says B, a tokenizer and two questions."""
    words = [":", "A", "B", "C", "D", "Answer", "is", "[?]"]
    built = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[?]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.save(str(tmp_path / "tokenizer.json"))
    table = np.zeros((8, 8), np.float32)
    table[:, 2] = 3
    model = parser.parse_model(CONSTANT)
    model.graph.initializer.append(numpy_helper.from_array(table, "t"))
    onnx.save(model, tmp_path / "m.onnx")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "tasks.csv").write_text("Which is it?,a,b,c,d,B\nAnd now?,a,b,c,d,D\n")
    return tmp_path


def test_choice_prints_and_saves(cli: Cli, asked: Path) -> None:
    words = [
        "evaluate",
        "choice",
        "m.onnx",
        "--tasks",
        "tasks.csv",
        "--tokenizer",
        "tokenizer.json",
    ]
    done = cli(*words, "--reference", "m.onnx", "--report", "report.json", cwd=asked)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("accuracy  50.0 % (1 of 2), 95 % interval 9.5 % to 90.5 %;")
    assert "same choice at 100.0 % of questions" in done.stdout
    saved = json.loads((asked / "report.json").read_text())
    assert saved["accuracy"] == 0.5 and saved["divergence"] == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--tasks none.csv --tokenizer tokenizer.json", "cannot read the questions none.csv"),
        ("--tasks pipe --tokenizer tokenizer.json", "the questions pipe: it is not a file"),
        ("--tasks tasks.csv --tokenizer none.json", "none.json does not exist"),
        ("--tasks m.onnx --tokenizer tokenizer.json", "cannot read the questions m.onnx"),
        ("--tasks tasks.csv --tokenizer tasks.csv", "cannot read the tokenizer tasks.csv"),
        ("--tasks tasks.csv --tokenizer tokenizer.json --shots none", "cannot read the questions"),
    ],
)
def test_choice_refuses_in_one_line(cli: Cli, asked: Path, words: str, message: str) -> None:
    done = cli("evaluate", "choice", "m.onnx", *words.split(), cwd=asked)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and message in done.stderr
