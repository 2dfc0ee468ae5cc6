"""Write a model, streaming its weights: one tensor in memory at a time, whatever the size."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import onnx

from onnxq.errors import OnnxqError
from onnxq.files import replacing, temporary_beside
from onnxq.graph import wire
from onnxq.graph.model import Model, read_proto
from onnxq.graph.weights import Values
from onnxq.progress import Progress, silent

INLINE_LIMIT = 2_000_000_000
"""Bytes: a serialized protobuf message must stay below 2 GiB."""

_PAGE, _PAGED_FROM, _ALIGNMENT = 4096, 1 << 20, 64


def save(
    model: Model, path: Path, *, external: bool | None = None, progress: Progress = silent
) -> list[Path]:
    """Write `model` to `path`, and its weights inline or to `<name>.<checksum>.data` beside it.

    The data file carries a checksum of its content in its name, so that replacing a model never
    changes the data of the old one before the old one is gone; the old data is then removed.

    Args:
        external: None keeps the form of the input, and goes external above 2 GB.

    Returns:
        The files written, the model first.

    Raises:
        OnnxqError: the folder cannot be written, the disk is full, or the graph alone exceeds 2 GB.
    """
    proto = model.export()
    values = {c.name: c._values for c in model.constants() if isinstance(c._values, Values)}
    total = proto.ByteSize() + sum(v.nbytes for v in values.values())
    if external is None:
        external = model.external
    if external or total > INLINE_LIMIT:
        return _save_external(proto, values, path, progress)
    with replacing(path) as (temporary,), temporary.open("wb") as stream:
        for piece in _inline_pieces(proto, values, progress):
            stream.write(piece)
        old = _own_data(path)
    _remove(old)
    return [path]


def _save_external(
    proto: onnx.ModelProto, values: dict[str, Values], path: Path, progress: Progress
) -> list[Path]:
    with ExitStack() as stack:
        (model_file,) = stack.enter_context(replacing(path))
        # The data's name is known only when its content is; it is renamed here, not by `replacing`.
        data_file = temporary_beside(path)
        stack.callback(data_file.unlink, missing_ok=True)
        with data_file.open("wb") as stream:
            checksum = _write_data(proto, values, stream, progress)
        data = path.with_name(f"{path.name}.{checksum:08x}.data")
        for tensor in proto.graph.initializer:
            if tensor.name in values:
                tensor.external_data[0].value = data.name
        model_file.write_bytes(_serialize(proto))
        old = [p for p in _own_data(path) if p != data]
        data_file.replace(data)
    _remove(old)
    return [path, data]


def _write_data(
    proto: onnx.ModelProto, values: dict[str, Values], stream: IO[bytes], progress: Progress
) -> int:
    """Write the payloads, aligned for mapping; fill in the references; return their CRC-32."""
    checksum, offset = 0, 0
    tensors = [t for t in proto.graph.initializer if t.name in values]
    for done, tensor in enumerate(tensors):
        value = values[tensor.name]
        alignment = _PAGE if value.nbytes >= _PAGED_FROM else _ALIGNMENT
        padding = b"\0" * (-offset % alignment)
        stream.write(padding)
        offset += len(padding)
        start = offset
        for piece in value.pieces():
            stream.write(piece)
            checksum = zlib.crc32(piece, checksum)
            offset += len(piece)
        _check_length(tensor, value, offset - start)
        del tensor.external_data[:]
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, text in (
            ("location", ""),
            ("offset", str(start)),
            ("length", str(offset - start)),
        ):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, text
        progress("writing weights", done + 1, len(tensors))
    return zlib.crc32(proto.graph.name.encode(), checksum)


def _inline_pieces(
    proto: onnx.ModelProto, values: dict[str, Values], progress: Progress
) -> Iterator[bytes | memoryview]:
    """The serialized model with each weight's bytes inline; lengths are known in advance."""
    graph = proto.graph
    tensors = [t for t in graph.initializer]
    graph.ClearField("initializer")
    graph_bytes = _serialize(graph)
    proto.ClearField("graph")
    heads = []
    for tensor in tensors:
        value = values.get(tensor.name)
        if value is not None:
            tensor.ClearField("data_location")
            tensor.ClearField("external_data")
            head = tensor.SerializeToString() + wire.header(wire.TENSOR_RAW_DATA, value.nbytes)
            heads.append((tensor, head, value, value.nbytes))
        else:
            heads.append((tensor, tensor.SerializeToString(), None, 0))
    body = len(graph_bytes) + sum(
        len(wire.header(wire.GRAPH_INITIALIZER, len(head) + size)) + len(head) + size
        for _, head, _, size in heads
    )
    yield _serialize(proto)
    yield wire.header(wire.MODEL_GRAPH, body)
    yield graph_bytes
    for done, (tensor, head, value, size) in enumerate(heads):
        yield wire.header(wire.GRAPH_INITIALIZER, len(head) + size)
        yield head
        if value is not None:
            written = 0
            for piece in value.pieces():
                written += len(piece)
                yield piece
            _check_length(tensor, value, written)
        progress("writing weights", done + 1, len(heads))


def _check_length(tensor: onnx.TensorProto, value: Values, written: int) -> None:
    if written != value.nbytes:
        raise AssertionError(f"{tensor.name}: {written} bytes written, {value.nbytes} declared")


def _serialize(message: onnx.ModelProto | onnx.GraphProto) -> bytes:
    try:
        return message.SerializeToString(deterministic=True)
    except (ValueError, MemoryError) as error:
        raise OnnxqError(f"the graph itself does not fit a 2 GB file: {error}", "") from error


def _own_data(path: Path) -> list[Path]:
    """Data files that the model now at `path` refers to and that an earlier `save` named."""
    if not path.exists():
        return []
    try:
        proto, _ = read_proto(path)
    except OnnxqError:
        return []
    pattern = re.compile(re.escape(path.name) + r"\.[0-9a-f]{8}\.data")
    names = {
        e.value for t in proto.graph.initializer for e in t.external_data if e.key == "location"
    }
    return [path.with_name(name) for name in names if pattern.fullmatch(name)]


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
