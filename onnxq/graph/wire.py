"""The protobuf wire format, as far as streaming weights needs it.

A model with inline weights is read as if they were external: `strip` cuts the large payloads out
of the bytes and leaves (offset, length) references into the same file, so that parsing a 1.9 GB
model costs the memory of its graph alone. `message` and `field` write the same format back.

Source: protobuf.dev/programming-guides/encoding; field numbers from onnx.proto (IR version 11).
"""

from __future__ import annotations

from collections.abc import Iterator

from onnxq.errors import OnnxqError

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

# ModelProto.graph; GraphProto.node, .initializer; NodeProto.attribute; AttributeProto.t
MODEL_GRAPH, GRAPH_NODE, GRAPH_INITIALIZER, NODE_ATTRIBUTE, ATTRIBUTE_TENSOR = 7, 1, 5, 5, 5
# TensorProto
TENSOR_DATA_TYPE, TENSOR_FLOAT_DATA, TENSOR_RAW_DATA = 2, 4, 9
TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION = 13, 14
_FLOAT, _EXTERNAL = 1, 1

STRIP_THRESHOLD = 1024
"""Payloads of at least this many bytes leave the graph (ONNX's own external-data threshold)."""

Field = tuple[int, int, int, int, int]
"""Number, wire type, start of the tag, start of the value, end of the value."""


def fields(buffer: memoryview, start: int, end: int) -> Iterator[Field]:
    """Walk the fields of the message in `buffer[start:end]`.

    Raises:
        OnnxqError: the bytes are not a protobuf message, or are cut short.
    """
    position = start
    while position < end:
        tag_start = position
        tag, position = _varint(buffer, position, end)
        number, wire_type = tag >> 3, tag & 7
        value = position
        if wire_type == VARINT:
            _, position = _varint(buffer, position, end)
        elif wire_type == FIXED64:
            position += 8
        elif wire_type == FIXED32:
            position += 4
        elif wire_type == BYTES:
            length, value = _varint(buffer, position, end)
            position = value + length
        else:
            raise _broken(f"wire type {wire_type} at byte {tag_start}")
        if position > end or number == 0:
            raise _broken(f"a field at byte {tag_start} runs past the end")
        yield number, wire_type, tag_start, value, position


def strip(buffer: memoryview, location: str) -> bytes:
    """Serialized ModelProto with large inline payloads replaced by external references.

    Initializers and tensor attributes of the main graph's nodes are stripped; what lies in
    subgraphs and functions stays inline, so that those pass through untouched.

    Args:
        buffer: the whole model file.
        location: what to write as `location` of the references (the file's own name).
    """
    pieces: list[bytes | memoryview] = []
    for number, wire_type, tag, value, end in fields(buffer, 0, len(buffer)):
        if number == MODEL_GRAPH and wire_type == BYTES:
            pieces.append(field(MODEL_GRAPH, _strip_graph(buffer, value, end, location)))
        else:
            pieces.append(buffer[tag:end])
    return b"".join(pieces)


def _strip_graph(buffer: memoryview, start: int, stop: int, location: str) -> bytes:
    pieces: list[bytes | memoryview] = []
    for number, wire_type, tag, value, end in fields(buffer, start, stop):
        replaced: bytes | None = None
        if wire_type == BYTES and end - value >= STRIP_THRESHOLD:
            if number == GRAPH_INITIALIZER:
                replaced = _strip_tensor(buffer, value, end, location)
            elif number == GRAPH_NODE:
                path = (NODE_ATTRIBUTE, ATTRIBUTE_TENSOR)
                replaced = _strip_nested(buffer, value, end, location, path)
        pieces.append(buffer[tag:end] if replaced is None else field(number, replaced))
    return b"".join(pieces)


def _strip_nested(
    buffer: memoryview, start: int, stop: int, location: str, path: tuple[int, ...]
) -> bytes:
    """Follow `path` of nested message fields down to a TensorProto and strip it."""
    pieces: list[bytes | memoryview] = []
    for number, wire_type, tag, value, end in fields(buffer, start, stop):
        if number == path[0] and wire_type == BYTES and end - value >= STRIP_THRESHOLD:
            inner = (
                _strip_nested(buffer, value, end, location, path[1:])
                if len(path) > 1
                else _strip_tensor(buffer, value, end, location)
            )
            pieces.append(field(number, inner))
        else:
            pieces.append(buffer[tag:end])
    return b"".join(pieces)


def _strip_tensor(buffer: memoryview, start: int, stop: int, location: str) -> bytes:
    pieces: list[bytes | memoryview] = []
    payloads: list[tuple[int, int]] = []
    data_type = 0
    for number, wire_type, tag, value, end in fields(buffer, start, stop):
        if number == TENSOR_DATA_TYPE and wire_type == VARINT:
            data_type = _varint(buffer, value, end)[0]
        large = wire_type == BYTES and end - value >= STRIP_THRESHOLD
        # Packed float_data holds the same little-endian bytes as raw_data does.
        if large and number in (TENSOR_RAW_DATA, TENSOR_FLOAT_DATA):
            payloads.append((value, end - value))
        else:
            pieces.append(buffer[tag:end])
    if len(payloads) != 1 or (data_type != _FLOAT and _has_float_data(buffer, start, stop)):
        return bytes(buffer[start:stop])
    offset, length = payloads[0]
    pieces.append(external_fields(location, offset, length))
    return b"".join(pieces)


def _has_float_data(buffer: memoryview, start: int, stop: int) -> bool:
    return any(number == TENSOR_FLOAT_DATA for number, *_ in fields(buffer, start, stop))


def external_fields(location: str, offset: int, length: int) -> bytes:
    """`external_data` and `data_location` of a TensorProto, serialized."""
    entries = (("location", location), ("offset", str(offset)), ("length", str(length)))
    out = b"".join(
        field(TENSOR_EXTERNAL_DATA, field(1, key.encode()) + field(2, text.encode()))
        for key, text in entries
    )
    return out + varint(TENSOR_DATA_LOCATION << 3 | VARINT) + varint(_EXTERNAL)


def field(number: int, value: bytes) -> bytes:
    """A length-delimited field."""
    return header(number, len(value)) + value


def header(number: int, length: int) -> bytes:
    """Tag and length of a length-delimited field whose value is written separately."""
    return varint(number << 3 | BYTES) + varint(length)


def varint(value: int) -> bytes:
    """Base-128 varint of a non-negative integer."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint(buffer: memoryview, position: int, end: int) -> tuple[int, int]:
    result = shift = 0
    while position < end and shift < 70:
        byte = buffer[position]
        position += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, position
        shift += 7
    raise _broken(f"a number at byte {position} does not end")


def _broken(what: str) -> OnnxqError:
    return OnnxqError(
        f"not an ONNX model, or a truncated one: {what}",
        "check the path and export or copy the file again",
    )
