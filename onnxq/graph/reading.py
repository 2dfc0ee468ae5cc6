"""From a model file to a ModelProto whose weights stayed in the file."""

from __future__ import annotations

import mmap
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from onnxq.errors import OnnxqError
from onnxq.graph import parts, wire
from onnxq.graph.check import check_proto, located
from onnxq.graph.names import attribute_tensors, nested_tensors, tensors_of
from onnxq.graph.weights import stored

NESTED_LIMIT = 500_000_000
"""Bytes of weights in bodies and functions: they are held in memory, and written inline."""


def read_proto(path: Path) -> tuple[onnx.ModelProto, frozenset[Path]]:
    """A checked model; large weights of its main graph are EXTERNAL, if only in `path` itself.

    Returns:
        The model, and the other files that hold weights of it.

    Raises:
        OnnxqError: no such file, no ONNX model, or one whose parts do not fit together.
    """
    proto = _parse(path)
    with located(path):
        if not proto.graph.node and not proto.graph.output:
            raise OnnxqError("it holds no graph", "is it an ONNX model?")
        check_proto(proto)
        data = {path.parent / location(t) for t in _all_tensors(proto) if is_external(t)}
        _inline(proto, path.parent)
    return proto, frozenset(data - {path})


def is_external(tensor: onnx.TensorProto) -> bool:
    """Whether the tensor's bytes are elsewhere."""
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def location(tensor: onnx.TensorProto) -> str:
    """Where an EXTERNAL tensor's bytes are, relative to the model's folder."""
    return next((str(e.value) for e in tensor.external_data if e.key == "location"), "")


def can_hoist(node: onnx.NodeProto, outputs: set[str]) -> bool:
    """Whether a Constant node can become an initializer: its output is not one of the graph's."""
    return (
        node.op_type == "Constant"
        and node.domain in ("", "ai.onnx")
        and len(node.output) == 1
        and node.output[0] != ""
        and node.output[0] not in outputs
    )


def is_value(attribute: onnx.AttributeProto) -> bool:
    """Whether this is the tensor that a Constant node gives."""
    return attribute.name == "value" and attribute.type == onnx.AttributeProto.TENSOR


def data_locations(path: Path) -> set[str]:
    """Locations of the external data of a file's tensors; the file is not parsed as a whole.

    Raises:
        OnnxqError: no such file, or no ONNX model.
    """
    with _mapped(path) as buffer:
        return set(parts.locations(buffer))


def _parse(path: Path) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    with _mapped(path) as buffer:
        parts.refuse_oversized(buffer)
        proto.ParseFromString(wire.strip(buffer, path.name))
    return proto


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    """The bytes of a file that is read as a model."""
    try:
        _refuse_unreadable(path)
        with (
            path.open("rb") as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as buffer,
            located(path),
        ):
            yield buffer
    except DecodeError as error:
        raise OnnxqError(f"{path} is not an ONNX model: {error}", "export the file again") from None
    except OSError as error:
        raise OnnxqError(f"cannot read {path}: {error.strerror}", "check its permissions") from None
    except UnicodeEncodeError:
        raise OnnxqError(f"the name of {str(path)!r} is not UTF-8", "rename the file") from None


def _refuse_unreadable(path: Path) -> None:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise OnnxqError(f"no such file: {path}", "check the path of the model") from None
    if not stat.S_ISREG(status.st_mode):
        raise OnnxqError(f"{path} is not a file", "name the .onnx file itself")
    if status.st_size == 0:
        raise OnnxqError(f"{path} is empty", "export or copy it again")


def _inline(proto: onnx.ModelProto, folder: Path) -> None:
    """Read the tensors that are inline in whatever is written.

    Those are the tensors of bodies and functions and of attributes other than a Constant's that
    becomes an initializer: ONNX Runtime takes no external data there. And the small ones: neither
    ONNX Runtime, given bytes, nor onnx infers shapes from a constant that lies elsewhere.
    """
    tensors = [t for t in _inline_tensors(proto) if is_external(t)]
    found = [stored(t, folder) for t in tensors]
    for tensor in filter(is_external, proto.graph.initializer):
        values = stored(tensor, folder)
        if values.nbytes < wire.STRIP_THRESHOLD:
            tensors.append(tensor)
            found.append(values)
    total = sum(v.nbytes for v in found)
    if total > NESTED_LIMIT:
        raise OnnxqError(
            f"bodies and functions hold {total / 1e9:.1f} GB of weights, more than the "
            f"{NESTED_LIMIT / 1e9:.1f} GB that onnxq takes",
            "export the model without functions, with its weights in the main graph",
        )
    for tensor, values in zip(tensors, found, strict=True):
        tensor.raw_data = b"".join(values.extent.pieces())
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")


def _all_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from proto.graph.initializer
    yield from tensors_of(proto.graph.node)
    yield from _inline_tensors(proto)


def _inline_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    outputs = {value.name for value in proto.graph.output}
    for node in proto.graph.node:
        hoisted = can_hoist(node, outputs)
        for attribute, tensor in attribute_tensors(node):
            if not (hoisted and is_value(attribute)):
                yield tensor
    for sparse in proto.graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from nested_tensors(proto.graph.node)
    for function in proto.functions:
        yield from tensors_of(function.node)
    for training in proto.training_info:
        for graph in (training.initialization, training.algorithm):
            yield from graph.initializer
            yield from tensors_of(graph.node)
