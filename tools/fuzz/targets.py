"""What damaged files are given to: all that runs in this process, ONNX Runtime and compiler apart.

A target ends, or raises OnnxqError: one line that says what, where and how to cure it. Anything
else is a finding.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

import onnxq
from onnxq.calibrate.data import open_samples
from onnxq.calibrate.session import InputSpec
from onnxq.calibrate.table import load_table
from onnxq.gpus import target as gpu
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.placement import place
from onnxq.recipe import load as load_recipe
from onnxq.terminal import printable
from tools.fuzz import corpus, mutate, stopped

RECIPES = ("int8-dynamic", "fp8-dynamic", "int8", "fp8", "fp8-attention", "int8-weight-only")
WITHOUT_DATA = ("int8-dynamic", "fp8-dynamic", "int8-weight-only", "fp8-weight-only", "int4-rtn")
PATTERNS = ("2:4", "2:4", "1:2", "3:5", "0.5")
TARGETS = ("sm80", "sm89", "sm120")
_WRITTEN_FROM = 60_000  # bytes; larger models are looked at only

_F32, _I64 = np.dtype(np.float32), np.dtype(np.int64)
_X, _IDS = InputSpec("x", _F32, ("n", 32)), InputSpec("ids", _I64, ("n", "s"))
INPUTS: list[list[InputSpec]] = [
    [_X],
    [_X, _IDS],
    [InputSpec("x", _F32, (5, 32))],
    [InputSpec("x", _F32, (2, "k"))],
    [InputSpec("x", np.dtype(np.float16), (None, 32))],
    [_X, InputSpec("t", _F32, ())],
    [InputSpec("x", _F32, (0, 32))],
    [InputSpec("x", _F32, ())],
    [],
]


@dataclass(frozen=True)
class Case:
    """One run: what is done with which file.

    Attributes:
        seed: the good file it was made from.
    """

    kind: str
    seed: str
    content: bytes
    run: Callable[[Path], None]
    suffix: str


class Cases:
    """Run number i of a seed is always the same case."""

    def __init__(self, folder: Path, models: Path, seed: int) -> None:
        self.seed = seed
        self.small = [*corpus.small_models(), *corpus.quantized_models(folder)]
        self.real = list(corpus.real_pieces(models, folder / "data")) if models.is_dir() else []
        self.archives = list(corpus.archives())
        self.tables = list(corpus.tables(folder))
        self.stopped = stopped.Runs(folder)
        self.left = self.stopped.seeds()

    def make(self, number: int) -> Case:
        """Run number `number`."""
        rng = random.Random(f"{self.seed}:{number}")
        draw = rng.random()
        if draw < 0.17:
            return self._archive(rng)
        if draw < 0.20:
            return self._table(rng)
        if draw < 0.23:
            return self._stopped(rng)
        if draw < 0.233:
            return Case("bomb", "none", mutate.bomb(rng), lambda p: model(p, rng), ".onnx")
        pool = self.real if self.real and rng.random() < 0.35 else self.small
        chosen = rng.choice(pool)
        others = [seed.content for seed in rng.sample(pool, min(3, len(pool)))]
        content = mutate.pick(chosen.content, others, rng)
        return Case("model", chosen.name, content, lambda p: model(p, rng), ".onnx")

    def _archive(self, rng: random.Random) -> Case:
        chosen = rng.choice(self.archives)
        others = [seed.content for seed in rng.sample(self.archives, 3)]
        content = mutate.archive(chosen.content, others, rng)
        suffix = ".npy" if chosen.name == "npy" else ".npz"
        return Case("data", chosen.name, content, lambda p: data(p, rng), suffix)

    def _table(self, rng: random.Random) -> Case:
        chosen = rng.choice(self.tables)
        content = mutate.archive(chosen.content, [chosen.content], rng)
        return Case("table", chosen.name, content, table, ".npz")

    def _stopped(self, rng: random.Random) -> Case:
        """What a stopped run left, or its table given to another."""
        chosen = rng.choice(self.left)
        others = [seed.content for seed in rng.sample(self.left, 3)]
        damage = mutate.archive if chosen.name.endswith(".npz") else mutate.any_bytes
        content = damage(chosen.content, others, rng)
        run = partial(self.stopped.go_on, seed=chosen.name)
        if chosen.name.endswith("calibration.npz") and rng.random() < 0.7:
            run = partial(self.stopped.with_table, rng=rng)
        return Case("stopped", chosen.name, content, run, ".npz")


def model(path: Path, rng: random.Random) -> None:
    """Load, prepare, place, lint; of small models also write the quantized or mended one, and read
    that again."""
    recipe = load_recipe(rng.choice(RECIPES))
    loaded, _ = prepare(Model.load(path), rng.choice([0, 19, 21]))
    loaded.inputs()
    place(loaded, recipe, gpu("sm89"))
    small, written = path.stat().st_size < _WRITTEN_FROM, path.with_name("out.onnx")
    if rng.random() < 0.5:
        _linted(path, written, small and rng.random() < 0.5, rng.choice(TARGETS))
    if small and rng.random() < 0.5:
        again = rng.random() < 0.4
        onnxq.quantize(path, written, recipe=rng.choice(WITHOUT_DATA), requantize=again)
        Model.load(written)
    if small and rng.random() < 0.1:
        onnxq.prune(path, written, method="magnitude", pattern=rng.choice(PATTERNS))
        onnxq.check_zeros(written)
    if rng.random() < 0.1:
        onnxq.recommend(path, gpu="h100", workload="offline")


def _linted(path: Path, written: Path, fix: bool, target: str) -> None:
    found = onnxq.lint(path, written if fix else None, target=target, fix=fix)
    assert found.passed == (not found.findings)
    for entry in found.findings:
        line = f"{entry.rule} {entry.node} {entry.reason} {entry.cure}"
        assert printable(line).isprintable() and len(line) < 20_000


def data(path: Path, rng: random.Random) -> None:
    """Open calibration data for a model's inputs, and read all of it twice."""
    inputs = rng.choice(INPUTS)
    given = path.parent if path.suffix == ".npy" else path
    samples = open_samples(given, inputs, batch=rng.choice([None, None, 1, 2, 7, 1 << 40]))
    for feed in samples:
        assert [feed[spec.name].dtype for spec in inputs] == [spec.dtype for spec in inputs]
    samples.shapes()
    samples.largest()


def table(path: Path) -> None:
    """Load a calibration table and ask it for its ranges."""
    loaded = load_table(path)
    for tensor in loaded.statistics:
        loaded.range(tensor, "max")
    assert len(loaded.digest) == 64
