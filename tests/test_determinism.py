"""The same model from the same samples, whatever runs beside it and however the samples lie.

What is compared is files, written by runs of the command line. Two things are told apart:

What ONNX Runtime is not asked to do otherwise (another process, another hash seed, another order of
the samples, another form of the same data) gives the same bytes, since onnxq's own statistics are
extremes and whole numbers.

What it is asked to do otherwise, it may sum in another order: with another number of threads, or
other rows in a step. On the machine of these tests (AVX-512, onnxruntime 1.31.1) both models give
the same bytes there too, its matrix products being divided by rows and columns, never along the
sum. Where another kernel does differ, it does so in the last bits of FP32; a range moves as little,
and a scale by one unit in its last place of FP16. A clip chosen by mse is one of a grid of 1.1 %,
and can then be its neighbour: so the bound is asserted with maxima.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper


def written(
    source: Path,
    output: Path,
    *words: str,
    cpus: set[int] | None = None,
    seed: str = "0",
    cwd: Path | None = None,
) -> bytes:
    """All bytes that `onnxq quantize` writes, model first."""

    def restrict() -> None:
        if cpus is not None:
            os.sched_setaffinity(0, cpus)

    output.parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "onnxq.cli", "quantize", str(source), "-o", str(output), *words],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=cwd,
        preexec_fn=restrict,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return all_bytes(output)


@dataclass(frozen=True)
class Runs:
    """One model, its samples, and the runs that have to come to the same.

    Each folder of `folder` is one run's.
    """

    model: Path
    recipe: str
    samples: dict[str, Any]
    folder: Path

    def made(self, name: str, *words: str, calib: Path | None = None, **how: Any) -> bytes:
        output = self.folder / name / "q.onnx"
        data = ("--calib", str(self.calib if calib is None else calib))
        return written(self.model, output, "--recipe", self.recipe, *data, *words, **how)

    @property
    def calib(self) -> Path:
        return self.folder / "calib.npz"

    @property
    def first(self) -> Path:
        return self.folder / "first" / "q.onnx"


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """Of `model recipe`, with five samples: no batch of 4 divides them."""
    name, recipe = request.param.split()
    with np.load(models / name / "calib.npz") as archive:
        samples = {key: archive[key][:5] for key in archive.files}
    made = Runs(models / name / "model.onnx", recipe, samples, tmp_path_factory.mktemp(name))
    np.savez(made.calib, **samples)
    made.made("first")
    return made


def all_bytes(output: Path) -> bytes:
    """What lies at `output`, and its data."""
    return b"".join(path.read_bytes() for path in sorted(output.parent.glob(f"{output.name}*")))


@pytest.mark.parametrize("runs", ["minilm int8", "ppocr_rec fp8"], indirect=True)
def test_order_and_form_of_the_data_and_the_process_change_no_byte(runs: Runs) -> None:
    apart = runs.folder / "apart"
    apart.mkdir()
    for place, index in enumerate((3, 0, 4, 2, 1)):
        one = {key: values[index : index + 1] for key, values in runs.samples.items()}
        np.savez_compressed(apart / f"{place}.npz", **one)
    again = runs.made("elsewhere", calib=apart, seed="1", cwd=runs.folder)
    assert all_bytes(runs.first) == again


VARIANTS: dict[str, dict[str, Any]] = {
    "one processor": {"cpus": {min(os.sched_getaffinity(0))}},
    "four at a time": {"words": ("--batch", "4")},
}


@pytest.mark.parametrize(
    ("runs", "variant"),
    [
        *(("ppocr_rec fp8", name) for name in VARIANTS),
        *(("minilm fp8", name) for name in ("one processor", "four at a time")),
    ],
    indirect=["runs"],
)
def test_threads_and_batches_move_no_scale_by_more_than_its_last_place(
    runs: Runs, variant: str
) -> None:
    how = {"words": (), **VARIANTS[variant]}
    made = runs.made(variant, *how.pop("words"), **how)
    if made != all_bytes(runs.first):
        assert_near(runs.first, runs.folder / variant / "q.onnx")


@pytest.mark.parametrize(
    ("name", "recipe"), [("minilm", "fp8-dynamic"), ("ppocr_rec", "int8-dynamic")]
)
def test_without_data_too(name: str, recipe: str, models: Path, tmp_path: Path) -> None:
    source, one = models / name / "model.onnx", {min(os.sched_getaffinity(0))}
    made = [
        written(source, tmp_path / seed / "q.onnx", "--recipe", recipe, seed=seed, cpus=cpus)
        for seed, cpus in (("0", None), ("1", one))
    ]
    assert made[0] == made[1]


def assert_near(one: Path, other: Path) -> None:
    """All the same, but for scales of activations that differ by a unit in their last place."""
    left, right = onnx.load(one), onnx.load(other)
    assert [n.SerializeToString() for n in left.graph.node] == [
        n.SerializeToString() for n in right.graph.node
    ]
    for a, b in zip(left.graph.initializer, right.graph.initializer, strict=True):
        assert a.name == b.name
        x, y = (numpy_helper.to_array(t) for t in (a, b))
        if x.tobytes() != y.tobytes():
            assert a.name.endswith("_scale") and x.dtype == np.float16, a.name
            np.testing.assert_array_less(np.abs(x - y), np.spacing(np.maximum(x, y)) * 1.5)
