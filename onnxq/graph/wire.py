"""The protobuf wire format, as far as streaming weights needs it.

A model with inline weights is read as if they were external: `strip` cuts the large payloads out
of the bytes and leaves (offset, length) references into the same file, so that parsing a 1.9 GB
model costs the memory of its graph alone. `field` and `header` write the same format back.

Source: protobuf.dev/programming-guides/encoding; field numbers from onnx.proto (IR version 11).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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

Replace = Callable[[int, memoryview, int, int], bytes | None]
"""(field number, buffer, start and end of its value) -> the new value, or None to keep the old."""


def fields(buffer: memoryview, start: int, end: int) -> Iterator[Field]:
    """Walk the fields of the message in `buffer[start:end]`.

    Raises:
        OnnxqError: the bytes are not a protobuf message, or are cut short.
    """
    position = start
    while position < end:
        tag_start = position
        tag, position = buffer[position], position + 1  # nearly all numbers are of one byte
        if tag > 0x7F:
            tag, position = _varint(buffer, tag_start, end)
        number, wire_type = tag >> 3, tag & 7
        value = position
        if wire_type == BYTES:
            if position < end and (length := buffer[position]) < 0x80:
                value = position + 1
            else:
                length, value = _varint(buffer, position, end)
            position = value + length
        elif wire_type == VARINT:
            _, position = _varint(buffer, position, end)
        elif wire_type == FIXED64:
            position += 8
        elif wire_type == FIXED32:
            position += 4
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

    def model(number: int, buffer: memoryview, start: int, end: int) -> bytes | None:
        return _rewrite(buffer, start, end, graph) if number == MODEL_GRAPH else None

    def graph(number: int, buffer: memoryview, start: int, end: int) -> bytes | None:
        if end - start < STRIP_THRESHOLD:
            return None
        if number == GRAPH_INITIALIZER:
            return _strip_tensor(buffer, start, end, location)
        return _rewrite(buffer, start, end, node) if number == GRAPH_NODE else None

    def node(number: int, buffer: memoryview, start: int, end: int) -> bytes | None:
        large = number == NODE_ATTRIBUTE and end - start >= STRIP_THRESHOLD
        return _rewrite(buffer, start, end, attribute) if large else None

    def attribute(number: int, buffer: memoryview, start: int, end: int) -> bytes | None:
        large = number == ATTRIBUTE_TENSOR and end - start >= STRIP_THRESHOLD
        return _strip_tensor(buffer, start, end, location) if large else None

    stripped = _rewrite(buffer, 0, len(buffer), model)
    return bytes(buffer) if stripped is None else stripped


def _rewrite(buffer: memoryview, start: int, stop: int, replace: Replace) -> bytes | None:
    """The message with some of its length-delimited fields replaced; None where none is.

    What is kept is copied in runs: a legacy file with a field for each float has millions.
    """
    # Spans, not slices: an error on the way would leave those open, and the file could not close.
    pieces: list[bytes | tuple[int, int]] = []
    kept_from = start
    for number, wire_type, tag, value, end in fields(buffer, start, stop):
        replaced = replace(number, buffer, value, end) if wire_type == BYTES else None
        if replaced is not None:
            pieces += ((kept_from, tag), header(number, len(replaced)), replaced)
            kept_from = end
    if not pieces:
        return None
    pieces.append((kept_from, stop))
    return b"".join(p if isinstance(p, bytes) else buffer[slice(*p)] for p in pieces)


def _strip_tensor(buffer: memoryview, start: int, stop: int, location: str) -> bytes | None:
    """The TensorProto without its payload, or None where it is small or not in one piece."""
    payloads: list[Field] = []
    data_type = 0
    for found in fields(buffer, start, stop):
        number, wire_type, _, value, end = found
        if number in (TENSOR_EXTERNAL_DATA, TENSOR_DATA_LOCATION):
            return None
        if number == TENSOR_DATA_TYPE and wire_type == VARINT:
            data_type = _varint(buffer, value, end)[0]
        elif number == TENSOR_RAW_DATA or (number == TENSOR_FLOAT_DATA and wire_type == BYTES):
            payloads.append(found)
    if len(payloads) != 1:
        return None
    number, wire_type, tag, value, end = payloads[0]
    # Packed float_data holds the same little-endian bytes as raw_data does, but only for FLOAT.
    if wire_type != BYTES or (number == TENSOR_FLOAT_DATA and data_type != _FLOAT):
        return None
    if end - value < STRIP_THRESHOLD:
        return None
    reference = external_fields(location, value, end - value)
    return b"".join((buffer[start:tag], buffer[end:stop], reference))


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
