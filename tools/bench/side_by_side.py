"""onnxq and its peers on the same model and the same calibration data, one after the other.

Everything lies in `models/out/bench/MODEL/`: `input/` (a copy of the model, which some peers write
to), `calib.npz`, `heldout.npz`, and a folder a recipe with the model it wrote and `result.json`.
A result is kept as long as what it depends on is the same: the peer's packages, its script (of
ours, the source), the model, the data; and the model it wrote is there. A run that was stopped goes
on where it was.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tools.bench.child import measured
from tools.bench.models import CASES, OUT, Case, data
from tools.bench.peers import FLOOR, OURS, PEERS, ROOT, Peer, fingerprint

BENCH = OUT / "bench"
_LIMIT = 3600.0
# What a part of the judgement is made by: it is made again when that changes.
_JUDGES = {
    "outputs": ("onnxq/evaluate", "tools/bench/judge.py"),
    "compiled": ("onnxq/engine", "tools/bench/judge.py", "tools/bench/flops.py"),
    "linted": ("onnxq/linting", "onnxq/graph", "tools/bench/judge.py"),
}
_NOTES = (".json", ".txt")
_JUDGING = ("onnxruntime", "tensorrt-rtx", "numpy")

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """How a table is made: see `side_by_side`."""

    bits: int
    rounds: int
    limit: float

    def recipes(self, peer: Peer) -> tuple[str, ...]:
        """The peer's that take part."""
        return peer.four if self.bits == 4 and peer.name != FLOOR else peer.recipes

    def folder(self, case: Case) -> Path:
        return BENCH / (f"{case.name}-4bit" if self.bits == 4 else case.name)

    def data(self, case: Case) -> dict[str, tuple[str, ...]]:
        """The options that name its data."""
        if self.bits == 4:
            return {"calib": case.four, "heldout": case.heldout_four}
        return {"calib": case.shared, "heldout": case.heldout}

    def block(self, case: Case) -> int:
        return case.block if self.bits == 4 else 0

    @property
    def parts(self) -> tuple[str, ...]:
        """What is judged."""
        return ("outputs",) if self.bits == 4 else tuple(_JUDGES)


def side_by_side(
    models: Sequence[str],
    peers: Sequence[str],
    *,
    bits: int = 8,
    fresh: bool = False,
    rounds: int = 1,
    limit: float = _LIMIT,
) -> list[Row]:
    """One row a model, peer and recipe: what it took, and what came out.

    Args:
        peers: names; the floor and onnxq come first, asked for or not.
        bits: 8, or 4: the methods for INT4 weights, of which the outputs alone are judged.
        fresh: do again what is there.
        rounds: how many times each is run; those there count.
        limit: seconds after which a run is stopped.
    """
    setting = Setting(bits, rounds, limit)
    chosen = [PEERS[name] for name in dict.fromkeys((FLOOR, OURS, *peers))]
    packages = {peer.name: peer.environment() for peer in chosen}
    rows = []
    for name in models:
        folder = _prepare(CASES[name], setting)
        for _ in range(rounds):
            for peer, recipe in _each(chosen, setting):
                _run(CASES[name], peer, recipe, folder, packages[peer.name], fresh, setting)
            fresh = False
        for peer, recipe in _each(chosen, setting):
            rows.append(_judge(CASES[name], peer, recipe, folder, packages[OURS], setting))
    return rows


def _each(peers: Sequence[Peer], setting: Setting) -> Iterator[tuple[Peer, str]]:
    for peer in peers:
        for recipe in setting.recipes(peer):
            yield peer, recipe


def _prepare(case: Case, setting: Setting) -> Path:
    """The model's folder with its copy and the data, as every peer is given them."""
    import numpy as np

    from onnxq.graph.model import Model

    folder = setting.folder(case)
    source = _sources(case.model)
    _copy_input(source, folder / "input")
    inputs = Model.load(case.model).inputs()
    for name, options in setting.data(case).items():
        feeds = list(data(options).open(inputs))
        arrays: dict[str, Any] = {
            spec.name: np.concatenate([feed[spec.name] for feed in feeds]) for spec in inputs
        }
        np.savez(folder / f"{name}.npz", **arrays)
    return folder


def _sources(model: Path) -> list[Path]:
    """The model's file and its external data."""
    from onnxq.graph.model import Model

    outside = {values.extent.path for values in Model.load(model).stored_outside()}
    return [model, *sorted(outside)]


def _copy_input(source: Sequence[Path], folder: Path) -> bool:
    """Copy the model unless it is there unchanged; whether it was there and had been changed."""
    copies = [folder / file.name for file in source]
    there = all(copy.exists() for copy in copies)
    if there and fingerprint(*copies) == fingerprint(*source):
        return False
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file, copy in zip(source, copies, strict=True):
        shutil.copyfile(file, copy)
    return there


