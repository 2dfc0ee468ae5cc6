from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_models import samples, watched, write

from onnxq.evaluate.compare import compare
from onnxq.evaluate.layers import LayerErrors, per_layer
from onnxq.evaluate.watching import layer_errors, watch
from onnxq.graph.model import Model

TENSORS = ["h", "a", "y", "s"]
INPUTS = {"a": ["h"], "y": ["a"], "s": ["a", "y"]}
GRAPH = """agraph (float[N,16] x) => (float[N,16] s) {{
    h = MatMul(x, w1)
    a = {}(h)
    y = MatMul(a, w2)
    s = Add(a, y)
}}"""


class Made:
    """A model to watch that counts how often it was asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self.groups = path, []  # type: ignore[var-annotated]

    def __call__(self, outputs: Sequence[str]) -> tuple[bytes, Path]:
        self.groups.append(list(outputs))
        return watched(self.path, outputs)


def network(path: Path, noise: Sequence[float], activation: str = "Relu") -> Made:
    """Two linear layers; each weight is multiplied by 1 + noise."""
    rng = np.random.default_rng(3)
    w1, w2 = (((1 + extra) * rng.standard_normal((16, 16))).astype(np.float32) for extra in noise)
    return Made(write(path, GRAPH.format(activation), w1=w1, w2=w2))


def found(tmp_path: Path, noise: Sequence[float], **options: Any) -> LayerErrors:
    reference = network(tmp_path / "reference.onnx", (0, 0))
    candidate = network(tmp_path / "candidate.onnx", noise)
    options = {"inputs_of": INPUTS, "producers": {"y": "second linear"}, **options}
    return per_layer(reference, candidate, TENSORS, samples(2, 8, 16), **options)


def test_noise_in_the_second_layer_is_found_there(tmp_path: Path) -> None:
    errors = found(tmp_path, (0, 0.1))
    assert [row.tensor for row in errors.rows] == TENSORS
    noises = {row.tensor: row.error.noise for row in errors.rows}
    assert noises["h"] == noises["a"] == 0.0
    worst = errors.worst()
    assert [row.tensor for row in worst] == ["y"]  # behind it, s only dilutes
    # y is 1.1 times itself: noise 0.01, to FP32's rounding of weights and sums (2**-24 * 16).
    assert worst[0].added == pytest.approx(0.01, rel=1e-4)
    assert any("second linear" in line and "exact" in line for line in errors.lines())


def test_noise_in_the_first_layer_is_not_blamed_on_those_behind(tmp_path: Path) -> None:
    errors = found(tmp_path, (0.1, 0))
    assert errors.worst()[0].tensor == "h"
    assert errors.worst()[0].added == pytest.approx(0.01, rel=1e-4)
    assert all(abs(row.added) < 1e-4 for row in errors.rows[1:])


def test_both_layers_worst_first(tmp_path: Path) -> None:
    errors = found(tmp_path, (0.02, 0.3))
    assert [row.tensor for row in errors.worst()][:2] == ["y", "h"]
    assert len(errors.worst(1)) == 1


def test_nan_is_found_where_it_first_appears(tmp_path: Path) -> None:
    reference = network(tmp_path / "reference.onnx", (0, 0))
    candidate = network(tmp_path / "candidate.onnx", (0, 0), "Sqrt")
    errors = per_layer(reference, candidate, TENSORS, samples(1, 8, 16), inputs_of=INPUTS)
    assert [row.tensor for row in errors.worst()] == ["a"]
    assert errors.worst()[0].added == math.inf
    json.dumps(errors.as_dict(), allow_nan=False)


def test_a_small_budget_finds_the_same_in_smaller_groups(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("onnxq.evaluate.layers._FIRST_GROUP", 2)
    whole = found(tmp_path, (0.02, 0.3), count=2)
    reference = network(tmp_path / "reference.onnx", (0, 0))
    candidate = network(tmp_path / "candidate.onnx", (0.02, 0.3))
    small = per_layer(
        reference,
        candidate,
        TENSORS,
        samples(2, 8, 16),
        inputs_of=INPUTS,
        producers={"y": "second linear"},
        count=2,
        memory=1,
    )
    assert small.as_dict() == whole.as_dict() and small.samples == 2
    assert reference.groups == candidate.groups == [["h", "a"], ["y"], ["s"]]


def test_without_inputs_each_is_compared_with_the_one_before(tmp_path: Path) -> None:
    errors = found(tmp_path, (0, 0.1), inputs_of=None)
    assert errors.worst()[0].tensor == "y"
    assert errors.rows[3].noise_in == errors.rows[2].error.noise


def test_two_models_are_watched_where_they_share_names(tmp_path: Path) -> None:
    reference = Model.load(network(tmp_path / "reference.onnx", (0, 0)).path)
    # The candidate computes h by another way and moves a about before it uses it.
    changed = write(
        tmp_path / "changed.onnx",
        """agraph (float[N,16] x) => (float[N,16] s) {
            half = MatMul(x, w1)
            h = Add(half, half)
            a = Relu(h)
            other = Transpose(a)
            back = Transpose(other)
            y = MatMul(back, w2)
            s = Add(a, y)
        }""",
        w1=np.eye(16, dtype=np.float32),
        w2=np.eye(16, dtype=np.float32),
    )
    found = watch(reference, Model.load(changed))
    assert found.tensors == ("h", "a", "y", "s")
    assert found.inputs_of == {"h": (), "a": ("h",), "y": ("a",), "s": ("a", "y")}
    assert found.producers["y"].startswith("MatMul")
    alone = watch(Model.load(changed), Model.load(changed))
    assert alone.tensors == ("half", "h", "a", "y", "s")  # what only moves values is left out
    back = watch(Model.load(changed), reference)
    assert back.inputs_of["y"] == ("a",)  # through the two transposes, which are not watched


def test_two_models_straight_from_their_files(tmp_path: Path) -> None:
    reference = Model.load(network(tmp_path / "reference.onnx", (0, 0)).path)
    candidate = Model.load(network(tmp_path / "candidate.onnx", (0, 0.1)).path)
    errors = layer_errors(reference, candidate, samples(2, 8, 16))
    assert errors.as_dict()["tensors"] == [
        {**row, "producer": errors.rows[index].producer}
        for index, row in enumerate(found(tmp_path, (0, 0.1)).as_dict()["tensors"])
    ]
    assert errors.worst()[0].tensor == "y"


def test_a_comparison_carries_what_was_found_inside(tmp_path: Path) -> None:
    inside = found(tmp_path, (0, 0.1))
    paths = {name: tmp_path / f"{name}.onnx" for name in ("reference", "candidate")}
    whole = replace(compare(paths, samples(1, 8, 16)), layers={"candidate": inside})
    assert whole.as_dict()["layers"]["candidate"] == inside.as_dict()
    text = whole.lines()
    assert text[-len(inside.lines()) + 1 :] == inside.lines()[1:]
    assert "candidate: where the error enters" in text[-len(inside.lines())]
