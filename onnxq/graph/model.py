"""Load and save models through onnx-graphsurgeon with their weights left on disk.

graphsurgeon drops node metadata, doc strings and rare attribute types. Every imported node
therefore keeps its NodeProto (`Model.origins`), and `Model.export` puts back whatever was not
edited, so that an untouched node, value or weight comes out byte for byte as it went in.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx_graphsurgeon.ir.tensor import LazyValues
from onnx_graphsurgeon.logger import G_LOGGER
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException

from onnxq.calibrate.session import InputSpec
from onnxq.errors import OnnxqError
from onnxq.graph import wire
from onnxq.graph.constants import hoist_constants
from onnxq.graph.weights import Extent, StoredValues, constant_type, numpy_dtype, stored

_INHERITED = ("pkg.torch.onnx.name_scopes", "pkg.torch.onnx.class_hierarchy", "namespace")


@dataclass
class Model:
    """A graphsurgeon graph, and what graphsurgeon does not carry.

    Attributes:
        graph: the main graph; edit it through `onnxq.graph.edit`.
        path: the file it was read from.
        header: the ModelProto without nodes and weights (opsets, functions, metadata, values).
        origins: id(node) -> the NodeProto the node was imported from.
        edited: ids of nodes whose operator or attributes were changed since.
        added: id(node) -> a node that was added, and the NodeProto whose metadata it shares.
        external: whether the file kept its weights in external data.
        fingerprint: identifies graph and weights, whatever file they lie in.
    """

    graph: gs.Graph
    path: Path
    header: onnx.ModelProto
    origins: dict[int, onnx.NodeProto] = field(default_factory=dict)
    edited: set[int] = field(default_factory=set)
    added: dict[int, tuple[gs.Node, onnx.NodeProto]] = field(default_factory=dict)
    external: bool = False
    fingerprint: str = ""
    # Ids name nodes only while they live: what was imported is kept alive with the model.
    _imported: tuple[gs.Node, ...] = ()

    @classmethod
    def load(cls, path: Path | str) -> Model:
        """Read an ONNX file; its weights stay where they are until something asks for them.

        Raises:
            OnnxqError: no such file, not an ONNX model, or external data that does not fit.
        """
        path = Path(path)
        proto, external = read_proto(path)
        model = cls.from_proto(proto, path)
        model.external = external
        model.fingerprint = _fingerprint(model, proto)
        return model

    @classmethod
    def from_proto(cls, proto: onnx.ModelProto, path: Path) -> Model:
        """Import a ModelProto whose EXTERNAL tensors lie beside `path`."""
        header = onnx.ModelProto()
        header.CopyFrom(proto)
        for name in ("node", "initializer"):
            header.graph.ClearField(name)
        bare = onnx.ModelProto()
        bare.CopyFrom(proto)
        bare.ClearField("functions")
        with _quiet():
            try:
                graph = gs.import_onnx(bare)
            except (OnnxGraphSurgeonException, KeyError, ValueError, TypeError) as error:
                raise OnnxqError(
                    f"{path}: the graph cannot be read: {error}", "does onnx.checker accept it?"
                ) from error
        model = cls(graph, path, header)
        model._imported = tuple(graph.nodes)
        model.origins = {id(n): p for n, p in zip(graph.nodes, proto.graph.node, strict=True)}
        hoist_constants(model, only=_is_stripped)
        for tensor in graph.tensors().values():
            values = getattr(tensor, "_values", None)
            if isinstance(values, LazyValues) and _is_external(values.tensor):
                tensor._values = stored(values.tensor, path.parent)
        return model

    @property
    def opset(self) -> int:
        """Version of the standard operator set."""
        return int(self.graph.opset)

    def metadata(self, node: gs.Node) -> dict[str, str]:
        """The node's `metadata_props`."""
        origin = self.origins.get(id(node)) or self.added.get(id(node), (None, None))[1]
        return {e.key: e.value for e in origin.metadata_props} if origin else {}

    def inherit_metadata(self, node: gs.Node, like: gs.Node) -> None:
        """Give an added node the module path of the node it works for."""
        shared = onnx.NodeProto()
        for key, value in self.metadata(like).items():
            if key in _INHERITED:
                entry = shared.metadata_props.add()
                entry.key, entry.value = key, value
        self.added[id(node)] = (node, shared)

    def export(self) -> onnx.ModelProto:
        """The model as a ModelProto; weights that lie outside stay EXTERNAL placeholders."""
        with _quiet():
            proto = gs.export_onnx(self.graph, do_type_check=False)
        for exported, node in zip(proto.graph.node, self.graph.nodes, strict=True):
            self._restore_node(exported, node)
        self._restore_values(proto.graph)
        out = onnx.ModelProto()
        out.CopyFrom(self.header)
        out.ClearField("graph")
        out.ClearField("opset_import")
        out.graph.CopyFrom(proto.graph)
        for name in ("quantization_annotation", "metadata_props"):
            getattr(out.graph, name).extend(getattr(self.header.graph, name))
        out.opset_import.extend(proto.opset_import)
        return out

    def _restore_node(self, exported: onnx.NodeProto, node: gs.Node) -> None:
        if id(node) in self.added:
            exported.metadata_props.extend(self.added[id(node)][1].metadata_props)
            return
        origin = self.origins.get(id(node))
        if origin is None:
            return
        edited = onnx.NodeProto()
        edited.CopyFrom(exported)
        exported.CopyFrom(origin)
        for name in ("input", "output"):
            exported.ClearField(name)
            getattr(exported, name).extend(getattr(edited, name))
        exported.name = edited.name
        if not edited.name:
            exported.ClearField("name")
        if id(node) in self.edited:
            exported.op_type = edited.op_type
            exported.ClearField("attribute")
            exported.attribute.extend(edited.attribute)

    def _restore_values(self, graph: onnx.GraphProto) -> None:
        """Doc strings, metadata and unusual types of values whose element type did not change."""
        for name in ("input", "output"):
            before = {v.name: v for v in getattr(self.header.graph, name)}
            for value in getattr(graph, name):
                if value.name in before and _element(before[value.name]) == _element(value):
                    value.CopyFrom(before[value.name])
        tensors = self.graph.tensors()
        exported = {v.name: v for v in graph.value_info}
        for old in self.header.graph.value_info:
            tensor = tensors.get(old.name)
            if isinstance(tensor, gs.Constant):
                if constant_type(tensor) == _element(old):
                    exported[old.name] = old
            elif tensor is not None and _element(exported.get(old.name, old)) == _element(old):
                exported[old.name] = old
        interface = {v.name for v in (*graph.input, *graph.output)}
        kept = [_copy(v) for name, v in exported.items() if name not in interface]
        graph.ClearField("value_info")
        graph.value_info.extend(kept)

    def constants(self) -> Iterator[gs.Constant]:
        """Initializers of the main graph."""
        for tensor in self.graph.tensors().values():
            if isinstance(tensor, gs.Constant):
                yield tensor

    def stored_outside(self) -> Iterator[StoredValues]:
        """Weights that lie in another file than the model's own."""
        for constant in self.constants():
            values = constant._values
            if isinstance(values, StoredValues) and values.extent.path.name != self.path.name:
                yield values

    def inputs(self) -> tuple[InputSpec, ...]:
        """The graph's inputs, as calibration data must fit them."""
        return tuple(
            InputSpec(
                t.name,
                numpy_dtype(t.dtype) if isinstance(t.dtype, int) else np.dtype(t.dtype),
                tuple(t.shape or ()),
            )
            for t in self.graph.inputs
            if not isinstance(t, gs.Constant)
        )

    def session_model(self, outputs: Sequence[str] | None = None) -> tuple[bytes, Path]:
        """A serialized model for ONNX Runtime, and the folder its external weights lie in.

        Nothing is written: the weights are read from the file they are in.

        Args:
            outputs: the only outputs wanted, of any tensors of the main graph; what they do not
                need is cut away. None: the model's own.
        """
        proto, folder = self.session_proto(outputs)
        return proto.SerializeToString(deterministic=True), folder

    def session_proto(self, outputs: Sequence[str] | None = None) -> tuple[onnx.ModelProto, Path]:
        """As `session_model`, before it is serialized."""
        proto = self.export()
        if outputs is not None:
            _cut(proto.graph, outputs)
        return proto, self.restore_references(proto, resolve=True)

    def restore_references(self, proto: onnx.ModelProto, resolve: bool = False) -> Path:
        """Point the EXTERNAL tensors of an exported proto at the files they lie in.

        Args:
            resolve: follow links, and let the folder be whatever holds all the files.

        Returns:
            The folder the locations are relative to.
        """
        extents = {
            c.name: c._values.extent
            for c in self.constants()
            if isinstance(c._values, StoredValues)
        }
        tensors = [t for t in proto.graph.initializer if _is_external(t)]
        folder = self.path.parent
        if resolve and tensors:
            folder = _common_folder({extents[t.name].path.resolve().parent for t in tensors})
        for tensor in tensors:
            extent = extents[tensor.name]
            path = extent.path.resolve() if resolve else extent.path
            _point(tensor, path.relative_to(folder).as_posix(), extent)
        return folder


