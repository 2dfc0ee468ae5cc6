"""Runs that were stopped, and what they leave to go on from: `quantize --resume`, `prune`.

The model and the data are good; what is damaged is a file that an earlier run kept.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np

import onnxq
from onnxq.recipe import Recipe, from_dict
from tools.fuzz.corpus import Seed, small_models

_MODEL = "mlp"
_FIELDS = {
    "rounded": {"weights": "int4", "block_size": 16, "steps": ["awq", "search", "gptq"]},
    "behind": {"weights": "int8", "steps": ["sequential", "search", "gptq"]},
    "pruned": {"weights": "none", "sparsity": "2:4", "steps": ["sparsegpt", "refit"]},
}
RECIPES: dict[str, Recipe] = {
    name: from_dict({"activations": "none", **fields}, name) for name, fields in _FIELDS.items()
}


class Stopped(BaseException):
    """Stands for the signal that ends a run."""


class Runs:
    """A run of each recipe, stopped before it wrote its output, and the tables of their data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "stopped"
        self.folder.mkdir()
        self.model, self.data = self.folder / "model.onnx", self.folder / "data.npz"
        self.model.write_bytes(next(s.content for s in small_models() if s.name == _MODEL))
        values = np.random.default_rng(0).standard_normal((48, 32)).astype(np.float32)
        np.savez(self.data, x=values)
        for name, recipe in RECIPES.items():
            self._stop(self.folder / name / "out.onnx", recipe)

    def _stop(self, output: Path, recipe: Recipe) -> None:
        output.parent.mkdir()

        def stop(what: str, done: int, total: int) -> None:
            if what in ("quantizing", "pruning") and done == total:
                raise Stopped

        try:
            onnxq.quantize(
                self.model, output, recipe=recipe, calib=self.data, resume=True, progress=stop
            )
        except Stopped:
            return
        raise AssertionError(f"{recipe.name} was not stopped")

    def seeds(self) -> list[Seed]:
        """Every file they left, by recipe and name."""
        files = sorted(self.folder.glob("*/out.onnx.unfinished/*"))
        return [Seed(f"{p.parts[-3]}/{p.name}", p.read_bytes()) for p in files if p.name != "lock"]

    def go_on(self, damaged: Path, seed: str) -> None:
        """The run again, with a damaged file in the place of one that it left."""
        recipe, name = seed.split("/")
        place = damaged.parent / "again"
        shutil.copytree(self.folder / recipe, place)
        try:
            shutil.copyfile(damaged, place / "out.onnx.unfinished" / name)
            options = {"recipe": RECIPES[recipe], "calib": self.data, "resume": True}
            onnxq.quantize(self.model, place / "out.onnx", **options)
        finally:
            shutil.rmtree(place)

    def with_table(self, damaged: Path, rng: random.Random) -> None:
        """A run on a damaged calibration table of the model."""
        recipe = RECIPES[rng.choice(["rounded", "pruned"])]
        onnxq.quantize(
            self.model, damaged.with_name("out.onnx"), recipe=recipe, load_calib=[damaged]
        )
