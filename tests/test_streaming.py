"""Weights alone, on real models: what is written, how large it is, and what memory it took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

import onnxq
from onnxq.calibrate.session import open_session
from onnxq.graph.dtypes import payload_bytes

CHILD = """
import json, sys
from pathlib import Path
import onnxq

def peak():  # of this program alone: ru_maxrss would begin with its parent's
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(l.split()[1]) * 1024 for l in lines if l.startswith("VmHWM"))

if sys.argv[3] == "prune":
    onnxq.prune(sys.argv[1], sys.argv[2])
else:
    onnxq.quantize(sys.argv[1], sys.argv[2], recipe=sys.argv[3], target=sys.argv[4])
print(json.dumps(peak()))
"""


def payloads(path: Path) -> dict[str, tuple[int, int]]:
    """Type and bytes of each initializer."""
    model = onnx.load(path, load_external_data=False)
    read = {i for n in model.graph.node for i in n.input}
    assert {t.name for t in model.graph.initializer} <= read, "initializers that nothing reads"
    return {
        t.name: (t.data_type, payload_bytes(t.data_type, t.dims)) for t in model.graph.initializer
    }


def linear_weights(path: Path) -> tuple[int, int]:
    """Bytes of the MatMul weights of a model in FP16 (but for the head's), and of all the rest."""
    model = onnx.load(path, load_external_data=False)
    shapes = {t.name: list(t.dims) for t in model.graph.initializer}
    second = {n.input[1] for n in model.graph.node if n.op_type == "MatMul"} & shapes.keys()
    gathered = {n.input[0] for n in model.graph.node if n.op_type == "Gather"}
    linear = sum(2 * int(np.prod(shapes[name])) for name in second - gathered)
    everything = sum(2 * int(np.prod(dims)) for dims in shapes.values())
    return linear, everything - linear


@pytest.mark.parametrize(
    ("recipe", "target", "share"),
    [
        ("int4-rtn", "sm89", 0.30),
        ("w4a8-rtn-dynamic", "sm89", 0.30),
        ("nvfp4", "sm120", 0.30),
        ("int8-weight-only", "sm89", 0.51),
    ],
)
def test_smollm2_takes_the_bytes_it_should(
    recipe: str, target: str, share: float, models: Path, tmp_path: Path
) -> None:
    source, out = models / "smollm2-fp16/model.onnx", tmp_path / "out.onnx"
    made = onnxq.quantize(source, out, recipe=recipe, target=target)
    linear, rest = linear_weights(source)
    assert linear == 2 * 30 * (2 * 576**2 + 2 * 576 * 192 + 3 * 576 * 1536)
    data = sum(p.stat().st_size for p in made.files if p.suffix == ".data")
    assert data <= share * linear + rest + 5e6, "5 MB: tables of the rotary embedding, alignment"
    stored = payloads(out)
    embedding = [n for n, (kind, size) in stored.items() if size == 2 * 49152 * 576]
    assert len(embedding) == 1, "the table and the head it is tied to, once, in FP16"
    assert stored[embedding[0]][0] == TensorProto.FLOAT16
    for path in tmp_path.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    "recipe", ["int4-rtn", "int8-weight-only", "fp8-weight-only", "w4a8-rtn-dynamic"]
)
def test_onnxruntime_loads_what_is_written(recipe: str, models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    onnxq.quantize(models / "minilm/model.onnx", out, recipe=recipe)
    session = open_session(out, device="cpu")
    feed = dict(np.load(models / "minilm/heldout.npz"))
    (found,) = session.run(["sentence_embedding"], {k: v[:2] for k, v in feed.items()})
    assert np.isfinite(found).all() and found.shape == (2, 384)
    payloads(out)


@pytest.mark.parametrize(
    ("name", "recipe", "most"),
    [
        ("sdxl-unet-full-fp16", "w4a8-rtn-dynamic", 600e6),  # of 5.1 GB; writes 1.9
        ("smollm2-fp16", "fp8-dynamic", 200e6),  # of 270 MB; the program itself takes 110
    ],
)
def test_a_model_takes_the_memory_of_few_of_its_weights(
    name: str, recipe: str, most: float, models: Path, tmp_path: Path
) -> None:
    source, out = models / name / "model.onnx", tmp_path / "out.onnx"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, source, out, recipe, "sm89"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    for path in tmp_path.iterdir():
        path.unlink()
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) < most


def test_pruning_by_magnitude_takes_the_memory_of_one_weight(models: Path, tmp_path: Path) -> None:
    """540 MB of weights; the program itself takes about 110 MB."""
    source, out = models / "smollm2-fp32/model.onnx", tmp_path / "out.onnx"
    child = subprocess.run(
        [sys.executable, "-c", CHILD, source, out, "prune", ""],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr
    assert json.loads(child.stdout) < 220e6
    assert onnxq.check_zeros(out).passed
    for path in tmp_path.iterdir():
        path.unlink()
