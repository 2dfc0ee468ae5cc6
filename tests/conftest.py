"""Shared fixtures: the real models, and runs of the command line in this process's environment."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models/out"

# A shell's background job ignores Ctrl-C, and its children would too; those of tests must not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

Cli = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def models() -> Path:
    """Where `make models` puts the real models; a test that needs one fails without it."""
    assert (MODELS / "minilm/model.onnx").exists(), "run `make models` first"
    return MODELS


@pytest.fixture(scope="module", autouse=True)
def _module_leaves_nothing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Remove the folders a module's fixtures made, where all its tests passed.

    pytest removes those of single tests (`tmp_path`) itself, these only when the run is over.
    """
    root, failed = tmp_path_factory.getbasetemp(), request.session.testsfailed
    before = set(root.iterdir())
    yield
    if request.session.testsfailed == failed:
        for path in set(root.iterdir()) - before:
            if path.is_symlink():
                path.unlink()
            else:
                shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(scope="session")
def cli() -> Cli:
    """Run `onnxq WORDS` in a child process: output, errors and exit code as a user has them."""

    def run(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "onnxq.cli", *map(str, words)],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run
