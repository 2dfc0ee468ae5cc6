"""Load models through onnx-graphsurgeon with their weights left on disk.

graphsurgeon drops node metadata, doc strings and rare attribute types. Every imported node
therefore keeps its NodeProto (`Model.origins`), and `Model.export` starts from it, so that an
untouched node, value or weight comes out byte for byte as it went in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from onnxq.calibrate.session import InputSpec
from onnxq.errors import OnnxqError
from onnxq.graph import exporting, importing
from onnxq.graph.check import located
from onnxq.graph.constants import hoist_constants
from onnxq.graph.cut import cut
from onnxq.graph.dtypes import numpy_dtype
from onnxq.graph.fingerprint import fingerprint
from onnxq.graph.names import captured, made, taken
from onnxq.graph.reading import read_proto
from onnxq.graph.references import Reference, fill_in, refer, refer_resolved
from onnxq.graph.spool import Spool
from onnxq.graph.weights import DerivedValues, StoredValues
from onnxq.report import Edit

_INHERITED = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy", "namespace")


@dataclass
class Model:
    """A graphsurgeon graph, and what graphsurgeon does not carry.

    Attributes:
        graph: the main graph; edit it through `onnxq.graph.edit`.
        path: the file it was read from.
        header: the ModelProto without nodes and weights (opsets, functions, metadata, values).
        origins: id(node) -> the NodeProto the node was imported from.
        edited: id(node) -> the attributes that were changed since.
        added: id(node) -> a node that was added, and the NodeProto whose metadata it shares.
        captures: id(node) -> names of tensors that the node's bodies read.
        initializers: name -> constant, those of the file in its order.
        unread: names of initializers that nothing read in the file; the first edit drops them.
        external: whether the file kept its weights in external data.
        sources: the files it is read from.
        fingerprint: identifies graph and weights, whatever file they lie in.
        edits: what loading changed.
        values: names of the file's inputs, initializers and node outputs.
        known: every name the file uses, those of nodes and inside bodies included.
    """

    graph: gs.Graph
    path: Path
    header: onnx.ModelProto
    origins: dict[int, onnx.NodeProto] = field(default_factory=dict)
    edited: dict[int, set[str]] = field(default_factory=dict)
    added: dict[int, tuple[gs.Node, onnx.NodeProto]] = field(default_factory=dict)
    captures: dict[int, frozenset[str]] = field(default_factory=dict)
    initializers: dict[str, gs.Constant] = field(default_factory=dict)
    unread: set[str] = field(default_factory=set)
    external: bool = False
    sources: frozenset[Path] = frozenset()
    fingerprint: str = ""
    edits: list[Edit] = field(default_factory=list)
    values: frozenset[str] = frozenset()
    known: frozenset[str] = frozenset()
    # Ids name nodes only while they live: what was imported is kept alive with the model.
    _imported: tuple[gs.Node, ...] = ()

    @classmethod
    def load(cls, path: Path | str) -> Model:
        """Read an ONNX file; its weights stay where they are until something asks for them.

        Raises:
            OnnxqError: no such file, not an ONNX model, or external data that does not fit.
        """
        path = Path(path)
        proto, data = read_proto(path)
        model = cls.from_proto(proto, path)
        model.external, model.sources = bool(data), data | {path}
        with located(path):
            model.fingerprint = fingerprint(model)
        return model

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto, path: Path) -> Model:
        """Import a checked ModelProto whose EXTERNAL tensors lie beside `path`."""
        try:
            with located(path):
                graph = importing.import_graph(proto, path.parent)
                found = importing.initializers(proto, graph, path.parent)
        except (OnnxGraphSurgeonException, KeyError, ValueError, TypeError) as error:
            raise OnnxqError(
                f"{path}: the graph cannot be read: {error}", "does onnx.checker accept it?"
            ) from error
        header = _without_content(proto)
        pairs = list(zip(graph.nodes, proto.graph.node, strict=True))
        model = cls(graph, path, header, initializers=found, _imported=tuple(graph.nodes))
        model.origins = {id(node): origin for node, origin in pairs}
        model.captures = {id(n): names for n, o in pairs if (names := captured(o))}
        model.edits = hoist_constants(model, only=_is_stripped)
        model.values, model.known = frozenset(made(proto.graph)), frozenset(taken(proto.graph))
        model.unread = set(model.initializers) - exporting.read_names(model)
        return model

    @property
    def opset(self) -> int:
        """Version of the standard operator set; 0 where the file names none."""
        versions = [o.version for o in self.header.opset_import if o.domain in ("", "ai.onnx")]
        return int(max(versions, default=0))

    def metadata(self, node: gs.Node) -> dict[str, str]:
        """The node's `metadata_props`, as far as they are text."""
        origin = self.origins.get(id(node)) or self.added.get(id(node), (None, None))[1]
        entries = origin.metadata_props if origin else ()
        return {e.key: e.value for e in entries if isinstance(e.value, str)}

    def inherit_metadata(self, node: gs.Node, like: gs.Node) -> None:
        """Give an added node the module path of the node it works for."""
        shared = onnx.NodeProto()
        for key, value in self.metadata(like).items():
            if key in _INHERITED:
                shared.metadata_props.add(key=key, value=value)
        self.added[id(node)] = (node, shared)

    def captured_names(self) -> set[str]:
        """Names of tensors that bodies of If, Loop and Scan read: these must stay as they are."""
        if not self.captures:
            return set()
        empty: frozenset[str] = frozenset()
        return {name for node in self.graph.nodes for name in self.captures.get(id(node), empty)}

    def names(self) -> set[str]:
        """Every name in use, of nodes and of values, in the main graph and in bodies."""
        now = {*self.graph.tensors(), *(node.name for node in self.graph.nodes)}
        return now | self.known

    def constants(self) -> Iterator[gs.Constant]:
        """Initializers of the main graph: those of the file in its order, then those added."""
        yield from exporting.live_constants(self)

    def stored_outside(self) -> Iterator[StoredValues]:
        """Weights that lie in another file than the model's own."""
        for constant in self.constants():
            values = constant._values
            if isinstance(values, StoredValues) and values.extent.path != self.path:
                yield values

    def inputs(self) -> tuple[InputSpec, ...]:
        """The graph's inputs, as calibration data must fit them.

        Raises:
            OnnxqError: an input that is no tensor, or one without a type.
        """
        return tuple(_input(t) for t in self.graph.inputs if not isinstance(t, gs.Constant))

    def export(self) -> onnx.ModelProto:
        """The model as a ModelProto; weights that lie outside stay EXTERNAL placeholders."""
        return exporting.export(self)

    def referring(self) -> onnx.ModelProto:
        """As `export`, but placeholders refer to the files beside `path` the weights are in."""
        proto = self.export()
        refer(proto, self._references())
        return proto

    def session_model(
        self, outputs: Sequence[str] | None = None, spool: Spool | None = None
    ) -> tuple[bytes, Path]:
        """A serialized model for ONNX Runtime, and the folder its external weights lie in.

        Stored weights are read from the file they are in.

        Args:
            outputs: the only outputs wanted, of any tensors of the main graph; what they do not
                need is cut away. None: the model's own.
            spool: where weights that are computed (rescaled, cast) are written to. None: they are
                in the model itself, and nothing is written.
        """
        proto, folder = self.session_proto(outputs, spool)
        return proto.SerializeToString(deterministic=True), folder

    def session_proto(
        self, outputs: Sequence[str] | None = None, spool: Spool | None = None
    ) -> tuple[onnx.ModelProto, Path]:
        """As `session_model`, before it is serialized."""
        proto, folder, computed = self.open_proto(outputs, spool)
        fill_in(proto, computed, folder, spool)
        return proto, folder

    def open_proto(
        self, outputs: Sequence[str] | None = None, spool: Spool | None = None
    ) -> tuple[onnx.ModelProto, Path, dict[str, DerivedValues]]:
        """As `session_proto`, but with the weights that are computed beside it, by name."""
        proto = self.export()
        if outputs is not None:
            cut(proto.graph, outputs, exporting.value_types(self))
        values = {c.name: c._values for c in self.constants()}
        computed = {n: v for n, v in values.items() if isinstance(v, DerivedValues)}
        folder = refer_resolved(proto, self._references(), self.path.parent, computed, spool)
        return proto, folder, computed

    def _references(self) -> dict[str, Reference]:
        """Name -> where a stored weight is."""
        return {
            constant.name: Reference(constant._values.extent, self.path.parent)
            for constant in self.constants()
            if isinstance(constant._values, StoredValues)
        }


def _without_content(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model but for its nodes and initializers."""
    header = onnx.ModelProto()
    header.CopyFrom(proto)
    for name in ("node", "initializer", "sparse_initializer"):
        header.graph.ClearField(name)
    # protobuf frees what was cleared only with the message it was in: keep another one.
    kept = onnx.ModelProto()
    kept.ParseFromString(header.SerializeToString())
    return kept


def _input(tensor: gs.Variable) -> InputSpec:
    if tensor.dtype is None:
        raise OnnxqError(
            f"the input {tensor.name!r} is no tensor, or has no type",
            "onnxq feeds tensors only; take it out of the model's inputs",
        )
    dtype = numpy_dtype(tensor.dtype) if isinstance(tensor.dtype, int) else np.dtype(tensor.dtype)
    # Some exporters write -1 where they mean an open dimension.
    shape = (None if isinstance(d, int) and d < 0 else d for d in tensor.shape or ())
    return InputSpec(tensor.name, dtype, tuple(shape))


def _is_stripped(node: gs.Node) -> bool:
    value = node.attrs.get("value")
    return isinstance(value, gs.Constant) and isinstance(value._values, StoredValues)
