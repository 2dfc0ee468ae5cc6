"""Many small compiles in one child process, read by the library's own reader and coverage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
from engine_graphs import Form

from onnxq.engine.backends import BACKENDS
from onnxq.engine.build import read_shapes
from onnxq.engine.child import compile_all
from onnxq.engine.coverage import Coverage
from onnxq.engine.layers import EngineLayer
from onnxq.engine.matching import cover
from onnxq.engine.protocol import Outcome, Request
from onnxq.errors import OnnxqError

Compiled = dict[tuple[str, str], tuple[Coverage, list[EngineLayer]] | OnnxqError]
"""By form's name and target: what it became, or the error."""


def compile_forms(forms: Mapping[str, Form], targets: tuple[str, ...], folder: Path) -> Compiled:
    """Compile each form for each target with TensorRT for RTX; models are saved in `folder`."""
    backend = BACKENDS["tensorrt_rtx"]
    keys, requests = [], []
    for index, (name, form) in enumerate(forms.items()):
        path = folder / f"{index}.onnx"
        onnx.save(form.model, path)
        profiles = read_shapes(form.shapes)
        for target in targets:
            keys.append((name, target))
            requests.append(Request(str(path), None, (target,), profiles))
    found: Compiled = {}
    for (name, target), answer in zip(keys, compile_all(requests, backend), strict=True):
        if isinstance(answer, Outcome):
            layers = backend.layers(list(answer.log), [])
            found[name, target] = (cover(layers, forms[name].nodes, answer.profiles), layers)
        else:
            found[name, target] = answer
    return found


def kernels_of(layers: list[EngineLayer]) -> list[str]:
    """The kinds of the layers that compute, in order; shape arithmetic left out."""
    return [
        "mha" if "mha" in layer.name else layer.kind
        for layer in layers
        if layer.kind != "shape_call" and (layer.inputs or layer.constants)
    ]
