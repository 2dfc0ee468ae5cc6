"""Tiny ONNX models, written as ONNX's own text, and samples for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper


def write(path: Path, graph: str, opset: int = 21, **initializers: np.ndarray[Any, Any]) -> Path:
    """Save a model of one graph: `agraph (float[N,4] x) => (float[N,4] y) { y = Identity(x) }`."""
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {graph}')
    model.graph.initializer.extend(
        numpy_helper.from_array(array, name) for name, array in initializers.items()
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def watched(path: Path, outputs: Sequence[str]) -> tuple[bytes, Path]:
    """The model with other outputs: what the graph room gives to `per_layer`."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path))
    known = {value.name: value for value in [*model.graph.value_info, *model.graph.output]}
    del model.graph.output[:]
    model.graph.output.extend(known[name] for name in outputs)
    return model.SerializeToString(), path.parent


def samples(count: int, *shape: int, seed: int = 0) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Feeds {"x": standard normal float32 of `shape`}."""
    rng = np.random.default_rng(seed)
    return [{"x": rng.standard_normal(shape).astype(np.float32)} for _ in range(count)]
