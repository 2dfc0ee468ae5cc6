"""`python -m tools.kills --runs 100`: kill -9 while onnxq replaces a file; is what is left whole?

Each kill strikes `onnxq quantize` or `onnxq build` at a random moment, over an output of an earlier
run. Then the output must be the old one or the new one, byte for byte, with the data it refers to;
what lies beside an engine must be its own description, or nothing; the input must be untouched; and
after the next run nothing else may be left, neither beside the output nor in the system's folder
for temporary files. Exit 1 where one kill breaks that.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

_GPTQ = ("{in}", "-o", "{out}", "--recipe", "int4-gptq", "--random-calib", "--samples", "4")
VERBS: dict[str, tuple[str, ...]] = {
    "quantize": ("quantize", "{in}", "-o", "{out}"),
    "quantize-external": ("quantize", "{in}", "-o", "{out}"),
    "build": ("build", "{in}", "-o", "{out}", "--shapes", "x:1x256"),
    "prune": ("prune", "{in}", "-o", "{out}"),
    "sequential": ("quantize", *_GPTQ, "--set", "steps=[sequential,search,gptq]"),
    "resume": ("quantize", *_GPTQ, "--resume"),
}
"""Name -> the command; what is killed with `--resume` goes on in the next run."""
_SMALL = ("build", "sequential", "resume")  # of few and small layers: the work is more than writing
_RUNTIMES = ".ses"  # ONNX Runtime's own, of every session's first start in a folder
_LATE = 0.6  # of the kills strike in the last part of a run, where files change
_LATE_FROM = 0.55  # of its time


@dataclass
class Outcome:
    """What the kills of one verb left.

    Attributes:
        found: how often the output was the old one, the new one.
        strays: kills after which there was a file too many, before the next run removed it.
        wrong: what must not be, by kill.
    """

    found: Counter[str] = field(default_factory=Counter)
    strays: int = 0
    late: int = 0
    wrong: list[str] = field(default_factory=list)

    def lines(self, verb: str, kills: int) -> list[str]:
        share = f"{self.found['old']} old, {self.found['new']} new"
        late = f"{self.late} struck after the run's end" if self.late else "all within a run"
        return [
            f"{verb}: {kills} kills ({late}): {share}, {len(self.wrong)} wrong; "
            f"{self.strays} left files that the next run removed",
            *(f"  {line}" for line in self.wrong),
        ]


@dataclass(frozen=True)
class Scene:
    """Two inputs, an output made of the first, and how to make it of the second."""

    folder: Path
    verb: str

    @property
    def output(self) -> Path:
        return self.folder / "out" / ("model.plan" if self.verb == "build" else "model.onnx")

    def command(self, which: str) -> list[str]:
        files = {"{in}": str(self.folder / f"in/{which}.onnx"), "{out}": str(self.output)}
        words = [files.get(word, word) for word in VERBS[self.verb]]
        return [sys.executable, "-m", "onnxq.cli", "-q", *words]

    def start(self, which: str) -> subprocess.Popen[bytes]:
        temporary = self.folder / "tmp"
        temporary.mkdir(exist_ok=True)
        return subprocess.Popen(
            self.command(which),
            env={**os.environ, "TMPDIR": str(temporary)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def run(self, which: str) -> float:
        started = time.monotonic()
        code = self.start(which).wait()
        assert code == 0, f"{self.command(which)} ended with {code}"
        return time.monotonic() - started

    def state(self) -> str:
        """What the output is, as a digest of it and of the data it refers to; '' for nothing."""
        if not self.output.exists():
            return ""
        digest = hashlib.sha256(self.output.read_bytes())
        for name in sorted(self.referenced()):
            digest.update(self.output.with_name(name).read_bytes())
        return digest.hexdigest()

    def referenced(self) -> set[str]:
        """Names of the files that go with the output."""
        if self.verb == "build":
            return set()
        model = onnx.load(self.output, load_external_data=False)
        entries = [e for t in model.graph.initializer for e in t.external_data]
        return {e.value for e in entries if e.key == "location"}

    def others(self) -> list[str]:
        """Files beside the output that do not go with it, and temporary ones."""
        known = {self.output.name, *self.referenced()}
        known |= {f"{self.output.name}.json"} if self.verb == "build" else set()
        beside = {p.name for p in self.output.parent.iterdir()} - known
        temporary = {p.name for p in (self.folder / "tmp").iterdir()} - {_RUNTIMES}
        return sorted(beside) + sorted(temporary)

    def inputs(self) -> list[tuple[str, bytes, int]]:
        files = sorted((self.folder / "in").iterdir())
        return [(p.name, p.read_bytes(), p.stat().st_mtime_ns) for p in files]


def prepare(folder: Path, verb: str) -> Scene:
    """Two inputs of other weights, an empty place for the output."""
    scene = Scene(folder, verb)
    for name in ("in", "out", "tmp"):
        (folder / name).mkdir(parents=True)
    for seed, which in enumerate(("old", "new")):
        _write(folder / f"in/{which}.onnx", seed, external=verb == "quantize-external")
    return scene


def _write(path: Path, seed: int, external: bool) -> None:
    """A few megabytes of weights, so that writing them takes a while."""
    size, layers = (256, 3) if path.parent.parent.name in _SMALL else (1024, 6)
    generator = np.random.default_rng(seed)
    names = ["x", *(f"a{i}" for i in range(layers))]
    weights = [
        nh.from_array(generator.standard_normal((size, size)).astype(np.float32), f"w{i}")
        for i in range(layers)
    ]
    nodes = [
        h.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]], f"n{i}") for i in range(layers)
    ]
    ends = [h.make_tensor_value_info(n, T.FLOAT, ["n", size]) for n in (names[0], names[-1])]
    graph = h.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path, save_as_external_data=external, location=f"{path.stem}.bin")


def kill(scene: Scene, kills: int, seed: int) -> Outcome:
    """Strike `kills` times."""
    rng, outcome = random.Random(seed), Outcome()
    scene.run("old")
    old, saved = scene.state(), scene.folder / "saved"
    shutil.copytree(scene.output.parent, saved)
    seconds = min(scene.run("new") for _ in range(2))
    new, inputs = scene.state(), scene.inputs()
    assert old and new and old != new
    for number in range(kills):
        shutil.rmtree(scene.output.parent)
        shutil.copytree(saved, scene.output.parent)
        moment = _moment(rng, seconds)
        what = [*_strike(scene, moment, outcome, {old: "old", new: "new"})]
        if scene.others():
            outcome.strays += 1
        seconds = scene.run("new")  # of late: other work may have made the machine slower
        if scene.state() != new:
            what.append("the next run made something else")
        if scene.others():
            what.append(f"left after the next run: {scene.others()}")
        if scene.inputs() != inputs:
            what.append("the input has changed")
        outcome.wrong += [f"kill {number} at {moment:.3f} s: {w}" for w in what]
        if sys.stderr.isatty():
            print(f"\r{scene.verb} {number + 1} of {kills}", end="", file=sys.stderr)
    return outcome


def _moment(rng: random.Random, seconds: float) -> float:
    first = _LATE_FROM if rng.random() < _LATE else 0.0
    return seconds * rng.uniform(first, 1.05)


def _strike(scene: Scene, moment: float, outcome: Outcome, known: dict[str, str]) -> Iterator[str]:
    """Kill one run; say what is wrong with what it leaves."""
    child = scene.start("new")
    try:
        child.wait(moment)
        outcome.late += 1
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        child.wait()
    try:
        found = known.get(scene.state(), "neither")
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        found = f"broken ({error})"
    outcome.found[found] += 1
    if found not in ("old", "new"):
        yield f"the output is {found}"
    sidecar = scene.output.with_name(f"{scene.output.name}.json")
    if sidecar.exists():
        try:
            described = json.loads(sidecar.read_text())["model"]
        except ValueError as error:
            yield f"the sidecar is not whole: {error}"
        else:
            if found in ("old", "new") and described != f"{found}.onnx":
                yield f"the sidecar is that of {described}, the engine is the {found} one"


def main() -> int:
    parser = argparse.ArgumentParser(prog="tools.kills", description=__doc__)
    parser.add_argument("--runs", type=int, default=100, help="kills of each verb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbs", default=",".join(VERBS))
    options = parser.parse_args()
    wrong = 0
    for verb in options.verbs.split(","):
        with tempfile.TemporaryDirectory(prefix="onnxq-kills-") as name:
            scene = prepare(Path(name) / verb, verb)
            outcome = kill(scene, options.runs, options.seed)
        wrong += len(outcome.wrong)
        print("\n".join(outcome.lines(verb, options.runs)), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
