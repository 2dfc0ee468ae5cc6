"""Compile a model in a process of its own and read what it became."""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxq
from onnxq import files
from onnxq.engine.backends import Backend, choose, parse_targets
from onnxq.engine.compiler import Outcome, Request
from onnxq.engine.layers import EngineLayer
from onnxq.engine.shapes import EngineInput, Profile, parse_shapes
from onnxq.engine.worker import read_profiles
from onnxq.errors import OnnxqError
from onnxq.gpus import DEFAULT_TARGET
from onnxq.progress import Progress, silent

Shapes = Sequence[str] | Sequence[Sequence[str]] | Sequence[Profile]


@dataclass(frozen=True)
class BuildResult:
    """A compiled engine: what it was made from and for, and its layers.

    `engine` is None when nothing was written. `targets` is empty for the GPU at hand.
    """

    engine: Path | None
    engine_bytes: int
    model: Path
    model_sha256: str
    backend: str
    versions: dict[str, str]
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    inputs: tuple[EngineInput, ...]
    outputs: tuple[EngineInput, ...]
    parse_seconds: float
    compile_seconds: float
    warnings: tuple[str, ...]
    layers: tuple[EngineLayer, ...]


def build(
    model: Path,
    output: Path | None = None,
    *,
    target: str = DEFAULT_TARGET,
    shapes: Shapes = (),
    backend: str | None = None,
    memory_limit: int | None = None,
    workspace: int | None = None,
    progress: Progress = silent,
) -> BuildResult:
    """Compile `model` for `target` and write the engine and its sidecar `<output>.json`.

    Args:
        target: one name or several joined by commas (`sm89,sm120`): one engine for all of them.
            Backend `tensorrt` compiles for the GPU at hand and does not look at it.
        shapes: `NAME:MIN[,OPT,MAX]` texts, or several lists of them (one profile a list), or
            profiles.
        memory_limit: bytes of memory the compile may take; None for no limit.
        workspace: bytes of GPU memory one layer may use while it runs.

    Raises:
        OnnxqError: the model cannot be imported or compiled; nothing is written then.
    """
    chosen = choose(backend)
    targets = tuple(entry.name for entry in parse_targets(target, chosen))
    profiles = read_shapes(shapes)
    if not model.is_file():
        raise OnnxqError(f"no such model file: {model}")

    def request(engine: Path | None) -> Request:
        return Request(
            str(model.resolve()), str(engine) if engine else None, targets, profiles, workspace
        )

    if output is None:
        answer = run_worker([request(None)], chosen, memory_limit, progress)[0]
        return _result(model, None, chosen, targets, answer)
    sidecar = output.with_name(output.name + ".json")
    with files.replacing(output, sidecar) as (engine_path, sidecar_path):
        answer = run_worker([request(engine_path.resolve())], chosen, memory_limit, progress)[0]
        result = _result(model, output, chosen, targets, answer)
        sidecar_path.write_text(json.dumps(describe(result), indent=2) + "\n")
    return result


def read_shapes(shapes: Shapes) -> tuple[Profile, ...]:
    """The `shapes` argument of `build` as profiles."""
    if not shapes:
        return ()
    if all(isinstance(entry, str) for entry in shapes):
        return (parse_shapes(shapes),)  # type: ignore[arg-type]
    return tuple(
        parse_shapes(entry) if all(isinstance(x, str) for x in entry) else tuple(entry)  # type: ignore
        for entry in shapes
    )


def describe(result: BuildResult) -> dict[str, Any]:
    """The sidecar's content."""
    return {
        "versions": result.versions,
        "backend": result.backend,
        "targets": list(result.targets) or "the GPU at hand",
        "model": result.model.name,
        "model_sha256": result.model_sha256,
        "profiles": [[str(entry) for entry in profile] for profile in result.profiles],
        "inputs": [dataclasses.asdict(entry) for entry in result.inputs],
        "outputs": [dataclasses.asdict(entry) for entry in result.outputs],
        "engine_bytes": result.engine_bytes,
        "parse_seconds": result.parse_seconds,
        "compile_seconds": result.compile_seconds,
        "layers": len(result.layers),
        "warnings": list(result.warnings),
    }