def _run(
    case: Case,
    peer: Peer,
    recipe: str,
    folder: Path,
    packages: dict[str, str],
    fresh: bool,
    setting: Setting,
) -> None:
    """Run a recipe once more, unless it has been run often enough as it is."""
    place = folder / f"{peer.name}.{recipe}"
    source = _sources(case.model)
    key = {
        "packages": packages,
        "code": peer.code(setting.block(case)),
        "model": fingerprint(*source),
        "calib": _contents(folder / "calib.npz"),
    }
    known = _read(place / "result.json")
    gone = not (known.get("failed") or peer.name == FLOOR or (place / "model.onnx").exists())
    if fresh or gone or known.get("key") != key:
        known = {"key": key, "runs": [], "judged": known.get("judged", {})}
    if len(known["runs"]) >= setting.rounds or known.get("failed"):
        return
    print(f"{case.name}: {peer.name} {recipe} ...", file=sys.stderr, flush=True)
    running = folder / "running"
    shutil.rmtree(running, ignore_errors=True)
    running.mkdir()
    output = running / "model.onnx"
    arguments = (folder / "input" / case.model.name, folder / "calib.npz", output)
    words = peer.command(recipe, *(path.resolve() for path in arguments), setting.block(case))
    with tempfile.TemporaryDirectory() as scratch:
        usage = measured(words, limit=setting.limit, environment=_paths(peer), folder=Path(scratch))
    (running / "log.txt").write_text(usage.said)
    known["runs"].append({k: v for k, v in asdict(usage).items() if k != "said"})
    known["failed"] = _failure(usage.code, usage.said, peer, output, setting.limit)
    known["input_changed"] = _copy_input(source, folder / "input")
    _write(running / "result.json", known)
    shutil.rmtree(place, ignore_errors=True)
    running.rename(place)


def _paths(peer: Peer) -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT)} if peer.name == OURS else {}


def _failure(code: int | None, said: str, peer: Peer, output: Path, limit: float) -> str:
    """Why there is no result, in a line; '' where there is one."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    if code is None:
        return f"stopped after {limit / 60:.0f} minutes"
    if code != 0:
        return (lines[-1] if lines else f"exit {code}")[:300]
    return "" if peer.name == FLOOR or output.exists() else "it wrote no model"


def _judge(
    case: Case,
    peer: Peer,
    recipe: str,
    folder: Path,
    packages: dict[str, str],
    setting: Setting,
) -> Row:
    """The row of a result: its usage, its size, and every part of its judgement."""
    place = folder / f"{peer.name}.{recipe}"
    known = _read(place / "result.json")
    row = {
        "model": case.name,
        "peer": peer.name,
        "recipe": recipe,
        "versions": {n: known["key"]["packages"].get(n, "") for n in peer.title},
        **{k: known[k] for k in ("runs", "failed", "input_changed")},
    }
    if known["failed"] or peer.name == FLOOR:
        return row
    model = place / "model.onnx"
    row["bytes"] = _size(model)
    row["original_bytes"] = _size(case.model)
    written = fingerprint(*(f for f in sorted(place.iterdir()) if f.suffix not in _NOTES))
    for part in setting.parts:
        key = {
            "code": fingerprint(*_files(_JUDGES[part])),
            "packages": {name: packages.get(name, "") for name in _JUDGING},
            "heldout": _contents(folder / "heldout.npz"),
            "output": written,
        }
        found = known["judged"].get(part, {})
        if found.get("key") != key:
            print(f"{case.name}: {peer.name} {recipe}: {part} ...", file=sys.stderr, flush=True)
            found = {"key": key, "found": _judged(part, case, model, folder)}
            known["judged"][part] = found
            _write(place / "result.json", known)
        row[part] = found["found"]
    return row


def _judged(part: str, case: Case, model: Path, folder: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch, "found.json")
        words = [sys.executable, "-m", "tools.bench.judge", part, case.name]
        usage = measured([*words, model, folder, result], limit=_LIMIT)
        if usage.code == 0:
            return _read(result)
    said = usage.said.strip().splitlines()
    ended = f"ended with {usage.code}: {said[-1][:200] if said else ''}"
    return {"loads": "no", "compiles": False, "findings": None, "reason": ended}


def _size(model: Path) -> int:
    """Bytes of the file and of the external data it refers to; of a file alone if unreadable."""
    from onnxq.errors import OnnxqError

    try:
        return sum(file.stat().st_size for file in _sources(model))
    except OnnxqError:
        return sum(f.stat().st_size for f in model.parent.iterdir() if f.suffix not in _NOTES)


def _files(places: Sequence[str]) -> list[Path]:
    found = []
    for place in places:
        path = ROOT / place
        found += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return found


def _contents(path: Path) -> str:
    """A hash of an .npz's arrays: the file itself holds the time it was written."""
    import hashlib

    import numpy as np

    digest = hashlib.sha256()
    with np.load(path) as arrays:
        for name in arrays.files:
            array = arrays[name]
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _write(path: Path, content: Any) -> None:
    from onnxq.files import write_json

    write_json(path, content)
