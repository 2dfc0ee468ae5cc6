"""Shared by the tests of lint: files of cases, and runs of the rules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from onnxq.gpus import target
from onnxq.graph.model import Model
from onnxq.linting.run import Lint, lint
from tools.lint_truth.patients import restore

PATIENTS = restore()
SHAPES = {
    "bert": ("ids:1x32,2x32,4x64", "mask:1x32,2x32,4x64"),
    "cnn": ("x:1x3x64x64,2x3x64x64,4x3x64x64",),
}


def look(path: Path, gpu: str = "sm89", ignore: Sequence[str] = ()) -> Lint:
    """The rules over a file."""
    return lint(Model.load(path), target(gpu), ignore)


def saved(model: onnx.ModelProto, path: Path) -> Path:
    onnx.save(model, path)
    return path


def shapes_of(path: Path) -> tuple[str, ...]:
    """A profile for a patient, by its name; none where its shapes are fixed."""
    graph = onnx.load(path, load_external_data=False).graph
    known = {t.name for t in graph.initializer}
    inputs = [v for v in graph.input if v.name not in known]
    fixed = all(d.HasField("dim_value") for v in inputs for d in v.type.tensor_type.shape.dim)
    return () if fixed else SHAPES["bert" if "bert" in path.name else "cnn"]
