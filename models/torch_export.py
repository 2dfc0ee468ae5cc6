"""torch.onnx.export as every torch script here calls it."""

from __future__ import annotations

import collections
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from models.files import shown, size

# One line for each torchvision operator, when torchvision is not installed.
logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)


def export_dynamo(
    model: torch.nn.Module,
    arguments: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_shapes: Any,
    opset: int,
) -> torch.onnx.ONNXProgram:
    """Export with torch.export; save the result with its own `save`."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            arguments,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=dynamic_shapes,
            opset_version=opset,
            dynamo=True,
            external_data=True,
            verbose=False,
        )
    assert program is not None
    return program


def export_legacy(
    model: torch.nn.Module,
    arguments: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    opset: int,
    path: Path,
) -> None:
    """Export with torch's TorchScript tracer into `path`."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model,
            arguments,
            str(path),
            input_names=inputs,
            output_names=outputs,
            dynamic_axes=dynamic_axes,
            opset_version=opset,
            dynamo=False,
        )


def summary(path: Path) -> str:
    """One line about a model file and the external data beside it."""
    graph = onnx.load(path, load_external_data=False).graph
    kinds = collections.Counter(node.op_type for node in graph.node)
    most = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
    data = path.with_name(path.name + ".data")
    weights = f" + {size(data)} of weights" if data.exists() else ""
    return f"{shown(path)}: {size(path)}{weights}, {len(graph.node)} nodes ({most})"
