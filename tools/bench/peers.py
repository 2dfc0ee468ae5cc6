"""The peers: what is installed for each, in an environment of its own, and how each is run.

A peer's recipes are its documented call with its defaults, and what a careful user would change;
`recipes/` has the calls. `onnxq` is run from this environment, by its command line, and `floor` is
what none can go below: ONNX Runtime's bare forward passes over the same data.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from onnxq.recipe import load

ROOT = Path(__file__).parents[2]
_SCRIPTS = Path(__file__).parent / "recipes"

OURS, FLOOR = "onnxq", "floor"

_LIST = (
    "import importlib.metadata as m, json;"
    "print(json.dumps({d.name: d.version for d in m.distributions()}))"
)


@dataclass(frozen=True)
class Peer:
    """A quantizer.

    Attributes:
        title: its main package and those whose versions are worth a word in the table's caption.
        steps: what is installed, one `pip install` after the other; empty: this environment.
        recipes: names that its script knows; of ours, those that the command line knows.
        four: those of INT4 weights, that are held side by side at equal bits.
    """

    name: str
    recipes: tuple[str, ...]
    steps: tuple[tuple[str, ...], ...] = ()
    title: tuple[str, ...] = ()
    four: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return ROOT / f".venv-peer-{self.name}"

    def script(self, block: int = 0) -> Path:
        """What runs inside its environment; of ours, nothing but the command line does."""
        kind = "" if self.name == FLOOR else "_int4" if block else "_peer"
        return _SCRIPTS / f"{self.name}{kind}.py"

    def environment(self) -> dict[str, str]:
        """Make its environment unless it is there; its packages' versions, by name."""
        if not self.steps:
            return _packages(sys.executable)
        stamp = self.folder / "ready.json"
        wanted = [list(step) for step in self.steps]
        if stamp.exists() and json.loads(stamp.read_text())["steps"] == wanted:
            return dict(json.loads(stamp.read_text())["packages"])
        print(f"installing {self.name} into {self.folder.name} ...", file=sys.stderr, flush=True)
        shutil.rmtree(self.folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", self.folder], check=True)
        for step in self.steps:
            subprocess.run([self.python, "-m", "pip", "install", "-q", *step], check=True)
        packages = _packages(self.python)
        stamp.write_text(json.dumps({"steps": wanted, "packages": packages}, indent=2))
        return packages

    @property
    def python(self) -> str:
        return str(self.folder / "bin/python") if self.steps else sys.executable

    def command(
        self, recipe: str, model: Path, calib: Path, output: Path, block: int = 0
    ) -> list[str]:
        """What quantizes `model` into `output`; INT4 weights in blocks of `block`."""
        if self.name == OURS:
            words = [self.python, "-m", "onnxq.cli", "-q", "quantize", str(model)]
            words += ["-o", str(output), "--recipe", recipe]
            words += ["--set", f"block_size={block}"] if block else []
            return words + (["--calib", str(calib)] if load(recipe).needs_data else [])
        words = [self.python, "-I", str(self.script(block)), recipe]
        return words + [str(path) for path in (model, calib, output)] + ([str(block)] * bool(block))

    def code(self, block: int = 0) -> str:
        """What its results depend on beside packages: our source, or the script that calls it."""
        ours = self.name == OURS
        files = sorted((ROOT / "onnxq").rglob("*")) if ours else [self.script(block)]
        return fingerprint(*(f for f in files if f.suffix in (".py", ".yaml")))


PEERS = {
    peer.name: peer
    for peer in (
        Peer(FLOOR, ("forward",), title=("onnxruntime",)),
        Peer(
            OURS,
            ("int8", "fp8", "int8-dynamic", "fp8-dynamic", "int4-rtn"),
            title=("onnxq", "onnxruntime"),
            four=("int4-rtn", "int4-awq", "int4-gptq", "int4-best"),
        ),
        Peer(
            "modelopt",
            ("int8", "int8-max", "int8-max-no-add", "int8-max-per-node", "fp8", "int4-rtn"),
            # torch first and pinned: the CPU build. Anything else pulls gigabytes of CUDA.
            (("torch==2.13.0",), ("nvidia-modelopt[onnx]==0.47.0",)),
            ("nvidia-modelopt", "onnxruntime-gpu", "torch"),
            four=("int4-rtn", "int4-awq-lite", "int4-awq-lite-unfused", "int4-awq-clip"),
        ),
        Peer(
            "onnxruntime",
            ("int8", "int8-tensorrt", "int8-dynamic"),
            (("onnxruntime==1.31.1", "onnx", "onnx-ir"),),
            ("onnxruntime", "onnx"),
            four=("int4", "int4-rtn", "int4-k-quant", "int4-hqq", "int4-gptq"),
        ),
        Peer(
            "nncf",
            ("int8", "int8-transformer", "int8-transformer-unsmoothed"),
            (("nncf==3.4.*", "onnx", "onnxruntime"),),
            ("nncf", "onnxruntime"),
        ),
        Peer(
            "onnxsim",
            ("int8", "int8-dynamic", "fp8", "int4"),
            (("onnxsim==0.8.1", "onnxruntime"),),
            ("onnxsim", "onnxruntime"),
            four=("int4-rtn", "int4-awq", "int4-gptq", "int4-qronos"),
        ),
    )
}


def fingerprint(*files: Path) -> str:
    """A hash of the files' names and bytes."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            while piece := stream.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()[:16]


def _packages(python: str) -> dict[str, str]:
    if python == sys.executable:
        return {d.name: d.version for d in importlib.metadata.distributions()}
    said = subprocess.run([python, "-I", "-c", _LIST], check=True, capture_output=True, text=True)
    return dict(json.loads(said.stdout))
