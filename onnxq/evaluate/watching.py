"""Which inner tensors of two models can be compared, and what each is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from onnxq.evaluate.layers import LayerErrors, per_layer
from onnxq.evaluate.runners import Device, Samples
from onnxq.progress import Progress, silent

if TYPE_CHECKING:
    from onnxq.graph.model import Model

# Operators that only move values about: their error is that of what they take.
LAYOUT = frozenset(
    (
        *("Cast", "Identity", "Dropout", "QuantizeLinear", "DequantizeLinear"),
        *("Constant", "ConstantOfShape", "Range", "Shape", "Size"),
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Expand", "Tile", "Pad"),
        *("Transpose", "DepthToSpace", "SpaceToDepth"),
        *("Concat", "Split", "Slice", "Gather", "GatherElements", "GatherND"),
    )
)


@dataclass(frozen=True)
class Watched:
    """Tensors that two models share, in the order the reference computes them.

    Attributes:
        inputs_of: tensor -> the nearest tensors before it in `tensors`.
        producers: tensor -> its node, as `operator module.path` or `operator node-name`.
    """

    tensors: tuple[str, ...]
    inputs_of: dict[str, tuple[str, ...]]
    producers: dict[str, str]


def layer_errors(
    reference: Model,
    candidate: Model,
    samples: Samples,
    *,
    count: int = 1,
    memory: int = 1 << 30,
    device: Device = "auto",
    progress: Progress = silent,
) -> LayerErrors:
    """`per_layer` over everything that two models have in common and that computes something.

    Raises:
        OnnxqError: as `per_layer`.
    """
    found = watch(reference, candidate)
    return per_layer(
        reference.session_model,
        candidate.session_model,
        found.tensors,
        samples,
        inputs_of=found.inputs_of,
        producers=found.producers,
        count=count,
        memory=memory,
        device=device,
        progress=progress,
    )


def watch(reference: Model, candidate: Model) -> Watched:
    """The tensors of the main graph that both models compute, layout operators left out."""
    theirs = {tensor.name for node in candidate.graph.nodes for tensor in node.outputs}
    made_by = {
        tensor.name: node
        for node in reference.graph.nodes
        for tensor in node.outputs
        if tensor.name
    }
    tensors = tuple(
        name for name, node in made_by.items() if node.op not in LAYOUT and name in theirs
    )
    chosen = set(tensors)
    return Watched(
        tensors,
        {name: _nearest(made_by[name], made_by, chosen.__contains__) for name in tensors},
        {name: _described(reference, made_by[name]) for name in tensors},
    )


def _nearest(node: Any, made_by: dict[str, Any], chosen: Callable[[str], bool]) -> tuple[str, ...]:
    """The chosen tensors from which `node` is computed with no other chosen one between."""
    found: dict[str, None] = {}
    seen: set[str] = set()
    waiting = list(_inputs(node))
    while waiting:
        name = waiting.pop()
        if name in seen or name not in made_by:
            continue
        seen.add(name)
        if chosen(name):
            found[name] = None
        else:
            waiting.extend(_inputs(made_by[name]))
    return tuple(sorted(found))


def _inputs(node: Any) -> Iterator[str]:
    return (tensor.name for tensor in node.inputs)


def _described(model: Model, node: Any) -> str:
    from onnxq.graph.query import label, module_path

    return f"{node.op} {module_path(model, node) or label(node)}"
