from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from onnxq import memory


def control_group(folder: Path, limit: str) -> Path:
    (folder / "memory.max").write_text(limit + "\n")
    (folder / "memory.current").write_text("700\n")
    (folder / "memory.stat").write_text("anon 300\ninactive_anon 20\ninactive_file 250\n")
    return folder


def test_a_container_owns_what_its_group_leaves_and_may_take_back_the_page_cache(
    tmp_path: Path,
) -> None:
    assert memory._control_group(control_group(tmp_path, "1000")) == 1000 - 700 + 250


def test_a_group_without_a_limit_or_no_group_says_nothing(tmp_path: Path) -> None:
    assert memory._control_group(control_group(tmp_path, "max")) is None
    assert memory._control_group(tmp_path / "none") is None


def test_the_smaller_of_machine_and_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_machine", lambda: 100)
    monkeypatch.setattr(memory, "_control_group", lambda: 40)
    assert memory.available_memory() == 40
    monkeypatch.setattr(memory, "_control_group", lambda: None)
    assert memory.available_memory() == 100


TOUCH = """
from onnxq.memory import resident_memory
before = resident_memory()
held = b"x" * (200 << 20)
print(before, resident_memory() - before)
"""


def test_touched_memory_is_seen() -> None:
    """In a process of its own: what is resident of this one shrinks by what earlier tests let go,
    and by pages of large libraries that a busy machine takes back."""
    child = subprocess.run([sys.executable, "-c", TOUCH], capture_output=True, check=True)
    before, grown = map(int, child.stdout.split())
    if not before:
        pytest.skip("this system does not say")
    # A bare interpreter holds some 20 MB, all of which could go meanwhile.
    assert grown == pytest.approx(200 << 20, abs=40 << 20)
