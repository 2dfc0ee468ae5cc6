"""The compile's own process: `python -m onnxq.engine.worker REQUESTS RESULTS`.

REQUESTS is JSON, `{"backend", "memory_limit", "requests": [...]}`; RESULTS gets one JSON line a
request. Standard output carries one word a stage, for progress. A process of its own because
TensorRT keeps the first logger a process gave it, because its memory goes with the process, and
because what kills it must not kill the caller.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import IO

from onnxq.engine.backends import BACKENDS, load_module
from onnxq.engine.compiler import Log, compile_model
from onnxq.engine.protocol import Answer, answer_to_json, request_from_json
from onnxq.errors import OnnxqError


def main(requests_path: str, results_path: str) -> None:
    """Compile every request in turn; an error of one does not stop the next."""
    _die_with_the_caller()
    _deepen_stack()
    content = json.loads(Path(requests_path).read_text())
    _limit_memory(content["memory_limit"])
    stages = _take_standard_output()
    backend = BACKENDS[content["backend"]]
    trt = load_module(backend)
    log = Log(trt)

    def stage(word: str) -> None:
        stages.write(word + "\n")
        stages.flush()

    with Path(results_path).open("w") as results:
        for entry in content["requests"]:
            answer: Answer
            try:
                answer = compile_model(request_from_json(entry), backend, trt, log, stage)
            except OnnxqError as error:
                answer = error
            results.write(json.dumps(answer_to_json(answer)) + "\n")
            results.flush()


def _take_standard_output() -> IO[str]:
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


def _deepen_stack() -> None:
    """The compiler recurses along the graph: a chain of 10,000 nodes overflows the usual 8 MiB."""
    import resource

    most = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (most, most))


def _limit_memory(limit: int | None) -> None:
    if limit is not None:
        import resource  # not on Windows, where a limit is not offered

        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
