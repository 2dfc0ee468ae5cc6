"""Write a model, streaming its weights: few in memory at a time, and of the largest one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

import onnx

from onnxq.errors import OnnxqError
from onnxq.files import reporting, temporary_beside
from onnxq.graph import wire
from onnxq.graph.commit import commit
from onnxq.graph.model import Model
from onnxq.graph.references import set_reference
from onnxq.graph.weights import DerivedValues, Values
from onnxq.progress import Progress, silent
from onnxq.threads import few, in_order

INLINE_LIMIT = 2_000_000_000
"""Bytes: a serialized protobuf message must stay below 2 GiB."""

_PAGE, _PAGED_FROM, _ALIGNMENT = 4096, 1 << 20, 64

_WORTH, _MOST_AHEAD = 1 << 16, 1 << 25
"""Bytes of a weight that is computed before those in front of it are written."""


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
        OnnxqError: the folder cannot be written, the disk is full, `path` is a file the model is
            read from, or the graph alone exceeds 2 GB.
    """
    proto = model.export()
    constants = {c.name: c._values for c in model.constants()}
    values = {n: v for n, v in constants.items() if isinstance(v, Values) and v.streamed}
    with reporting(path):
        _refuse_source(path, model.sources)
    total = proto.ByteSize() + sum(v.nbytes for v in values.values())
    if external is None:
        external = model.external
    if values and (external or total > INLINE_LIMIT):
        return _save_external(proto, values, path, model.sources, progress)
    with reporting(path), temporary_beside(path) as model_file:
        with model_file.open("wb") as stream:
            for piece in _inline_pieces(proto, values, progress):
                stream.write(piece)
        commit([(model_file, path)], model.sources)
    return [path]


def _save_external(
    proto: onnx.ModelProto,
    values: dict[str, Values],
    path: Path,
    sources: frozenset[Path],
    progress: Progress,
) -> list[Path]:
    with reporting(path), temporary_beside(path) as model_file, temporary_beside(path) as data_file:
        with data_file.open("wb") as stream:
            checksum = _write_data(proto, values, stream, progress)
        data = path.with_name(f"{path.name}.{checksum:08x}.data")
        for tensor in proto.graph.initializer:
            if tensor.name in values:
                tensor.external_data[0].value = data.name
        model_file.write_bytes(_serialize(proto))
        commit([(data_file, data), (model_file, path)], sources)
    return [path, data]


def _write_data(
    proto: onnx.ModelProto, values: dict[str, Values], stream: IO[bytes], progress: Progress
) -> int:
    """Write the payloads, aligned for mapping; fill in the references; return their CRC-32."""
    checksum, offset = zlib.crc32(proto.graph.name.encode()), 0
    tensors = [t for t in proto.graph.initializer if t.name in values]
    pieces = _computed_ahead([values[t.name] for t in tensors])
    for done, tensor in enumerate(tensors):
        value = values[tensor.name]
        alignment = _PAGE if value.nbytes >= _PAGED_FROM else _ALIGNMENT
        padding = b"\0" * (-offset % alignment)
        stream.write(padding)
        checksum = zlib.crc32(padding, checksum)
        offset += len(padding)
        start = offset
        for piece in pieces(value):
            stream.write(piece)
            checksum = zlib.crc32(piece, checksum)
            offset += len(piece)
        _check_length(tensor, value, offset - start)
        set_reference(tensor, "", start, offset - start)
        progress("writing weights", done + 1, len(tensors))
    return checksum


def _computed_ahead(values: Sequence[Values]) -> Callable[[Values], Iterable[bytes | memoryview]]:
    """What gives the bytes of each value, called in their order; a few are under way.

    Of those that are computed and are no small matter, nor so large that two may not fit.
    """

    def counts(value: Values) -> bool:
        return isinstance(value, DerivedValues) and _WORTH <= value.nbytes <= _MOST_AHEAD

    made = in_order(lambda value: list(value.pieces()), filter(counts, values), few())
    return lambda value: next(made) if counts(value) else value.pieces()


def _inline_pieces(
    proto: onnx.ModelProto, values: dict[str, Values], progress: Progress
) -> Iterator[bytes | memoryview]:
    """The serialized model with each weight's bytes inline; lengths are known in advance."""
    graph = proto.graph
    tensors = list(graph.initializer)
    graph.ClearField("initializer")
    graph_bytes = _serialize(graph)
    proto.ClearField("graph")
    heads: list[tuple[onnx.TensorProto, bytes, Values | None, int]] = []
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
    pieces = _computed_ahead([value for _, _, value, _ in heads if value is not None])
    for done, (tensor, head, value, size) in enumerate(heads):
        yield wire.header(wire.GRAPH_INITIALIZER, len(head) + size)
        yield head
        if value is not None:
            written = 0
            for piece in pieces(value):
                written += len(piece)
                yield piece
            _check_length(tensor, value, written)
        progress("writing weights", done + 1, len(heads))


def _check_length(tensor: onnx.TensorProto, value: Values, written: int) -> None:
    if written != value.nbytes:
        raise AssertionError(f"{tensor.name}: {written} bytes written, {value.nbytes} declared")


def _serialize(message: onnx.ModelProto | onnx.GraphProto) -> bytes:
    try:
        return bytes(message.SerializeToString(deterministic=True))
    except (ValueError, MemoryError) as error:
        raise OnnxqError(f"the graph itself does not fit a 2 GB file: {error}", "") from error


def _refuse_source(path: Path, sources: frozenset[Path]) -> None:
    """The weights are read while the output is written, and the input is never changed."""
    for source in sources:
        if path.exists() and source.exists() and path.samefile(source):
            raise OnnxqError(f"the output is a file of the input: {path}", "give another path")
