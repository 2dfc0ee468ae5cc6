"""Lint against the compiler: what it calls refused is refused, what it calls slow is slow."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from lint_cases import PATIENTS, saved, shapes_of

import onnxq
from tools.lint_truth.forms import CASES
from tools.lint_truth.mutate import mutated
from tools.lint_truth.score import Graph, Scores, misses, score

pytest.importorskip("tensorrt_rtx")

BAR = 0.95
"""Precision and recall asked of both severities."""


def check(scores: Scores, bar: float = BAR) -> None:
    told = "\n".join([*scores.lines(), *misses(scores)])
    for part in (scores.refused, scores.slow, scores.graphs):
        assert part.precision >= bar, told
        assert part.recall >= bar, told


def test_every_form_is_judged_as_the_compiler_does(tmp_path: Path) -> None:
    graphs = [
        Graph(name, saved(case.model, tmp_path / f"{i}.onnx"), case.target, case.shapes)
        for i, (name, case) in enumerate(CASES.items())
    ]
    scores = score(graphs)
    check(scores, 1.0)
    assert scores.raw.precision == scores.raw.recall == 1.0, list(misses(scores))
    assert scores.refused.right > 60 and scores.slow.right > 60


@pytest.fixture(scope="module")
def patients(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Peers' files and our own: those of ONNX Runtime and of onnxq are made here."""
    folder = tmp_path_factory.mktemp("patients")
    found = [p for p in sorted(PATIENTS.glob("*.onnx")) if "_" in p.name]
    for kind in ("bert", "cnn"):
        found += _by_onnxruntime(kind, folder)
        found += _by_onnxq(kind, folder)
    return found


def test_peers_files_and_ours(patients: list[Path]) -> None:
    scores = score([Graph(p.stem, p, "sm89", shapes_of(p)) for p in patients])
    assert scores.count >= 25
    check(scores)


def test_mutants(patients: list[Path], tmp_path: Path) -> None:
    graphs = []
    for seed in range(5000, 5060):
        choice = random.Random(seed)
        base = choice.choice(patients)
        mutant = mutated(onnx.load(base), seed, choice.choice([1, 1, 2, 3]))
        path = saved(mutant.model, tmp_path / f"{seed}.onnx")
        graphs.append(Graph(f"{base.stem} {mutant.done}", path, "sm89", shapes_of(base)))
    check(score(graphs))


def samples(kind: str, count: int) -> dict[str, np.ndarray]:
    made = np.random.default_rng(0)
    if kind == "bert":
        ids = made.integers(0, 40, (count, 32))
        return {"ids": ids, "mask": np.ones((count, 32), np.int64)}
    return {"x": made.normal(size=(count, 3, 64, 64)).astype(np.float32)}


def _by_onnxruntime(kind: str, folder: Path) -> list[Path]:
    """ONNX Runtime's own quantizer, from its defaults to what it advises for TensorRT."""
    tools = pytest.importorskip("onnxruntime.quantization")
    signed = {"ActivationSymmetric": True, "WeightSymmetric": True}
    int8 = {"activation_type": tools.QuantType.QInt8, "weight_type": tools.QuantType.QInt8}
    uint8 = {"activation_type": tools.QuantType.QUInt8, "weight_type": tools.QuantType.QUInt8}
    ways: dict[str, dict[str, object]] = {
        "default": {},
        "uint8": uint8,
        "int8": {**int8, "extra_options": signed},
        "tensorrt": {
            **int8,
            "per_channel": True,
            "extra_options": {**signed, "AddQDQPairToWeight": True, "QuantizeBias": False},
        },
        "operators": {"quant_format": tools.QuantFormat.QOperator},
    }
    feeds = samples(kind, 2)
    reader = _reader(tools.CalibrationDataReader, feeds)
    made = []
    for name, options in ways.items():
        path = folder / f"ort_{kind}_{name}.onnx"
        tools.quantize_static(str(PATIENTS / f"{kind}.onnx"), str(path), reader(), **options)
        made.append(path)
    return made


def _reader(base: type, feeds: dict[str, np.ndarray]) -> Callable[[], object]:
    class Reader(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            count = len(next(iter(feeds.values())))
            self.rows = iter([{n: v[i : i + 1] for n, v in feeds.items()} for i in range(count)])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    return Reader


def _by_onnxq(kind: str, folder: Path) -> list[Path]:
    np.savez(folder / f"{kind}.npz", **samples(kind, 4))
    made = []
    for recipe in ("fp8", "int8", "fp8-dynamic", "int8-weight-only", "fp8-attention"):
        if kind == "cnn" and recipe == "fp8-attention":
            continue
        path = folder / f"onnxq_{kind}_{recipe}.onnx"
        needs = None if "dynamic" in recipe or "weight" in recipe else folder / f"{kind}.npz"
        result = onnxq.quantize(PATIENTS / f"{kind}.onnx", path, recipe=recipe, calib=needs)
        serious = [f for f in result.report.facts["lint"] if f["severity"] != "portability"]
        assert serious == [], recipe
        made.append(path)
    return made
