"""Ctrl-C in each phase, full disks, closed folders, two runs at once: no file is lost."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

Files = dict[str, tuple[str, int]]


def _model(path: Path, seed: int, external: bool = False, size: int = 256) -> Path:
    generator = np.random.default_rng(seed)
    names = ["x", "a", "b", "y"]
    weights = [
        nh.from_array(generator.standard_normal((size, size)).astype(np.float32), f"w{i}")
        for i in range(3)
    ]
    nodes = [h.make_node("MatMul", [names[i], f"w{i}"], [names[i + 1]]) for i in range(3)]
    ends = [h.make_tensor_value_info(n, T.FLOAT, ["n", size]) for n in ("x", "y")]
    graph = h.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    made = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    onnx.save(made, path, save_as_external_data=external, location=f"{path.stem}.bin")
    return path


LAYOUTS = ("inline", "external")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each layout two inputs, data, and what is made of the first."""
    root = tmp_path_factory.mktemp("made")
    for layout in LAYOUTS:
        folder = root / layout
        for name in ("in", "out", "tmp"):
            (folder / name).mkdir(parents=True)
        for seed, which in enumerate(("old", "new")):
            _model(folder / f"in/{which}.onnx", seed, layout == "external")
        np.savez(folder / "in/data.npz", x=np.ones((4, 256), np.float32))
        for words in (QUANTIZE, BUILD):
            assert _onnxq(folder, words.replace("new", "old")).returncode == 0
    return root


@pytest.fixture(params=LAYOUTS)
def folder(request: pytest.FixtureRequest, made: Path, tmp_path: Path) -> Path:
    """The inputs of one layout, no outputs yet, an empty TMPDIR."""
    for name in ("in", "tmp"):
        shutil.copytree(made / request.param / name, tmp_path / name)
    (tmp_path / "out").mkdir()
    return tmp_path


@pytest.fixture
def old(folder: Path, made: Path) -> Callable[..., None]:
    """Put what was made of the first input in place: of a model, of an engine."""
    layout = LAYOUTS[(folder / "in/new.bin").exists()]

    def put(*verbs: str) -> None:
        for verb in verbs:
            for path in (made / layout / "out").glob(
                "model.onnx*" if verb == QUANTIZE else "*.plan*"
            ):
                shutil.copy2(path, folder / "out")

    return put


def _files(*folders: Path) -> Files:
    """Every file, its content and its time."""
    return {
        str(p): (hashlib.sha256(p.read_bytes()).hexdigest(), p.stat().st_mtime_ns)
        for folder in folders
        for p in folder.rglob("*")
        if p.is_file()
    }


def _onnxq(
    folder: Path, words: str, before: str = "", **more: object
) -> subprocess.CompletedProcess[str]:
    """Run the command line, after `before` has patched something in it."""
    program = f"{before}\nfrom onnxq.cli import main\nmain({words.split()!r}, prog_name='onnxq')"
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
        capture_output=True,
        text=True,
        timeout=300,
        **more,  # type: ignore[call-overload]
    )


AT_STEP = """
import os, signal
from onnxq import progress
real = progress.ProgressLine.__call__
def call(self, step, done, total):
    if step == {step!r}:
        os.kill(os.getpid(), signal.SIGINT)
    real(self, step, done, total)
progress.ProgressLine.__call__ = call
"""
AT_CALL = """
import os, signal
import {module} as module
real, left = module.{name}, [{count}]
def call(*arguments, **keywords):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGINT)
    return real(*arguments, **keywords)
module.{name} = call
"""
QUANTIZE = "quantize in/new.onnx -o out/model.onnx"
STATIC = f"{QUANTIZE} --recipe int8 --calib in/data.npz"
BUILD = "build in/new.onnx -o out/model.plan --shapes x:1x256"
PHASES = {
    "load": (AT_CALL.format(module="onnxq.graph.reading", name="check_proto", count=1), QUANTIZE),
    "infer": (
        AT_CALL.format(module="onnx.shape_inference", name="infer_shapes", count=1),
        QUANTIZE,
    ),
    "data": (AT_STEP.format(step="read the data"), STATIC),
    "calibrate": (AT_STEP.format(step="calibrate"), STATIC),
    "emit": (AT_STEP.format(step="quantizing"), QUANTIZE),
    "save": (AT_STEP.format(step="writing weights"), QUANTIZE),
    "flush": (AT_CALL.format(module="os", name="fsync", count=1), QUANTIZE),
    "start the compiler": (AT_STEP.format(step="start the compiler"), BUILD),
    "parse": (AT_STEP.format(step="parse"), BUILD),
    "compile": (AT_STEP.format(step="compile"), BUILD),
}


@pytest.mark.parametrize(
    ("folder", "phase"),
    [
        *(("inline", phase) for phase in PHASES),
        *(("external", phase) for phase in ("calibrate", "save", "flush")),
    ],
    indirect=["folder"],
)
def test_ctrl_c_in_each_phase(phase: str, folder: Path, old: Callable[..., None]) -> None:
    before, words = PHASES[phase]
    old(QUANTIZE, BUILD)
    was = _files(folder / "in", folder / "out")
    done = _onnxq(folder, words, before)
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("onnxq: interrupted;")
    assert "Traceback" not in done.stderr
    assert _files(folder / "in", folder / "out") == was
    assert list((folder / "tmp").glob("*onnxq*")) == []


