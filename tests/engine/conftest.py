"""Many small compiles in one child process, read by the library's own reader and coverage."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import pytest
from engine_graphs import Form

from onnxq.engine.backends import BACKENDS
from onnxq.engine.build import read_shapes
from onnxq.engine.child import compile_all
from onnxq.engine.coverage import Coverage, cover
from onnxq.engine.layers import EngineLayer
from onnxq.engine.protocol import Outcome, Request
from onnxq.errors import OnnxqError

Compiled = tuple[Coverage, list[EngineLayer]] | OnnxqError
CompileForms = Callable[[Mapping[str, Form], tuple[str, ...]], dict[tuple[str, str], Compiled]]


@pytest.fixture(scope="session")
def compile_forms(tmp_path_factory: pytest.TempPathFactory) -> CompileForms:
    """`compile_forms(forms, targets)`: what each form became for each target, or the error."""
    pytest.importorskip("tensorrt_rtx")
    backend = BACKENDS["tensorrt_rtx"]

    def compile_them(
        forms: Mapping[str, Form], targets: tuple[str, ...]
    ) -> dict[tuple[str, str], Compiled]:
        folder = tmp_path_factory.mktemp("forms")
        keys, requests = [], []
        for index, (name, form) in enumerate(forms.items()):
            path = folder / f"{index}.onnx"
            onnx.save(form.model, path)
            profiles = read_shapes(form.shapes)
            for target in targets:
                keys.append((name, target))
                requests.append(Request(str(path), None, (target,), profiles))
        found: dict[tuple[str, str], Compiled] = {}
        for (name, target), answer in zip(keys, compile_all(requests, backend), strict=True):
            if isinstance(answer, Outcome):
                layers = backend.layers(list(answer.log), [])
                coverage = cover(layers, forms[name].nodes, answer.profiles)
                found[name, target] = (coverage, layers)
            else:
                found[name, target] = answer
        return found

    return compile_them


def kernels_of(layers: list[EngineLayer]) -> list[str]:
    """The kinds of the layers that compute, in order; shape arithmetic left out."""
    return [
        "mha" if "mha" in layer.name else layer.kind
        for layer in layers
        if layer.kind != "shape_call" and (layer.inputs or layer.constants)
    ]