def run_worker(
    requests: Sequence[Request], backend: Backend, memory_limit: int | None, progress: Progress
) -> list[dict[str, Any]]:
    """Compile every request in one child process; one answer each, `outcome` or `error`.

    Raises:
        OnnxqError: the child died before it could answer.
    """
    with tempfile.TemporaryDirectory(prefix="onnxq-build-") as folder:
        questions, answers = Path(folder, "requests.json"), Path(folder, "results.jsonl")
        errors = Path(folder, "stderr.txt")
        questions.write_text(
            json.dumps(
                {
                    "backend": backend.name,
                    "memory_limit": memory_limit,
                    "requests": [dataclasses.asdict(entry) for entry in requests],
                }
            )
        )
        with errors.open("wb") as stream:
            child = _start(questions, answers, stream)
            try:
                code = _watch(child, progress)
            finally:
                _end(child)
        said = answers.read_text().splitlines() if answers.exists() else []
        if code != 0 or len(said) < len(requests):
            raise _death(code, errors.read_text(errors="replace"), requests[len(said) :])
        return [json.loads(line) for line in said]


def _start(questions: Path, answers: Path, errors: Any) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    source = str(Path(onnxq.__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        [source, *filter(None, [environment.get("PYTHONPATH")])]
    )
    # A session of its own: Ctrl-C reaches this process alone, which then ends the child.
    return subprocess.Popen(
        [sys.executable, "-m", "onnxq.engine.worker", str(questions), str(answers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        env=environment,
        start_new_session=True,
    )


def _watch(child: subprocess.Popen[str], progress: Progress) -> int:
    """Report stages, and every half second the seconds spent in one, until the child ends."""
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
            word = words.get(timeout=0.5)
        except queue.Empty:
            continue
        if word is None:
            return child.wait()
        stage, since = word, time.monotonic()


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.kill()
        child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            stream.close()


def _death(code: int, errors: str, unanswered: Sequence[Request]) -> OnnxqError:
    lines = [line for line in errors.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    name = unanswered[0].model if unanswered else "the model"
    if "MemoryError" in errors or "bad_alloc" in errors:
        return OnnxqError(f"compiling {name} ran out of memory", "raise the memory limit")
    if code == -signal.SIGKILL:
        return OnnxqError(
            f"compiling {name} was killed, most likely for memory",
            "free memory, use smaller maximum shapes, or compile on a larger machine",
        )
    if code < 0:
        return OnnxqError(
            f"the compiler crashed on {name} ({signal.Signals(-code).name})",
            last,
        )
    return OnnxqError(f"the compile of {name} ended without an answer (exit {code})", last)


def _result(
    model: Path,
    output: Path | None,
    backend: Backend,
    targets: tuple[str, ...],
    answer: dict[str, Any],
) -> BuildResult:
    outcome = outcome_of(answer)
    return BuildResult(
        engine=output,
        engine_bytes=outcome.engine_bytes,
        model=model,
        model_sha256=files.sha256(model),
        backend=backend.name,
        versions={"onnxq": onnxq.__version__, backend.name: answer["version"]},
        targets=targets,
        profiles=outcome.profiles,
        inputs=outcome.inputs,
        outputs=outcome.outputs,
        parse_seconds=outcome.parse_seconds,
        compile_seconds=outcome.compile_seconds,
        warnings=outcome.warnings,
        layers=tuple(backend.layers(list(outcome.log), list(outcome.inspected))),
    )


def outcome_of(answer: dict[str, Any]) -> Outcome:
    """The child's answer as an Outcome.

    Raises:
        OnnxqError: the one the child met.
    """
    if "error" in answer:
        raise OnnxqError(answer["error"]["message"], answer["error"]["hint"])
    content = answer["outcome"]

    def tensors(key: str) -> tuple[EngineInput, ...]:
        return tuple(
            EngineInput(entry["name"], tuple(entry["dims"]), entry["dtype"])
            for entry in content[key]
        )

    return Outcome(
        inputs=tensors("inputs"),
        outputs=tensors("outputs"),
        profiles=read_profiles(content["profiles"]),
        parse_seconds=content["parse_seconds"],
        compile_seconds=content["compile_seconds"],
        engine_bytes=content["engine_bytes"],
        log=tuple(content["log"]),
        inspected=tuple(content["inspected"]),
        warnings=tuple(content["warnings"]),
    )
