"""Files are replaced whole or not at all; what killed runs left goes, what others use stays."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from onnxq.errors import OnnxqError
from onnxq.files import replacing, sha256, temporary_beside, write_json


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


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    # FIPS 180-2, appendix B.1
    want = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256(tmp_path / "abc") == want
