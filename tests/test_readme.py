"""The README's commands run, as they stand there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SCRIPTS = Path(sys.executable).parent


def _commands() -> list[str]:
    """Lines of the README's indented blocks that begin with `onnxq` or `make`."""
    joined = README.replace("\\\n", " ")
    return [" ".join(m.split()) for m in re.findall(r"^ {4,}((?:onnxq|make) .*)$", joined, re.M)]


def _without_comment(command: str) -> list[str]:
    return shlex.split(command, comments=True)


def test_the_first_two_commands_are_demo_and_test() -> None:
    assert [_without_comment(c) for c in _commands()[:2]] == [["make", "demo"], ["make", "test"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README's user has it: a model, its data, a text and a tokenizer."""
    found = tmp_path_factory.mktemp("user")
    models = ROOT / "models/out"
    for name, source in {
        "model.onnx": models / "minilm/model.onnx",
        "data.npz": models / "minilm/calib.npz",
        "heldout.npz": models / "minilm/heldout.npz",
        "llm.onnx": models / "smollm2-fp32/model.onnx",
        "model.onnx.data": models / "smollm2-fp32/model.onnx.data",
        "tokenizer.json": models / "smollm2-fp32/tokenizer.json",
        "calib.txt": models / "wiki/wiki_calib.txt",
        "eval.txt": models / "wiki/wiki_eval.txt",
    }.items():
        (found / name).symlink_to(source.resolve(strict=True))
    (found / "questions.csv").write_text(
        "Which is a colour?,Seven,Green,Quickly,Under,B\nWhat is 2 + 2?,Three,Five,Four,One,C\n"
    )
    (found / "unet").symlink_to((models / "sdxl-unet-tiny-fp16").resolve(strict=True))
    captured = np.load(found / "unet/calib.npz")
    (found / "captures").mkdir()
    for row in range(0, 4, 2):  # a pipeline's calls: two rows each, of which guidance's is first
        call = {name: captured[name][row : row + 2] for name in captured.files}
        np.savez(found / f"captures/{row:04}-0000.npz", **call)
    return found


@pytest.mark.parametrize("command", [c for c in _commands() if c.startswith("onnxq")])
def test_command(command: str, folder: Path) -> None:
    words = _without_comment(command)
    words[0] = str(SCRIPTS / "onnxq")
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()


def test_python_example(folder: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_demo(tmp_path: Path) -> None:
    """The first command, in an environment of its own; what it prints is what the README shows.

    On a quarter of the text, whose ratio is the same: 1.018.
    """
    done = subprocess.run(
        ["make", "demo", f"DEMO={tmp_path}/venv", f"RESULT={tmp_path}", "SAMPLES=16", "WINDOWS=4"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"linear layers in FP8 when compiled\D*210 of 212", done.stdout)
    assert re.search(r"attentions fused when compiled\D*30 of 30", done.stdout)
    ratio = float(re.findall(r"\((\d\.\d{4}) x\)", done.stdout)[-1])
    assert ratio <= 1.02