def read_proto(path: Path) -> tuple[onnx.ModelProto, bool]:
    if not path.exists():
        raise OnnxqError(f"no such file: {path}", "check the path of the model")
    if not path.is_file():
        raise OnnxqError(f"{path} is not a file", "name the .onnx file itself")
    if path.stat().st_size == 0:
        raise OnnxqError(f"{path} is empty", "export or copy the file again")
    proto = onnx.ModelProto()
    try:
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as buffer,
        ):
            skeleton = wire.strip(buffer, path.name)
        proto.ParseFromString(skeleton)
    except DecodeError as error:
        raise OnnxqError(f"{path} is not an ONNX model: {error}", "export the file again") from None
    except OSError as error:
        raise OnnxqError(f"cannot read {path}: {error.strerror}", "check its permissions") from None
    except OnnxqError as error:
        raise OnnxqError(f"{path}: {error.message}", error.hint) from None
    if not proto.graph.node and not proto.graph.output:
        raise OnnxqError(f"{path} holds no graph", "is it an ONNX model?")
    external = any(_is_external(t) and _location(t) != path.name for t in proto.graph.initializer)
    for tensor in _nested_tensors(proto):
        if _is_external(tensor):
            tensor.raw_data = stored(tensor, path.parent).load().tobytes()
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return proto, external


