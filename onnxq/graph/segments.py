"""A graph run piece by piece: what lies between some of its tensors, and what must be kept.

Tensors at which to stop come in graph order. The piece that leads to one holds the nodes it needs
that no earlier piece held; what later pieces read of it, or of the pieces before, is the frontier.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxq.graph.dtypes import onnx_dtype
from onnxq.graph.model import Model
from onnxq.graph.names import captured


class Segments:
    """A model's pieces, each runnable by itself.

    Attributes:
        folder: where the external weights of the pieces lie.
    """

    def __init__(self, model: Model, stops: Sequence[str]) -> None:
        proto, self.folder = model.session_proto(stops)
        self._graph, self.stops = proto.graph, list(stops)
        self._header = _header(proto)
        self._initializers = {t.name: t for t in self._graph.initializer}
        inputs = {i.name: i for i in self._graph.input if i.name not in self._initializers}
        self._inputs = inputs
        self._reads = [_read(node) for node in self._graph.node]
        self._steps = self._divided()

    def _divided(self) -> list[tuple[list[int], list[str]]]:
        """For each stop the nodes that lead to it from the stop before, and the frontier then."""
        maker = {name: i for i, node in enumerate(self._graph.node) for name in node.output if name}
        held: set[int] = set()
        pieces = []
        for stop in self.stops:
            new: set[int] = set()
            waiting = [stop]
            while waiting:
                index = maker.get(waiting.pop(), -1)
                if index >= 0 and index not in held and index not in new:
                    new.add(index)
                    waiting += self._reads[index]
            held |= new
            pieces.append(sorted(new))
        steps: list[tuple[list[int], list[str]]] = []
        made: set[str] = set()
        for piece in pieces:
            made |= {name for i in piece for name in self._graph.node[i].output if name}
            steps.append((piece, sorted(made)))
        wanted: set[str] = set()
        for index in reversed(range(len(steps))):
            piece, names = steps[index]
            steps[index] = piece, [name for name in names if name in wanted]
            wanted |= {name for i in piece for name in self._reads[i]} | {self.stops[index]}
        return steps

    def frontier(self, index: int) -> list[str]:
        """What the pieces behind stop `index` read of those up to it, without the graph's inputs.

        A stop that was made before its turn is in the frontiers until then.
        """
        return self._steps[index][1]

    def piece(
        self,
        index: int,
        held: Mapping[str, Any],
        weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> bytes | None:
        """The model from the frontier before stop `index` to the stop and the frontier behind it.

        Args:
            held: dtypes of the tensors of the frontier before it.
            weights: initializers to have other values than the model's, of the same type.

        Returns:
            None where nothing is to be computed: all of it is held already.
        """
        nodes, frontier = self._steps[index]
        if not nodes:
            return None
        proto = onnx.ModelProto()
        proto.CopyFrom(self._header)
        graph = proto.graph
        graph.node.extend(self._graph.node[i] for i in nodes)
        made = {name for i in nodes for name in self._graph.node[i].output}
        read = dict.fromkeys(name for i in nodes for name in self._reads[i] if name not in made)
        for name in read:
            if name in self._initializers:
                graph.initializer.append(self._weight(name, weights or {}))
            elif name in self._inputs:
                graph.input.append(self._inputs[name])
            elif name in held:
                value = onnx.helper.make_tensor_value_info(name, onnx_dtype(held[name]), None)
                graph.input.append(value)
        outputs = dict.fromkeys((self.stops[index], *frontier))
        graph.output.extend(onnx.ValueInfoProto(name=n) for n in outputs if n in made)
        return bytes(proto.SerializeToString(deterministic=True))

    def _weight(self, name: str, weights: Mapping[str, Any]) -> onnx.TensorProto:
        tensor: onnx.TensorProto = self._initializers[name]
        if name not in weights:
            return tensor
        values = weights[name]
        return onnx.TensorProto(
            name=name,
            data_type=tensor.data_type,
            dims=tensor.dims,
            raw_data=np.ascontiguousarray(values).tobytes(),
        )


def _header(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model but for its graph."""
    header = onnx.ModelProto(ir_version=proto.ir_version)
    header.opset_import.extend(proto.opset_import)
    header.functions.extend(proto.functions)
    header.graph.name = "segment"
    return header


def _read(node: onnx.NodeProto) -> list[str]:
    """Names the node and its subgraphs read of the main graph."""
    names: Iterable[str] = (*node.input, *captured(node))
    return [name for name in names if name]
