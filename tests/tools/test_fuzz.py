"""A few seconds of `python -m tools.fuzz`; and what it takes for a finding."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from onnxq.errors import OnnxqError
from tools.fuzz import __main__ as fuzz
from tools.fuzz.targets import Case

ROOT = Path(__file__).parents[2]


def test_damaged_files_end_in_one_line(models: Path, tmp_path: Path) -> None:
    """Of small models, of pieces of the real ones, and of data; 100,000 runs are made by hand."""
    words = ["--runs", "300", "--folder", tmp_path, "--models", models]
    done = subprocess.run(
        [sys.executable, "-m", "tools.fuzz", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("0 findings, 0 of them different")
    # Much of it is damaged so little that it is taken, or it would show nothing of what comes then.
    taken, refused = map(int, re.findall(r"^(\d+) accepted, (\d+) refused", done.stdout, re.M)[0])
    assert taken > 40 and refused > 40


def no_cure(path: Path) -> None:
    raise OnnxqError("it is wrong")


def traceback(path: Path) -> None:
    raise KeyError(path.read_bytes())


def spin(path: Path) -> None:
    while True:
        pass


def wait(path: Path) -> None:
    time.sleep(9)


def one_line(path: Path) -> None:
    raise OnnxqError("it is wrong", "mend it")


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (no_cure, "no cure: it is wrong"),
        (traceback, "KeyError"),
        (spin, "Hang: 0.1 s of CPU"),
        (wait, "Hang: 0.5 s by the clock"),
        (one_line, None),
    ],
)
def test_findings(
    run: Callable[[Path], None],
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fuzz.Cases, "__init__", lambda *_: None)
    monkeypatch.setattr(fuzz.Cases, "make", lambda *_: Case("model", "s", b"x", run, ".onnx"))
    # It is this process, whose limits and dumps are pytest's.
    monkeypatch.setattr(fuzz.resource, "setrlimit", lambda *_: None)
    for name in ("enable", "dump_traceback_later", "cancel_dump_traceback_later"):
        monkeypatch.setattr(fuzz.faulthandler, name, lambda *_, **__: None)
    monkeypatch.setattr(fuzz, "LIMIT_SECONDS", 0.1)
    monkeypatch.setattr(fuzz, "LIMIT_WAITING", 0.5 if run is wait else 5)
    words = ["--runs", "2", "--folder", str(tmp_path), "--keep", str(tmp_path / "kept")]
    monkeypatch.setattr(sys, "argv", ["fuzz", *words])
    assert fuzz.main() == (said is not None)
    printed = capsys.readouterr().out
    kept = sorted(p.name for p in (tmp_path / "kept").iterdir())
    if said is None:
        assert "0 findings" in printed and kept == ["running"]
    else:
        assert "2 findings, 1 of them different" in printed and said in printed
        assert kept == ["0-0.onnx", "0-1.onnx", "running"]
