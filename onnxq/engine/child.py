"""Start the compile's own process, watch it, and say clearly how it ended."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import onnxq
from onnxq import files
from onnxq.engine.backends import Backend
from onnxq.engine.protocol import Answer, Request, answer_from_json, request_to_json
from onnxq.errors import OnnxqError
from onnxq.progress import Progress, silent

_TICK = 0.5
_OUT_OF_MEMORY = ("MemoryError", "bad_alloc", "Cannot allocate memory", "out of memory")


def compile_all(
    requests: Sequence[Request],
    backend: Backend,
    *,
    memory_limit: int | None = None,
    progress: Progress = silent,
) -> list[Answer]:
    """Compile every request in one child process; one answer each, in order.

    Args:
        memory_limit: bytes of memory the child may take, None for no limit.

    Raises:
        OnnxqError: the child ended before it had answered them all.
    """
    with files.scratch() as folder:
        questions, results = folder / "requests.json", folder / "results.jsonl"
        errors = folder / "stderr.txt"
        content = {
            "backend": backend.name,
            "memory_limit": memory_limit,
            "requests": [request_to_json(request) for request in requests],
        }
        questions.write_text(json.dumps(content))
        with errors.open("wb") as stream:
            child = _start(questions, results, stream)
            try:
                code = _watch(child, progress)
            finally:
                _end(child)
        lines = results.read_text().splitlines() if results.exists() else []
        if code != 0 or len(lines) < len(requests):
            pending = requests[min(len(lines), len(requests) - 1)]
            raise _death(code, errors.read_text(errors="replace"), pending, memory_limit)
        return [answer_from_json(json.loads(line)) for line in lines]


def _start(questions: Path, results: Path, errors: IO[bytes]) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    source = str(Path(onnxq.__file__).parent.parent)
    known = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = os.pathsep.join([source, known] if known else [source])
    # A session of its own: Ctrl-C reaches this process alone, which then ends the child.
    return subprocess.Popen(
        [sys.executable, "-m", "onnxq.engine.worker", str(questions), str(results)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=environment,
        start_new_session=True,
    )


def _watch(child: subprocess.Popen[str], progress: Progress) -> int:
    """Report each stage, and twice a second the seconds spent in it, until the child ends."""
    words: queue.Queue[str | None] = queue.Queue()
    assert child.stdout is not None
    stream = child.stdout

    def read() -> None:
        for line in stream:
            words.put(line.strip())
        words.put(None)

    threading.Thread(target=read, daemon=True).start()
    stage, since = "start the compiler", time.monotonic()
    while True:
        progress(stage, int(time.monotonic() - since), 0)
        try:
            word = words.get(timeout=_TICK)
        except queue.Empty:
            continue
        if word is None:
            return child.wait()
        stage, since = word, time.monotonic()


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.kill()
        child.wait()
    if child.stdin is not None:
        child.stdin.close()


def _death(code: int, errors: str, pending: Request, memory_limit: int | None) -> OnnxqError:
    lines = [line for line in errors.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    if any(sign in errors for sign in _OUT_OF_MEMORY):
        return OnnxqError(
            f"compiling {pending.model} ran out of memory", "raise the limit or free memory"
        )
    name = signal.Signals(-code).name if code < 0 else f"exit {code}"
    if code < 0 and memory_limit is not None:
        # The compiler does not look at what a failed allocation returns.
        return OnnxqError(
            f"compiling {pending.model} crashed within its limit of "
            f"{memory_limit >> 20:,} MiB of memory ({name})",
            "raise the limit",
        )
    if code == -signal.SIGKILL:
        return OnnxqError(
            f"compiling {pending.model} was killed, most likely for want of memory",
            "free memory, use smaller maximum shapes, or compile on a larger machine",
        )
    if code < 0:
        cure = "it may be too deep for the compiler, or damaged: try a part of it"
        return OnnxqError(f"the compiler crashed on {pending.model} ({name})", last or cure)
    return OnnxqError(f"compiling {pending.model} ended without an answer ({name})", last)
