"""Files are replaced whole or not at all; what killed runs left goes, what others use stays."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from onnxq.errors import OnnxqError
from onnxq.files import (
    alone_in,
    refuse_unreadable,
    replacing,
    scratch,
    sha256,
    temporary_beside,
    write_json,
)


def test_all_targets_appear_together(tmp_path: Path) -> None:
    first, second = tmp_path / "a.plan", tmp_path / "a.plan.json"
    with replacing(first, second) as (one, two):
        one.write_text("engine")
        two.write_text("sidecar")
        assert not first.exists() and not second.exists()
        assert one.parent == two.parent == tmp_path
    assert (first.read_text(), second.read_text()) == ("engine", "sidecar")
    assert sorted(tmp_path.iterdir()) == [first, second]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_everything_as_it_was(
    error: type[BaseException], tmp_path: Path
) -> None:
    target = tmp_path / "a"
    target.write_text("old")
    with pytest.raises(error), replacing(target, tmp_path / "b") as (one, two):
        one.write_text("new")
        two.write_text("new")
        raise error
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


STRIKE = """
import os, signal, sys
from pathlib import Path
from onnxq.files import replacing
left, real = int(sys.argv[2]), Path.replace
def strike(self, target):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), getattr(signal, sys.argv[3]))
    return real(self, target)
Path.replace = strike
engine = Path(sys.argv[1])
with replacing(engine, engine.with_name("a.plan.json")) as (one, two):
    one.write_text("new")
    two.write_text("new")
"""


@pytest.mark.parametrize("how", ["SIGKILL", "SIGINT"])
@pytest.mark.parametrize("moment", [1, 2, 3])
def test_no_moment_has_what_describes_another_file(how: str, moment: int, tmp_path: Path) -> None:
    """The engine and its sidecar: stopped before each of the renames."""
    engine, sidecar = tmp_path / "a.plan", tmp_path / "a.plan.json"
    engine.write_text("old")
    sidecar.write_text("old")
    words = [sys.executable, "-c", STRIKE, engine, str(moment), how]
    assert subprocess.run(words, stderr=subprocess.DEVNULL).returncode != 0
    if how == "SIGINT":  # it waits: all are new, and nothing else is left
        assert (engine.read_text(), sidecar.read_text()) == ("new", "new")
        assert len(list(tmp_path.iterdir())) == 2
        return
    found = engine.read_text(), sidecar.read_text() if sidecar.exists() else None
    assert found == [("old", "old"), ("old", None), ("new", None)][moment - 1]
    with replacing(engine, sidecar) as (one, two):
        one.write_text("next")
        two.write_text("next")
    assert (engine.read_text(), sidecar.read_text()) == ("next", "next")
    assert len(list(tmp_path.iterdir())) == 2


def test_what_cannot_be_put_in_place_leaves_what_describes_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, sidecar = tmp_path / "a.plan", tmp_path / "a.plan.json"
    engine.write_text("old")
    sidecar.write_text("old")
    real = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target == engine:
            raise OSError(1, "Operation not permitted")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with (
        pytest.raises(OnnxqError, match=r"cannot write .*a\.plan: Operation not permitted"),
        replacing(engine, sidecar) as (one, two),
    ):
        one.write_text("new")
        two.write_text("new")
    assert (engine.read_text(), sidecar.read_text()) == ("old", "old")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("letter", ["目", "🙂", "\udcff"])
def test_names_are_cut_by_their_bytes(letter: str, tmp_path: Path) -> None:
    """A folder takes names of 255 bytes: 85 such letters, or 63."""
    name = letter * (255 // len(os.fsencode(letter)))
    write_json(tmp_path / name, {})
    write_json(tmp_path / name, {"new": 1})
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_what_the_system_refuses_is_one_line_about_the_target(tmp_path: Path) -> None:
    for target in (tmp_path / "no/such/folder", tmp_path / ("x" * 300)):
        with pytest.raises(OnnxqError) as caught:
            write_json(target, {})
        assert str(target) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(OnnxqError, match=r"cannot write .*target: No space left"):  # noqa: SIM117
        with replacing(tmp_path / "target"):
            raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("pipe", "folder", "null"):
        with pytest.raises(OnnxqError, match="not a file"):
            write_json(tmp_path / name, {})
    assert (tmp_path / "null").is_symlink()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_permissions_of_a_new_file(mask: int, tmp_path: Path) -> None:
    old = os.umask(mask)
    try:
        write_json(tmp_path / "a.json", {"ö": 1})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o666 & ~mask
    assert json.loads((tmp_path / "a.json").read_text()) == {"ö": 1}


CHILD = """
import sys
import tempfile
import threading
from pathlib import Path
from onnxq.files import temporary_beside
with temporary_beside(Path(sys.argv[1])) as path:
    path.write_text("half")
    print(path, flush=True)
    sys.stdin.read()
