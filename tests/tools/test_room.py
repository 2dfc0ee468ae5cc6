"""The disk that is too small is said before anything is written."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from tools import room

ROOT = Path(__file__).parents[2]
Usage = namedtuple("Usage", "total used free")

ON_A_SMALL_DISK = """
import shutil, sys, types
shutil.disk_usage = lambda path: types.SimpleNamespace(free=3e8)
from tools import room
sys.argv = ["room", "demo"]
room.main()
"""


def test_too_small_a_disk_is_one_line_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ON_A_SMALL_DISK],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: make demo needs about \d\.\d GB free at /\S*, which has 0\.3 GB\n", done.stderr
    )


def test_a_disk_that_is_large_enough_is_not_mentioned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, passes in ((16e9, True), (10e9, False)):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(0, 0, int(free)))
        assert (room.lacking("test", tmp_path, tmp_path) is None) == passes


def test_what_is_there_already_needs_no_room(tmp_path: Path) -> None:
    before = room.needed("test", tmp_path, tmp_path)
    made = tmp_path / "models/out/sdxl-unet-full-fp16/model.onnx"
    made.parent.mkdir(parents=True)
    made.touch()
    after = room.needed("test", tmp_path, tmp_path)
    assert sum(before.values()) - sum(after.values()) > 5e9  # its weights in FP16: 5.1 GB


def test_each_disk_is_asked_for_its_own_part(tmp_path: Path) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("one disk alone")
    apart = room.needed("test", tmp_path, other)
    assert apart.keys() == {tmp_path, other}
    (together,) = room.needed("test", tmp_path, tmp_path).values()
    assert together == sum(apart.values())
