"""What a child process took is told, and of the child alone."""

from __future__ import annotations

import sys
from pathlib import Path

from tools.bench.child import measured, onnxq

_BURN = "import time\nwhile time.process_time() < 0.5: pass"
_TAKE = "x = bytearray(200_000_000)\nx[::4096] = b'1' * len(x[::4096])"


def run(code: str, **options: float):  # type: ignore[no-untyped-def]
    return measured([sys.executable, "-I", "-S", "-c", code], **options)


def test_memory_and_output() -> None:
    usage = run(_TAKE + "\nprint('taken')")
    assert usage.code == 0 and usage.said == "taken\n"
    assert 200e6 < usage.peak < 260e6


def test_time_and_memory_of_grandchildren_count() -> None:
    both = f"{_BURN}\n{_TAKE}"
    usage = run(f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {both!r}])")
    assert usage.cpu >= 0.5
    assert usage.peak > 200e6


def test_the_callers_memory_does_not_count() -> None:
    ballast = bytearray(400_000_000)
    ballast[::4096] = b"1" * len(ballast[::4096])
    assert run("pass").peak < 60e6


def test_processes_side_by_side_count_together() -> None:
    code = (
        "import subprocess, sys, time\n"
        f"c = [sys.executable, '-c', {_TAKE + chr(10) + 'import time; time.sleep(1)'!r}]\n"
        "for p in [subprocess.Popen(c) for _ in range(2)]: p.wait()"
    )
    assert run(code).peak > 400e6


def test_ends() -> None:
    assert run("import sys; print('why'); sys.exit(3)").code == 3
    assert run("import os; os.kill(os.getpid(), 9)").code == -9


def test_a_child_that_takes_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    sleep = f"open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    grandchild = f"[sys.executable, '-c', {'import os, time; ' + sleep!r}]"
    usage = run(f"import subprocess, sys\nsubprocess.run({grandchild})", limit=2.0)
    assert usage.code is None
    state = Path(f"/proc/{note.read_text()}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] in "ZX"


def test_onnxq_says_why_it_failed() -> None:
    try:
        onnxq("quantize", "no-such.onnx")
    except RuntimeError as error:
        assert "no such file" in str(error)
    else:
        raise AssertionError("it did not fail")
