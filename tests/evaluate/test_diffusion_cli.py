"""`onnxq evaluate diffusion` as typed: what it prints, saves and refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from evaluate_models import write

import onnxq
from onnxq.cli import main

# Half of the sample and something of the text, or of nothing.
HALF = """agraph (float[B,2,H,W] sample, float[B] timestep, float[B,3] text)
    => (float[B,2,H,W] noise) { half = Constant<value = float {FACTOR}>()
    axis = Constant<value = int64[1] {1}>()  mean = ReduceMean<keepdims = 1>(text, axis)
    axes = Constant<value = int64[2] {2, 3}>()  wide = Unsqueeze(mean, axes)
    part = Mul(sample, half)  noise = Add(part, wide) }"""
BARE = """agraph (float[B,2,4,4] sample, int64 timestep) => (float[B,2,4,4] noise) {
    noise = Identity(sample) }"""
FLAT = """agraph (float[B,4] sample, int64[1] timestep) => (float[B,4] noise) {
    noise = Identity(sample) }"""
SCORES = """agraph (float[N,2,4,4] x) => (float[N,2] scores) {
    axes = Constant<value = int64[2] {2, 3}>()  scores = ReduceMean<keepdims = 0>(x, axes) }"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write(tmp_path / "m.onnx", HALF.replace("FACTOR", "0.5"))
    write(tmp_path / "q.onnx", HALF.replace("FACTOR", "0.49"))
    write(tmp_path / "bare.onnx", BARE)
    write(tmp_path / "flat.onnx", FLAT)
    write(tmp_path / "c.onnx", SCORES)
    write(tmp_path / "other.onnx", "agraph (float[N,4] x) => (float[N,4] y) { y = Identity(x) }")
    text = np.float32([[0, 0.1, 0.2], [1, 0, -1]])
    np.savez(tmp_path / "text.npz", text=text, label=[0, 1])
    np.savez(tmp_path / "guided.npz", **{"text": text, "negative.text": text[:1] * 0})
    np.savez(tmp_path / "no_label.npz", text=text)
    np.savez(tmp_path / "wrong.npz", texts=text)
    np.savez(tmp_path / "uneven.npz", text=text, label=[1])
    np.savez(tmp_path / "deep.npz", text=text[:, :, None])
    np.savez(tmp_path / "far.npz", text=text, label=[0, 7])
    np.savez(tmp_path / "negative.npz", **{"text": text, "negative.text": text.T})
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def typed(words: str) -> Result:
    return CliRunner().invoke(main, ["evaluate", "diffusion", *words.split()])


def test_prints_and_saves(folder: Path) -> None:
    words = "--conditions text.npz --size 2x4x4 --steps 4 --samples 6 --classifier c.onnx"
    done = typed(f"q.onnx --reference m.onnx {words} --report r.json --picture p.png")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == "6 samples from the same noise, 4 steps of DDIM, epsilon"
    assert lines[1].startswith("PSNR ") and " dB worst (sample " in lines[1]
    assert lines[2].startswith("SNR dB behind timestep 751: ")
    assert lines[3].startswith("class as asked: ")
    assert "note: schedule: SDXL's" in lines
    saved = json.loads((folder / "r.json").read_text())
    assert saved["samples"] == 6 and saved["match"]["samples"] == 6
    assert [step["timestep"] for step in saved["by_step"]] == [751, 501, 251, 1]
    assert (folder / "p.png").read_bytes().startswith(b"\x89PNG")
    api = onnxq.evaluate_diffusion(
        "q.onnx", "m.onnx", conditions="text.npz", size=(2, 4, 4), steps=4, samples=6
    )
    assert api.found is not None and api.found.psnr == saved["psnr"] and api.passed


def test_a_check_fails(folder: Path) -> None:
    words = "q.onnx --reference m.onnx --conditions text.npz --size 2x4x4 --steps 4"
    assert typed(f"{words} --min-psnr 5").exit_code == 0
    done = typed(f"{words} --min-psnr 150")
    assert done.exit_code == 1 and done.output.startswith("2 samples")


def test_a_model_without_conditions(folder: Path) -> None:
    done = typed("bare.onnx --reference bare.onnx --prediction v_prediction --betas linear")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("1 sample from the same noise, 20 steps of DDIM, v_prediction\n")
    assert "note: schedule: SDXL's, with linear and v_prediction" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("none.onnx --reference m.onnx", "no such file: none.onnx"),
        ("q.onnx --reference text.npz", "text.npz"),
        ("other.onnx --reference other.onnx", "it is no diffusion model"),
        ("bare.onnx --reference m.onnx", "only models of the same inputs"),
        ("q.onnx --reference m.onnx", "the model takes text too; give --conditions"),
        ("q.onnx --reference m.onnx --conditions none.npz", "none.npz"),
        ("q.onnx --reference m.onnx --conditions empty", "empty holds no .npz"),
        ("q.onnx --reference m.onnx --conditions m.onnx", "cannot be read as .npz"),
        ("q.onnx --reference m.onnx --conditions wrong.npz", "lacks the input 'text'"),
        ("q.onnx --reference m.onnx --conditions uneven.npz", "not the same number of conditions"),
        ("q.onnx --reference m.onnx --conditions text.npz", "leaves the size of a sample open"),
        ("q.onnx --reference m.onnx --conditions text.npz --size 4x4", "not samples of 4x4"),
        ("q.onnx --reference m.onnx --conditions text.npz --size 2x4x", "cannot read the size"),
        ("q.onnx --reference m.onnx --conditions deep.npz --size 2x4x4", "the input is text"),
        ("q.onnx --reference m.onnx --conditions negative.npz", "as many negative rows"),
        ("bare.onnx --reference bare.onnx --steps 1001", "1001 steps of the 1000"),
        ("bare.onnx --reference bare.onnx --guidance 3", "guidance needs what to lead away from"),
        ("bare.onnx --reference bare.onnx --guidance nan", "a guidance of nan"),
        ("bare.onnx --reference bare.onnx --scheduler none.json", "cannot read the schedule"),
        ("bare.onnx --reference bare.onnx --classifier c.onnx", "hold no labels"),
        (
            "q.onnx --reference m.onnx --conditions text.npz --size 2x4x4 --classifier bare.onnx",
            "bare.onnx is no classifier: 2 inputs",
        ),
        (
            "q.onnx --reference m.onnx --conditions far.npz --size 2x4x4 --classifier c.onnx",
            "the labels go up to 7",
        ),
        (
            "q.onnx --reference m.onnx --conditions text.npz --size 2x4x4 --picture none/p.png",
            "there is no folder none",
        ),
        ("flat.onnx --reference flat.onnx --picture p.png", "samples of 4 are no pictures"),
    ],
)
def test_refuses_in_one_line(folder: Path, words: str, message: str) -> None:
    done = typed(words)
    assert done.exit_code == 2, done.output
    lines = done.output.splitlines()
    assert len(lines) == 1 and lines[0].startswith("onnxq: error: ") and message in lines[0]
