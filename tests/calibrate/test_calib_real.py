"""Calibration of real models: its protocol, its time and its memory beside the bare runs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
OUT = ROOT / "models" / "out"
SMOLLM2 = OUT / "smollm2-fp32"
WIKI = OUT / "wiki" / "wiki_calib.txt"
MINILM = OUT / "minilm"

needs_smollm2 = pytest.mark.skipif(
    not (SMOLLM2 / "model.onnx").exists() or not WIKI.exists(),
    reason="python -m models.smollm2 and models.wiki make it",
)
needs_minilm = pytest.mark.skipif(
    not (MINILM / "calib.npz").exists(), reason="python -m models.minilm makes it"
)


@needs_smollm2
def test_windows_are_those_the_yardsticks_are_measured_on() -> None:
    """Ids of the whole text, 512 at a time, as the tokenizer itself gives them."""
    from tokenizers import Tokenizer

    from onnxq.calibrate.session import InputSpec
    from onnxq.calibrate.text import text_samples

    inputs = [InputSpec("input_ids", np.dtype(np.int64), ("batch", "seq"))]
    samples = text_samples(WIKI, SMOLLM2 / "tokenizer.json", inputs, samples=8)
    ids = Tokenizer.from_file(str(SMOLLM2 / "tokenizer.json")).encode(WIKI.read_text()).ids
    found = np.concatenate([feed["input_ids"] for feed in samples])
    assert found.tolist() == np.reshape(ids[: 8 * 512], (8, 512)).tolist()


def costs(model: Path, watched: list[str], steps: int) -> dict[str, float]:
    """CPU seconds of each step at its cheapest: bare, and with each statistic of `watched`.

    CPU time of one thread, step by step in turn, and the least of all rounds: what other work on
    the machine does to the clock stays out.
    """
    from onnxq.calibrate.data import open_samples
    from onnxq.calibrate.passes import fetch
    from onnxq.calibrate.session import open_session
    from onnxq.calibrate.statistics import make
    from onnxq.calibrate.text import text_samples
    from onnxq.graph.model import Model

    graph = Model.load(model)
    if "smollm2" in str(model):
        data = text_samples(WIKI, model.parent / "tokenizer.json", graph.inputs(), samples=steps)
    else:
        data = open_samples(model.parent / "calib.npz", graph.inputs())
    bare = open_session(model, threads=1)
    content, folder = graph.session_model(watched)
    session = open_session(content, folder=folder, threads=1)
    kinds = {kind: {name: make(kind) for name in watched} for kind in ("amax", "histogram")}
    spent: dict[str, list[float]] = {"bare": [], "amax": [], "histogram": []}
    feeds = list(data)[:steps]
    for feed in feeds + feeds[:1]:  # the first step allocates: it is not counted
        start = time.process_time()
        bare.run(None, feed)
        spent["bare"].append(time.process_time() - start)
        for kind, collected in kinds.items():
            start = time.process_time()
            for name, values in fetch(session, watched, feed):
                for statistic in collected[name].values():
                    statistic.update(values)
            spent[kind].append(time.process_time() - start)
    return {kind: min(times[1:]) for kind, times in spent.items()}


def inputs_of_weighted_products(model: Path) -> list[str]:
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    names = [
        n.input[0] for n in graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights
    ]
    return list(dict.fromkeys(names))


@pytest.mark.parametrize(
    "model, steps",
    [
        pytest.param(SMOLLM2, 2, marks=needs_smollm2),
        pytest.param(MINILM, 16, marks=needs_minilm),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_calibration_costs_little_more_than_the_bare_runs(model: Path, steps: int) -> None:
    path = model / "model.onnx"
    spent = costs(path, inputs_of_weighted_products(path), steps)
    assert spent["amax"] <= 1.25 * spent["bare"]
    assert spent["histogram"] <= 1.7 * spent["bare"]


PEAK = """
import json, resource, sys
from pathlib import Path
from onnxq.calibrate.session import open_session
from onnxq.calibrate.text import text_samples
model, text, watched = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
bare = open_session(model) if not watched else None
if bare is None:
    from onnxq.graph.model import Model
    graph = Model.load(model)
inputs = graph.inputs() if bare is None else bare.inputs
samples = text_samples(text, model.parent / "tokenizer.json", inputs, samples=2)
if bare is None:
    from onnxq.calibrate.run import calibrate
    calibrate(graph.session_model, dict.fromkeys(watched, "histogram"), samples)
else:
    for feed in samples:
        bare.run(None, feed)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@needs_smollm2
def test_calibration_peaks_within_twice_the_bare_session() -> None:
    model = SMOLLM2 / "model.onnx"
    peaks = [
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK, str(model), str(WIKI), json.dumps(watched)],
                check=True,
                capture_output=True,
                text=True,
                cwd=ROOT,
            ).stdout
        )
        for watched in ([], inputs_of_weighted_products(model))
    ]
    assert peaks[1] <= 2 * peaks[0]