def _nested_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Tensors inside subgraphs and functions: they stay inline in whatever is written."""

    def of_nodes(nodes: Iterable[onnx.NodeProto], nested: bool) -> Iterator[onnx.TensorProto]:
        for node in nodes:
            for attribute in node.attribute:
                if nested and attribute.HasField("t"):
                    yield attribute.t
                for graph in (
                    *((attribute.g,) if attribute.HasField("g") else ()),
                    *attribute.graphs,
                ):
                    yield from graph.initializer
                    yield from of_nodes(graph.node, True)

    yield from of_nodes(proto.graph.node, False)
    for function in proto.functions:
        yield from of_nodes(function.node, True)


def _fingerprint(model: Model, proto: onnx.ModelProto) -> str:
    """Hash of the graph and of each weight's size, head and tail.

    Hashing all of a 5 GB file would cost more than the calibration it guards.
    """
    bare = onnx.ModelProto()
    bare.CopyFrom(proto)
    for tensor in bare.graph.initializer:
        tensor.ClearField("external_data")
    for node in bare.graph.node:
        for attribute in node.attribute:
            attribute.t.ClearField("external_data")
    digest = hashlib.sha256(bare.SerializeToString(deterministic=True))
    for constant in model.constants():
        if isinstance(constant._values, StoredValues):
            extent = constant._values.extent
            digest.update(str(extent.length).encode())
            edge = min(extent.length, 4096)
            for offset in (extent.offset, extent.offset + extent.length - edge):
                for piece in Extent(extent.path, offset, edge).pieces():
                    digest.update(piece)
    return digest.hexdigest()


def _cut(graph: onnx.GraphProto, outputs: Sequence[str]) -> None:
    """Make `outputs` the graph's outputs and drop the nodes and weights nobody needs then."""
    producer = {name: node for node in graph.node for name in node.output if name}
    wanted, kept = list(outputs), set()
    reached = set(outputs)
    while wanted:
        node = producer.get(wanted.pop())
        if node is None or id(node) in kept:
            continue
        kept.add(id(node))
        for name in (*node.input, *_captured(node)):
            if name and name not in reached:
                reached.add(name)
                wanted.append(name)
    nodes = [n for n in graph.node if id(n) in kept]
    weights = [t for t in graph.initializer if t.name in reached]
    types = {v.name: v for v in (*graph.value_info, *graph.output, *graph.input)}
    for field_name, content in (
        ("node", nodes),
        ("initializer", weights),
        ("output", [types.get(name) or onnx.ValueInfoProto(name=name) for name in outputs]),
    ):
        copies = [type(c).FromString(c.SerializeToString()) for c in content]
        graph.ClearField(field_name)  # type: ignore[arg-type]
        getattr(graph, field_name).extend(copies)
    graph.ClearField("value_info")


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    """Names a node's subgraphs may take from the outer graph."""
    for attribute in node.attribute:
        for graph in (*((attribute.g,) if attribute.HasField("g") else ()), *attribute.graphs):
            yield from (value.name for value in graph.output)
            for inner in graph.node:
                yield from inner.input
                yield from _captured(inner)


def _common_folder(folders: set[Path]) -> Path:
    if len(folders) == 1:
        return next(iter(folders))
    shared = list(zip(*(folder.parts for folder in sorted(folders)), strict=False))
    same = [parts[0] for parts in shared if len(set(parts)) == 1]
    return Path(*same)


def _point(tensor: onnx.TensorProto, location: str, extent: Extent) -> None:
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (
        ("location", location),
        ("offset", str(extent.offset)),
        ("length", str(extent.length)),
    ):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def _is_stripped(node: gs.Node) -> bool:
    value = node.attrs.get("value")
    return (
        isinstance(value, gs.Constant)
        and isinstance(value._values, LazyValues)
        and _is_external(value._values.tensor)
    )


def _is_external(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _location(tensor: onnx.TensorProto) -> str:
    return next((e.value for e in tensor.external_data if e.key == "location"), "")


def _element(value: onnx.ValueInfoProto) -> int:
    """Element type; 0 for what is no tensor, whose type nothing here ever changes."""
    return int(value.type.tensor_type.elem_type)


def _copy(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    copied = onnx.ValueInfoProto()
    copied.CopyFrom(value)
    return copied


class _quiet:  # noqa: N801  (used as a function)
    """graphsurgeon logs what it drops; here nothing it drops is lost."""

    def __enter__(self) -> None:
        self.severity = G_LOGGER.severity
        G_LOGGER.severity = G_LOGGER.CRITICAL

    def __exit__(self, *exc: object) -> None:
        G_LOGGER.severity = self.severity
