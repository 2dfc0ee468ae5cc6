"""Models that measure themselves: max |x| of float tensors as scalar outputs.

ONNX Runtime computes the maxima while it runs, so that nothing but scalars leaves it, whatever the
activations weigh.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from onnxq.graph.model import Model
from onnxq.graph.query import type_word
from onnxq.graph.spool import Spool

GROUP = 1000
"""Tensors a probe. ONNX Runtime keeps some of what is measured until the end of a run; smaller
groups hold less and run the beginning of the model more often."""


def range_probes(
    model: Model, only: Collection[str] | None = None, spool: Spool | None = None
) -> Iterator[tuple[bytes, Path, dict[str, str]]]:
    """For every group of tensors: a serialized probe, the folder of its weights, and
    {output name: tensor}; all FP32 and FP16 tensors that the main graph computes, each once.

    Args:
        only: the names of those to measure.
        spool: as `Model.session_model` takes it.
    """
    tensors = [name for name in probed_tensors(model) if only is None or name in only]
    for start in range(0, len(tensors), GROUP):
        group = tensors[start : start + GROUP]
        proto, folder = model.session_proto(group, spool)
        del proto.graph.output[:]
        names = add_probes(proto.graph, group)
        yield proto.SerializeToString(deterministic=True), folder, names


def probed_tensors(model: Model) -> list[str]:
    """All FP32 and FP16 tensors that the main graph computes."""
    return [t.name for n in model.graph.nodes for t in n.outputs if _measurable(t)]


def add_probes(graph: onnx.GraphProto, tensors: Sequence[str]) -> dict[str, str]:
    """Add scalar outputs: {output name: tensor whose max |x| it is}."""
    names = {f"onnxq_probe_{i}": name for i, name in enumerate(tensors)}
    # ONNX Runtime visits the last output first: shallow tensors last, or all would be kept.
    for output, name in reversed(names.items()):
        magnitude = f"{output}_abs"
        graph.node.append(onnx.helper.make_node("Abs", [name], [magnitude]))
        graph.node.append(onnx.helper.make_node("ReduceMax", [magnitude], [output], keepdims=0))
        graph.output.append(onnx.ValueInfoProto(name=output))
    return names


def _measurable(tensor: gs.Tensor) -> bool:
    return bool(tensor.name) and type_word(tensor) in ("fp32", "fp16")
