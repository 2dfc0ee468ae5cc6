"""The compile's own process: `python -m onnxq.engine.worker REQUESTS RESULTS`.

REQUESTS is JSON: `{"backend", "memory_limit", "requests": [...]}`; RESULTS gets one JSON line a
request, `{"outcome": ...}` or `{"error": {"message", "hint"}}`. Standard output carries one word a
stage, for progress. A process of its own because TensorRT keeps the first logger a process gave
it, because its memory goes with it, and because what kills it must not kill the caller.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from onnxq.engine.backends import BACKENDS, load_module
from onnxq.engine.compiler import Log, Request, compile_model
from onnxq.engine.shapes import ShapeRange
from onnxq.errors import OnnxqError


def main(requests_path: str, results_path: str) -> None:
    """Compile every request in turn; an error of one does not stop the next."""
    _die_with_the_caller()
    content = json.loads(Path(requests_path).read_text())
    _limit_memory(content["memory_limit"])
    stages = _take_standard_output()
    backend = BACKENDS[content["backend"]]
    with Path(results_path).open("w") as results:

        def stage(word: str) -> None:
            stages.write(word + "\n")
            stages.flush()

        try:
            trt = load_module(backend)
            log = Log(trt)
        except OnnxqError as error:
            results.write(json.dumps(_failure(error)) + "\n")
            return
        for entry in content["requests"]:
            try:
                outcome = compile_model(_request(entry), backend, trt, log, stage)
                line: dict[str, Any] = {"outcome": dataclasses.asdict(outcome)}
                line["version"] = str(trt.__version__)
            except OnnxqError as error:
                line = _failure(error)
            results.write(json.dumps(line) + "\n")
            results.flush()


def read_profiles(content: Any) -> tuple[tuple[ShapeRange, ...], ...]:
    """Profiles back from their JSON form."""
    return tuple(
        tuple(
            ShapeRange(
                entry["name"],
                tuple(entry["minimum"]),
                tuple(entry["optimum"]),
                tuple(entry["maximum"]),
            )
            for entry in profile
        )
        for profile in content
    )


def _request(entry: dict[str, Any]) -> Request:
    return Request(
        model=entry["model"],
        engine=entry["engine"],
        targets=tuple(entry["targets"]),
        profiles=read_profiles(entry["profiles"]),
        workspace=entry["workspace"],
    )


def _failure(error: OnnxqError) -> dict[str, Any]:
    return {"error": {"message": error.message, "hint": error.hint}}


def _take_standard_output() -> Any:
    """Keep standard output for our stages; what libraries print there goes to standard error."""
    stages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stages


def _die_with_the_caller() -> None:
    """End this process when the caller's end of standard input closes, however it ended."""

    def watch() -> None:
        # The descriptor itself: a lock held on sys.stdin would abort the interpreter's exit.
        while os.read(0, 1024):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _limit_memory(limit: int | None) -> None:
    if limit is not None:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