"""


def test_the_next_run_removes_what_a_killed_one_left_and_nothing_a_running_one_uses(
    tmp_path: Path,
) -> None:
    target = tmp_path / "model.onnx"
    other = tmp_path / ".onnxq-model.onnx2.1-abc"  # a temporary of another target
    other.write_text("other")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, target], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    temporary = Path(child.stdout.readline().decode().strip())
    write_json(target, 1)
    assert temporary.read_text() == "half"
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=20)
    assert temporary.exists()
    write_json(target, 2)
    assert sorted(tmp_path.iterdir()) == [other, target]


def test_two_temporaries_of_one_target(tmp_path: Path) -> None:
    with temporary_beside(tmp_path / "a") as one, temporary_beside(tmp_path / "a") as two:
        assert one != two and one.exists() and two.exists()
    assert list(tmp_path.iterdir()) == []


def test_names_with_signs_that_patterns_use(tmp_path: Path) -> None:
    """A target's name is no pattern: `[ab]` must not remove the temporaries of `a`."""
    with temporary_beside(tmp_path / "a") as one:
        one.write_text("in use")
        write_json(tmp_path / "[ab]", 1)
        write_json(tmp_path / "*", 2)
        assert one.read_text() == "in use"


@pytest.fixture
def system_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The system's folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def test_a_scratch_folder_goes_at_the_end_however_that_comes(system_folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch() as folder:
        (folder / "a").mkdir()
        (folder / "a/b").write_text("x")
        assert folder.parent.parent == system_folder
        raise KeyboardInterrupt
    assert list(system_folder.iterdir()) == []


def test_outputs_can_be_written_into_a_scratch_folder(system_folder: Path) -> None:
    """They lock the folder they are in: a lock held by scratch() on the same would never end."""

    def write() -> None:
        with scratch() as folder:
            with replacing(folder / "out") as (file,):
                file.write_text("x")
            assert (folder / "out").read_text() == "x"
        done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(20)
    assert done


SCRATCH = """
import sys
from onnxq.files import scratch
with scratch() as folder:
    (folder / "half").write_text("x")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_next_run_removes_the_scratch_folder_of_a_killed_one(system_folder: Path) -> None:
    foreign = system_folder / "onnxq-scratching"
    foreign.mkdir()
    (system_folder / "onnxq-scratch-link").symlink_to(foreign)
    child = subprocess.Popen(
        [sys.executable, "-c", SCRATCH], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    left = Path(child.stdout.readline().decode().strip())
    with scratch():
        assert (left / "half").exists()
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=20)
    assert (left / "half").exists()
    with scratch() as folder:
        assert not left.exists() and folder.exists()
    assert sorted(p.name for p in system_folder.iterdir()) == [
        "onnxq-scratch-link",
        "onnxq-scratching",
    ]


def test_a_full_or_missing_folder_for_temporary_files_is_one_line(
    system_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OnnxqError, match=r"no room .*No space left.*TMPDIR"), scratch():
        raise OSError(28, "No space left on device")
    with pytest.raises(FileNotFoundError), scratch():  # not ours to explain
        raise FileNotFoundError("other")
    monkeypatch.setattr(tempfile, "tempdir", str(system_folder / "missing"))
    with pytest.raises(OnnxqError, match=r"no room .*TMPDIR"), scratch():
        pass


def test_two_runs_leave_the_files_of_one(tmp_path: Path) -> None:
    """One that comes to its renames while another is at them waits."""
    targets = tmp_path / "a.plan", tmp_path / "a.plan.json"

    def write() -> None:
        with replacing(*targets) as files:
            for file in files:
                file.write_text("second")

    other = threading.Thread(target=write)
    with alone_in(tmp_path):
        other.start()
        other.join(0.5)
        assert other.is_alive() and not targets[0].exists()
    other.join(20)
    assert [t.read_text() for t in targets] == ["second"] * 2


def test_what_is_no_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", ".", "missing", "nul\0", "n" * 300):
        with pytest.raises(OnnxqError, match=r"cannot read the text .*; give one") as caught:
            refuse_unreadable(tmp_path / name, "the text", "give one")
        assert "\n" not in str(caught.value)
    (tmp_path / "file").touch()
    refuse_unreadable(tmp_path / "file", "the text", "give one")


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == want
