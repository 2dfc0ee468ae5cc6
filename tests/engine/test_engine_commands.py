"""The command lines for the machine with the GPU: exact texts, and read back by Polygraphy."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from onnxq.engine.commands import (
    polygraphy_convert,
    polygraphy_run,
    rtx_command,
    trtexec_commands,
)
from onnxq.engine.shapes import parse_shapes

MODEL, ENGINE = Path("dir with space/m.onnx"), Path("m.plan")
ONE = [parse_shapes(["ids:1x1,1x256,4x512", "in:0:1x2", "t:"])]
TWO = [parse_shapes(["x:1x64,2x64,4x64"]), parse_shapes(["x:1x64"])]


def test_trtexec() -> None:
    (line,) = trtexec_commands(MODEL, ENGINE, ONE)
    assert shlex.split(line) == [
        "trtexec",
        "--onnx=dir with space/m.onnx",
        "--saveEngine=m.plan",
        "--stronglyTyped",
        "--minShapes=ids:1x1,'in:0':1x2,t:",
        "--optShapes=ids:1x256,'in:0':1x2,t:",
        "--maxShapes=ids:4x512,'in:0':1x2,t:",
        "--profilingVerbosity=detailed",
        "--exportLayerInfo=m.plan.layers.json",
    ]


def test_sparse_weights_are_said() -> None:
    words = shlex.split(trtexec_commands(MODEL, ENGINE, ONE, sparse=True)[0])
    assert words[4] == "--sparsity=enable"
    assert "--sparse-weights" in shlex.split(polygraphy_convert(MODEL, ENGINE, ONE, sparse=True))
    assert "spars" not in polygraphy_convert(MODEL, ENGINE, ONE)


def test_trtexec_takes_one_profile_a_command() -> None:
    lines = trtexec_commands(MODEL, ENGINE, TWO)
    assert [[w for w in shlex.split(x) if "save" in w or "opt" in w] for x in lines] == [
        ["--saveEngine=m.plan.0", "--optShapes=x:2x64"],
        ["--saveEngine=m.plan.1", "--optShapes=x:1x64"],
    ]


def test_a_static_model_needs_no_shapes() -> None:
    assert "Shapes" not in trtexec_commands(MODEL, ENGINE, [])[0]
    assert "shapes" not in polygraphy_convert(MODEL, ENGINE, [()])
    assert "shapes" not in polygraphy_run(MODEL, [()])


def test_rtx_names_its_targets_as_numbers() -> None:
    words = shlex.split(rtx_command(MODEL, ENGINE, ONE, ("sm89", "sm120")))
    assert words[0] == "tensorrt_rtx"
    assert "--computeCapabilities=89,120" in words


def test_polygraphy_run_loads_inputs_or_fills_the_optimum() -> None:
    assert shlex.split(polygraphy_run(MODEL, TWO))[-2:] == ["--input-shapes", "x:[2,64]"]
    words = shlex.split(polygraphy_run(MODEL, TWO, Path("held out.json")))
    assert words[-2:] == ["--load-inputs", "held out.json"]
    assert "--input-shapes" not in words


def test_polygraphy_reads_our_shapes(tmp_path: Path) -> None:
    """Polygraphy itself turns the command into a script with both profiles."""
    pytest.importorskip("polygraphy")
    words = shlex.split(polygraphy_run(Path("m.onnx"), TWO))
    script = tmp_path / "generated.py"
    words = [w for w in words if w != "--onnxrt"] + ["--gen", str(script)]
    start = "from polygraphy.tools import main; main()"
    command = [sys.executable, "-c", start, *words[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    text = script.read_text()
    assert "min=[1, 64], opt=[2, 64], max=[4, 64]" in text
    assert "min=[1, 64], opt=[1, 64], max=[1, 64]" in text
    assert "strongly_typed=True" in text