def test_ctrl_c_between_the_renames(folder: Path, old: Callable[..., None]) -> None:
    old(QUANTIZE)
    inputs, was = _files(folder / "in"), _files(folder / "out")
    for name, count in (("Path.replace", 1), ("Path.replace", 2), ("Path.unlink", 1)):
        before = AT_CALL.format(module="pathlib", name=name, count=count)
        done = _onnxq(folder, QUANTIZE, before)
        assert done.returncode == 130 or count == 2, done.stderr  # there may be one rename only
        onnx.load(folder / "out/model.onnx")
        if name == "Path.replace":
            assert len(_files(folder / "out")) == len(was)  # no file too many, none too few
    assert _onnxq(folder, QUANTIZE).returncode == 0  # goes on where the removal was interrupted
    assert len(_files(folder / "out")) == len(was)
    assert _files(folder / "in") == inputs


def _mounted(folder: Path, size: str) -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path | None]:
    """The folder `out` on a disk of 300 kB; None where nothing may be mounted here."""
    if not _mounted(folder / "out", "300k"):
        yield None
        return
    try:
        yield folder / "out"
    finally:
        subprocess.run(["umount", folder / "out"], check=True)


def test_a_full_disk_keeps_the_old_file(
    folder: Path, small_disk: Path | None, old: Callable[..., None]
) -> None:
    """The old model takes 200 kB, so the new one does not fit beside it."""
    old(QUANTIZE)
    was = _files(folder)
    done = _onnxq(folder, QUANTIZE, **_small_files(small_disk))
    assert done.returncode == 2, done.stdout + done.stderr
    said = "No space left on device" if small_disk else "File too large"
    assert f"onnxq: error: cannot write out/model.onnx: {said}; check the folder" in done.stderr
    assert "Traceback" not in done.stderr and _files(folder) == was


def _small_files(disk: Path | None) -> dict[str, object]:
    """Where no small disk can be had: files of at most 100 kB, as a quota has them."""
    if disk is not None:
        return {}
    limit = (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)}


@pytest.mark.parametrize("folder", ["inline"], indirect=True)
@pytest.mark.parametrize("what", ["engine", "report", "calibration table"])
def test_a_full_disk_for_everything_else_that_is_written(what: str, folder: Path) -> None:
    place = folder / "out"
    (place / "old.json").write_text("old")
    words = {
        "engine": f"{BUILD}",
        "report": "inspect in/new.onnx --report out/old.json",
        "calibration table": "quantize in/new.onnx -o new.onnx --recipe int8 --calib in/data.npz "
        "--save-calib out/old.json",
    }[what]
    if not _mounted(place, "4k"):
        pytest.skip("nothing may be mounted here")
    try:
        with contextlib.suppress(OSError):
            (place / "filler").write_bytes(bytes(8192))
        done = _onnxq(folder, words)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
        assert [p.name for p in place.iterdir()] == ["filler"]
    finally:
        subprocess.run(["umount", place], check=True)
    assert (place / "old.json").read_text() == "old"


@pytest.mark.parametrize("folder", ["inline"], indirect=True)
def test_a_folder_that_may_not_be_written(folder: Path, old: Callable[..., None]) -> None:
    out, root = folder / "out", os.geteuid() == 0
    mounted = root and _mounted(out, "9m")  # root may write everywhere, but on such a disk
    try:
        old(QUANTIZE, BUILD)
        was = _files(folder)
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", out], check=True)
        elif root:
            pytest.skip("nothing may be mounted here")
        out.chmod(0o555) if not mounted else None
        for words in (QUANTIZE, BUILD):
            done = _onnxq(folder, words)
            assert done.returncode == 2, done.stderr
            said = "Read-only file system" if mounted else "Permission denied"
            assert "cannot write out/model." in done.stderr and said in done.stderr
            assert "Traceback" not in done.stderr
        assert _files(folder) == was
    finally:
        if mounted:
            subprocess.run(["umount", out], check=True)
        else:
            out.chmod(0o755)


@pytest.mark.parametrize(
    ("folder", "words"),
    [("external", QUANTIZE), ("inline", BUILD)],
    ids=["quantize", "build"],
    indirect=["folder"],
)
def test_two_runs_on_one_output_leave_that_of_one(words: str, folder: Path) -> None:
    results = []
    for which in ("old", "new"):
        assert _onnxq(folder, words.replace("new", which)).returncode == 0
        results.append({name: digest for name, (digest, _) in _files(folder / "out").items()})
    for _ in range(2):
        commands = [words.replace("new", which).split() for which in ("old", "new", "new")]
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "onnxq.cli", "-q", *command],
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for command in commands
        ]
        assert [child.communicate(timeout=120)[1] for child in children] == ["", "", ""]
        found = {name: digest for name, (digest, _) in _files(folder / "out").items()}
        if words == BUILD:  # the sidecar holds the seconds that the compile took
            made_of = json.loads((folder / "out/model.plan.json").read_text())["model"]
            engine = str(folder / "out/model.plan")
            assert found[engine] == results[made_of == "new.onnx"][engine]
            assert len(found) == 2
        else:
            assert found in results
