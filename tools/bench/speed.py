"""Time and memory of calibration beside the bare forward passes, in child processes, in turn.

Ours and the floor run alternately, three times each; the medians are compared. Times are those of
the loop over the samples alone, without loading: by the clock, and the CPU's, which is steadier
on a busy machine. Memory is the whole process's peak.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from statistics import median
from typing import Any

from tools.bench.child import peak
from tools.bench.models import CASES, data

_ROUNDS = 3
_SAMPLES = {"smollm2": 8, "minilm": 32, "sdxl-tiny": 8}


def speed_rows(names: list[str]) -> list[dict[str, Any]]:
    """One row a model and kind of calibration."""
    rows = []
    for name in names:
        for what in ("amax", "histogram", *(["gram"] if CASES[name].four else [])):
            print(f"{name} {what} calibration ...", file=sys.stderr, flush=True)
            runs = [(_child(name, "bare"), _child(name, what)) for _ in range(_ROUNDS)]
            rows.append(
                {
                    "model": name,
                    "what": f"calibration, {what}",
                    "floor_s": median(bare["seconds"] for bare, _ in runs),
                    "ours_s": median(ours["seconds"] for _, ours in runs),
                    "floor_cpu": median(bare["cpu"] for bare, _ in runs),
                    "ours_cpu": median(ours["cpu"] for _, ours in runs),
                    "floor_mb": median(bare["peak"] for bare, _ in runs) / 1e6,
                    "ours_mb": median(ours["peak"] for _, ours in runs) / 1e6,
                }
            )
    return rows


def _child(name: str, what: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tools.bench.speed", name, what]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(said.splitlines()[-1]))


def _measure(name: str, what: str) -> dict[str, float]:
    import time

    from onnxq.calibrate.run import calibrate
    from onnxq.calibrate.session import open_session
    from onnxq.gpus import target
    from onnxq.graph.model import Model
    from onnxq.graph.prepare import prepare
    from onnxq.placement import place
    from onnxq.ranging import watched_tensors
    from onnxq.recipe import load

    case = CASES[name]
    model, _ = prepare(Model.load(case.model), 19)
    given = data(case.calib)
    if given.text is not None:
        given = replace(given, samples=_SAMPLES[name])
    samples = given.open(model.inputs())
    if what == "bare":
        session = open_session(case.model)
        started, spent = time.perf_counter(), time.process_time()
        for feed in samples:
            session.run(None, feed)
        seconds, cpu = time.perf_counter() - started, time.process_time() - spent
    else:
        marks: list[tuple[float, float]] = []

        def mark(step: str, done: int, total: int) -> None:
            marks.append((time.perf_counter(), time.process_time()))

        watched = dict.fromkeys(watched_tensors(place(model, load("fp8"), target("sm89"))), what)
        calibrate(model.session_model, watched, samples, progress=mark)
        # The first mark ends the first sample: its share is added back.
        whole = len(marks) / (len(marks) - 1)
        seconds, cpu = (whole * (b - a) for a, b in zip(marks[0], marks[-1], strict=True))
    return {"seconds": seconds, "cpu": cpu, "peak": float(peak())}


if __name__ == "__main__":
    print(json.dumps(_measure(*sys.argv[1:])))
