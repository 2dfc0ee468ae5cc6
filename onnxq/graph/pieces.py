"""Parts of a graph that run by themselves.

What depends on constants alone is computed again in every piece that reads it: it never lies
between pieces, and ONNX Runtime folds it as it does in the whole model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxq.graph.cut import inner_values
from onnxq.graph.dtypes import onnx_dtype, payload_bytes
from onnxq.graph.exporting import value_types
from onnxq.graph.model import Model
from onnxq.graph.names import captured
from onnxq.graph.probe import add_probes
from onnxq.graph.references import fill_in
from onnxq.graph.spool import Spool

_RANDOM = frozenset(
    ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial")
)
_WIDE = "__onnxq_fp32"
# ONNX Runtime computes FP16 on the CPU in FP32 and rounds only where it must. A Cast called so is
# none of the places where it must: what a piece reads is as exact as within the whole model.
_FREE = "InsertedPrecisionFreeCast_onnxq_"


@dataclass(frozen=True)
class Step:
    """A node that depends on the inputs.

    Attributes:
        op: its operator.
        reads: inputs of the graph and outputs of earlier steps.
        makes: its outputs.
        weights: initializers behind it, through nodes that depend on constants alone too.
        folded: those behind such nodes, whose results take memory beside them.
    """

    op: str
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    weights: tuple[str, ...]
    folded: frozenset[str]


class Pieces:
    """What some tensors of a model need, in steps; any of them make a model of their own.

    Args:
        spool: takes the weights that are computed, of each piece when it is made. None: they are
            in the pieces themselves.

    Attributes:
        folder: where the external weights lie.
        spool: as it was given.
        steps: in graph order.
        inputs: names of the graph's inputs.
    """

    def __init__(self, model: Model, outputs: Sequence[str], spool: Spool | None = None) -> None:
        proto, self.folder, self._computed = model.open_proto(outputs, spool)
        self.spool = spool
        self._graph = proto.graph
        self._header = _header(proto)
        self._types = value_types(model)
        self._initializers = {t.name: t for t in self._graph.initializer}
        self._sparse = {s.values.name: s for s in self._graph.sparse_initializer}
        stored = self._initializers.keys() | self._sparse.keys()
        self._inputs = {i.name: i for i in self._graph.input if i.name not in stored}
        self.inputs = tuple(self._inputs)
        self._reads = [_read(node) for node in self._graph.node]
        self._fixed = self._constant_nodes()
        self._nodes = [i for i in range(len(self._reads)) if i not in self._fixed.values()]
        self.steps = [self._step(index) for index in self._nodes]

    def _constant_nodes(self) -> dict[str, int]:
        """By output: the node that makes it of constants alone."""
        fixed: dict[str, int] = {}
        constants = self._initializers.keys() | self._sparse.keys()
        for index, node in enumerate(self._graph.node):
            if node.op_type not in _RANDOM and all(
                name in constants or name in fixed for name in self._reads[index]
            ):
                fixed |= {name: index for name in node.output if name}
        return fixed

    def _step(self, index: int) -> Step:
        node = self._graph.node[index]
        _, weights = self._behind(self._reads[index])
        reads = [n for n in self._reads[index] if n not in self._fixed and n not in weights]
        return Step(
            node.op_type,
            tuple(dict.fromkeys(reads)),
            tuple(name for name in node.output if name),
            tuple(weights),
            frozenset(weights).difference(self._reads[index]),
        )

    def _behind(self, names: Iterable[str]) -> tuple[list[int], dict[str, None]]:
        """The constant nodes, in graph order, and the initializers that lead to some tensors."""
        nodes: set[int] = set()
        weights: dict[str, None] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            if name in self._initializers or name in self._sparse:
                weights[name] = None
            elif (index := self._fixed.get(name, -1)) >= 0 and index not in nodes:
                nodes.add(index)
                waiting += self._reads[index]
        return sorted(nodes), weights

    def weight_bytes(self, name: str) -> int:
        """Bytes of an initializer."""
        tensor = self._initializers.get(name)
        if tensor is None:
            return payload_bytes(self._sparse[name].values.data_type, self._sparse[name].dims)
        return payload_bytes(tensor.data_type, tensor.dims)

    def computed_bytes(self, steps: Iterable[int]) -> int:
        """Bytes of the weights of some steps that are computed."""
        names = {name for i in steps for name in self.steps[i].weights} & self._computed.keys()
        return sum(self._computed[name].nbytes for name in names)

    def is_half(self, name: str) -> bool:
        """Whether an initializer is in FP16 or BF16."""
        tensor = self._initializers.get(name)
        return tensor is not None and tensor.data_type in (
            onnx.TensorProto.FLOAT16,
            onnx.TensorProto.BFLOAT16,
        )

    def model(
        self,
        steps: Sequence[int],
        outputs: Sequence[str],
        held: Mapping[str, Any],
        *,
        spooled: Sequence[str] = (),
        probed: Sequence[str] = (),
        weights: Mapping[str, np.ndarray[Any, Any]] | None = None,
    ) -> bytes:
        """The steps as a serialized model for ONNX Runtime.

        Args:
            outputs: tensors that they make, or that are constant.
            held: dtypes of what they may read of other pieces.
            spooled: further outputs, FP16 tensors in FP32 where that keeps what rounding would
                lose; `wide` names them. FP16 tensors that are held in FP32 are read so too.
            probed: tensors whose largest magnitudes are outputs too (see `probe.add_probes`).
            weights: initializers to have other values than the model's, of the same type.
        """
        nodes = [self._graph.node[self._nodes[i]] for i in steps]
        made = {name for node in nodes for name in node.output}
        fixed, constants = self._behind(name for i in steps for name in self._reads[self._nodes[i]])
        proto = onnx.ModelProto()
        proto.CopyFrom(self._header)
        graph = proto.graph
        for i in steps:
            for name in self.steps[i].reads:
                if name not in made:
                    made.add(name)
                    self._add_input(graph, name, held)
        graph.node.extend(self._graph.node[i] for i in fixed)
        graph.node.extend(nodes)
        for name in spooled:
            if self.wide(name) != name:
                # The sum of one: what leaves the graph itself, ONNX Runtime rounds all the same.
                inner = f"{self.wide(name)}_inner"
                graph.node.append(_free_cast(name, inner, onnx.TensorProto.FLOAT))
                graph.node.append(onnx.helper.make_node("Sum", [inner], [self.wide(name)]))
        graph.output.extend(self._value(name) for name in outputs)
        for name in spooled:
            if name not in outputs or self.wide(name) != name:
                graph.output.append(self._widened(name))
        graph.value_info.extend(inner_values(graph, self._types))
        add_probes(graph, probed)
        for name in constants:
            if name in self._sparse:
                graph.sparse_initializer.append(self._sparse[name])
            else:
                graph.initializer.append(self._weight(name, weights or {}))
        fill_in(proto, self._computed, self.folder, self.spool)
        return bytes(proto.SerializeToString(deterministic=True))

    def wide(self, name: str) -> str:
        """What a spooled tensor is called: another name where it is widened to FP32."""
        known = self._types.get(name)
        half = known is not None and (known.type.tensor_type.elem_type == onnx.TensorProto.FLOAT16)
        return f"{name}{_WIDE}" if half else name

    def _value(self, name: str) -> onnx.ValueInfoProto:
        """With its type: ONNX Runtime's own inference goes on from there."""
        return self._types.get(name) or onnx.ValueInfoProto(name=name)

    def _add_input(self, graph: onnx.GraphProto, name: str, held: Mapping[str, Any]) -> None:
        if name in self._inputs:
            graph.input.append(self._inputs[name])
            return
        if np.dtype(held[name]) == np.float32 and self.wide(name) != name:
            graph.input.append(self._widened(name))
            graph.node.append(_free_cast(self.wide(name), name, onnx.TensorProto.FLOAT16))
            return
        graph.input.append(self._value(name))
        graph.input[-1].type.tensor_type.elem_type = onnx_dtype(held[name])

    def _widened(self, name: str) -> onnx.ValueInfoProto:
        value = onnx.ValueInfoProto()
        value.CopyFrom(self._value(name))
        if self.wide(name) != name:
            value.name = self.wide(name)
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
        return value

    def _weight(self, name: str, weights: Mapping[str, Any]) -> onnx.TensorProto:
        tensor: onnx.TensorProto = self._initializers[name]
        if name not in weights:
            return tensor
        return onnx.TensorProto(
            name=name,
            data_type=tensor.data_type,
            dims=tensor.dims,
            raw_data=np.ascontiguousarray(weights[name]).tobytes(),
        )


def _free_cast(name: str, other: str, to: int) -> onnx.NodeProto:
    return onnx.helper.make_node("Cast", [name], [other], f"{_FREE}{name}", to=to)


def _header(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model but for its graph."""
    header = onnx.ModelProto(ir_version=proto.ir_version)
    header.opset_import.extend(proto.opset_import)
    header.functions.extend(proto.functions)
    header.graph.name = "piece"
    return header


def _read(node: onnx.NodeProto) -> list[str]:
    """Names the node and its subgraphs read of the main graph."""
    names: Iterable[str] = (*node.input, *captured(node))
    return [name for name in names if name]
