"""Data beside a model goes when it is ours and no model reads it, and never otherwise."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

from onnxq.graph import commit as commit_module
from onnxq.graph.model import Model
from onnxq.graph.save import save


def _source(folder: Path, value: float) -> Path:
    """A model with one large weight, every element `value`."""
    weight = nh.from_array(np.full(400, value, np.float32), "w")
    x, y = (h.make_tensor_value_info(n, T.FLOAT, [400]) for n in "xy")
    graph = h.make_graph([h.make_node("Add", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    path = folder / f"source-{value:g}.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def _save(value: float, path: Path, folder: Path) -> list[Path]:
    return save(Model.load(_source(folder, value)), path, external=True)


def _value(path: Path) -> float:
    (tensor,) = onnx.load(path).graph.initializer
    (value,) = set(nh.to_array(tensor).tolist())
    return float(value)


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder for outputs, apart from the sources."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


STRUCK = """
import os, signal, sys
from pathlib import Path
from onnxq.graph.model import Model
from onnxq.graph import commit, save
left = 0
def strike(real):
    def call(*arguments, **keywords):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **keywords)
    return call
Path.replace, Path.unlink = strike(Path.replace), strike(Path.unlink)
for name in ("flush", "flush_folder"):
    setattr(commit, name, strike(getattr(commit, name)))
for left, path in enumerate(sys.argv[2:], 1):
    if os.fork() == 0:
        save.save(Model.load(sys.argv[1]), Path(path), external=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]))
"""
STEPS = 16


@pytest.mark.parametrize("name", ["model.onnx", "model", "a[b]*.onnx"])
def test_a_kill_before_any_step_leaves_one_whole_model_and_the_next_run_no_stray(
    name: str, tmp_path: Path
) -> None:
    """Processes of one program, each killed a step later than the one before."""
    source, out = _source(tmp_path, 2), tmp_path / "out"
    out.mkdir()
    _save(1, out / name, tmp_path)
    paths = [shutil.copytree(out, tmp_path / str(step)) / name for step in range(STEPS)]
    done = subprocess.run(
        [sys.executable, "-c", STRUCK, source, *paths], check=True, capture_output=True, text=True
    )
    codes = [int(line) for line in done.stdout.split()]
    struck = codes.count(-signal.SIGKILL)
    assert codes == [-signal.SIGKILL] * struck + [0] * (STEPS - struck)
    assert 8 < struck < STEPS  # else the kills struck none of the steps, or not all
    assert [_value(path) for path in paths[struck:]] == [2] * (STEPS - struck)
    assert {_value(path) for path in paths} == {1, 2}
    for path in paths[: struck + 1]:
        written = _save(3, path, tmp_path)
        assert _value(path) == 3
        assert _names(path.parent) == sorted(p.name for p in written), path


def test_a_data_file_that_another_model_reads_stays(tmp_path: Path, out: Path) -> None:
    first = _save(1, out / "model.onnx", tmp_path)
    kept = out / "model.onnx.bak"
    kept.write_bytes(first[0].read_bytes())
    second = _save(2, out / "model.onnx", tmp_path)
    assert (_value(kept), _value(out / "model.onnx")) == (1, 2)
    kept.unlink()
    # Nothing reads the first one's data now; but it is no longer known to be ours.
    _save(3, out / "model.onnx", tmp_path)
    assert first[1].exists() and not second[1].exists()


def test_data_stays_where_a_model_beside_it_may_not_be_read(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _save(1, out / "model.onnx", tmp_path)
    secret = out / "secret.onnx"
    secret.write_bytes(first[0].read_bytes())
    monkeypatch.setattr(commit_module.os, "access", lambda p, mode: Path(p) != secret)
    _save(2, out / "model.onnx", tmp_path)
    assert first[1].exists()


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1, null]",
        '{"a": 1}',
        json.dumps(["../victim", "/etc/passwd", "victim", "model.onnx", "model.onnx.0.data"]),
        json.dumps(["../model.onnx.00000000.data", "sub/model.onnx.00000000.data"]),
        json.dumps(["model.onnx.1234abcd.data\n", "model.onnx.1234abcd.data.bak"]),
    ],
)
def test_no_journal_removes_a_file_of_another_name(content: str, tmp_path: Path, out: Path) -> None:
    """Whoever may write into the folder can write one."""
    (out / "sub").mkdir()
    victims = [tmp_path / "victim", out / "victim", out / "model.onnx.0.data"]
    victims += [out / "model.onnx.1234abcd.data\n", out / "model.onnx.1234abcd.data.bak"]
    victims += [out / "sub/model.onnx.00000000.data", tmp_path / "model.onnx.00000000.data"]
    for victim in victims:
        victim.write_text("of somebody else")
    (out / ".onnxq.journal-model.onnx.1-00000000").write_text(content)
    written = _save(1, out / "model.onnx", tmp_path)
    assert all(victim.read_text() == "of somebody else" for victim in victims)
    mine = {p.name for p in written}
    assert set(_names(out)) - mine == {"sub", *(v.name for v in victims if v.parent == out)}


def test_a_journal_that_is_a_pipe_or_a_link_is_left(tmp_path: Path, out: Path) -> None:
    os.mkfifo(out / ".onnxq.journal-model.onnx.1-00000000")
    (out / ".onnxq.journal-model.onnx.1-00000001").symlink_to(_source(tmp_path, 5))
    _save(1, out / "model.onnx", tmp_path)
    assert _value(out / "model.onnx") == 1 and _value(tmp_path / "source-5.onnx") == 5


def test_bytes_reach_the_disk_before_the_rename_that_shows_them(
    tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data, then model, then folder: or a power failure could show an empty file as the new one."""
    path, said = out / "model.onnx", []
    _save(1, path, tmp_path)
    fsync, replace, unlink = os.fsync, Path.replace, Path.unlink

    def kind(p: Path) -> str:
        return "folder" if p.is_dir() else "data" if p.stat().st_size >= 1600 else "model"

    def synced(handle: int) -> None:
        p = Path(f"/proc/self/fd/{handle}").resolve()
        said.append(("journal" if "journal" in p.name else kind(p), "synced"))
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        said.append((kind(self), "renamed"))
        return replace(self, target)

    def unlinked(self: Path, missing_ok: bool = False) -> None:
        if self.name.endswith(".data"):
            said.append(("old data", "removed"))
        unlink(self, missing_ok)

    source = Model.load(_source(tmp_path, 2))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(Path, "replace", renamed)
        patch.setattr(Path, "unlink", unlinked)
        save(source, path, external=True)
    assert said == [
        ("data", "synced"),
        ("model", "synced"),
        ("journal", "synced"),
        ("folder", "synced"),
        ("data", "renamed"),
        ("folder", "synced"),
        ("model", "renamed"),
        ("folder", "synced"),
        ("old data", "removed"),
    ]
