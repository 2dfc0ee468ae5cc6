"""What one quantized model is worth, measured in a process of its own.

    python -m tools.bench.judge PART CASE MODEL FOLDER RESULT.json

PART is `outputs` (does ONNX Runtime load it, how far are its outputs from the original's),
`compiled` (what TensorRT makes of it for sm89) or `linted`. FOLDER holds what is shared by all
that are judged: `input/`, with the original, and `heldout.npz`. A process of its own because
a bad model may take the process with it, in ONNX Runtime or in the compiler.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tools.bench.models import CASES, Case

Array = NDArray[Any]
TARGET = "sm89"

# How ONNX Runtime is asked to load a model, in the order tried: (our word, session entry, level).
_WAYS = (
    ("yes", None, True),
    ("fusion off", "session.disable_quant_qdq", True),
    ("unoptimized", None, False),
)


def outputs(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    """How it loads, and the error of its first output over the held-out data.

    SNR in dB and cosine against the original; None where it has NaN the original has not.
    """
    from onnxq.evaluate.metrics import OutputError

    session, loads, reason = _load(model)
    if session is None:
        return {"loads": loads, "reason": reason}
    original, _, _ = _load(folder / "input" / case.model.name)
    assert original is not None
    name = original.get_outputs()[0].name
    errors, surprisals = OutputError(), []
    for feed in rows(folder / "heldout.npz", case.batch):
        (expected,) = original.run([name], feed)
        try:
            (found,) = session.run([name], _fitted(session, feed))
        except Exception as error:
            return {"loads": "no", "reason": _line(error)}
        errors.add(expected, found)
        if case.tokens:
            surprisals.append([_surprisal(x, feed[case.tokens]) for x in (found, expected)])
    result = errors.as_dict()
    measured = {"snr": result["snr_db"], "cosine": result["cosine"], "loads": loads}
    if surprisals:
        measured["perplexity"], measured["reference"] = (
            float(x) if math.isfinite(x) else None for x in np.exp(np.mean(surprisals, axis=0))
        )
    return measured | {"reason": reason}


def compiled(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    """Whether it compiles, and the share of the original's matrix FLOPs by format."""
    from onnxq.engine.build import build
    from onnxq.engine.coverage import WeightedNode
    from onnxq.engine.expected import expected_products
    from onnxq.engine.matching import cover
    from onnxq.engine.shapes import parse_shapes
    from onnxq.errors import OnnxqError
    from onnxq.graph.model import Model
    from onnxq.graph.prepare import infer_types, prepare
    from tools.bench.flops import in_eight_bits, model_flops, shares

    try:
        graph = Model.load(model)
        infer_types(graph)
        nodes = expected_products(graph)
    except OnnxqError:
        nodes = []
    try:
        built = build(model, target=TARGET, shapes=list(case.shapes), nodes=nodes)
    except OnnxqError as error:
        return {"compiles": False, "reason": error.message}
    original, _ = prepare(Model.load(folder / "input" / case.model.name), 0)
    optimum = {x.name: x.optimum for x in parse_shapes(list(case.shapes))}
    feed = {s.name: np.ones(optimum.get(s.name, s.shape), s.dtype) for s in original.inputs()}
    flops = model_flops(original, feed)
    single = [WeightedNode(name, "gemm", "any") for name in flops]
    ran = [(entry.node.name, entry.ran) for entry in cover(built.layers, single).nodes]
    found = shares(flops, ran)
    return {
        "compiles": True,
        "eight_bits": in_eight_bits(found),
        "shares": found,
        "products": built.coverage.counts(),
        "missed": len(built.coverage.missed),
        "seconds": round(built.parse_seconds + built.compile_seconds, 1),
    }


def linted(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    """How many findings, by severity and by rule."""
    from onnxq.errors import OnnxqError
    from onnxq.gpus import target
    from onnxq.graph.model import Model
    from onnxq.linting.run import lint

    try:
        found = lint(Model.load(model), target(TARGET)).findings
    except OnnxqError as error:
        return {"findings": None, "reason": error.message}
    return {
        "findings": len(found),
        "severities": Counter(f.severity.value for f in found),
        "rules": Counter(f.rule for f in found),
    }


def rows(path: Path, batch: int) -> Iterator[dict[str, Array]]:
    """The arrays of an .npz, `batch` rows at a time."""
    with np.load(path) as arrays:
        columns = dict(arrays)
    for start in range(0, len(next(iter(columns.values()))), batch):
        yield {name: array[start : start + batch] for name, array in columns.items()}


def _load(model: Path) -> tuple[Any, str, str]:
    """(session, our word for how it loads, why not by default); session None: it does not."""
    import onnxruntime as ort

    reason = ""
    for word, entry, optimized in _WAYS:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.enable_mem_reuse = False  # its plan takes minutes for models that are full of Q/DQ
        # Else the weights of INT4 files would be multiplied with activations rounded to INT8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if entry:
            options.add_session_config_entry(entry, "1")
        if not optimized:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return ort.InferenceSession(model, options, ["CPUExecutionProvider"]), word, reason
        except Exception as error:  # ONNX Runtime's errors share no base class
            reason = reason or _line(error)
    return None, "no", reason


def _fitted(session: Any, feed: Mapping[str, Array]) -> dict[str, Array]:
    """The feed in the session's types: a candidate may take FP16 where the original took FP32."""
    halves = {i.name for i in session.get_inputs() if i.type == "tensor(float16)"}
    return {n: a.astype(np.float16) if n in halves else a for n, a in feed.items()}


def _surprisal(logits: Array, tokens: Array) -> float:
    """Mean of -ln p of every token but the first; logits [B, S, V], tokens [B, S]."""
    from onnxq.evaluate.likelihood import score

    return float(np.mean([score(*pair).surprisal for pair in zip(logits, tokens, strict=True)]))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def main() -> None:
    from onnxq.files import write_json

    part, case, model, folder, result = sys.argv[1:]
    measure = {"outputs": outputs, "compiled": compiled, "linted": linted}[part]
    write_json(Path(result), measure(CASES[case], Path(model), Path(folder)))


if __name__ == "__main__":
    main()
