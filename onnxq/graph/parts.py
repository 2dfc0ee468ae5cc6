"""The parts of a serialized model, counted and found without parsing it.

A part (a node, a name, an entry of a list) takes two bytes of a file and a hundred of memory, in
each of the copies that passes make: a file of 20 MB could fill 10 GB. So they are counted first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
from google.protobuf.descriptor import Descriptor

from onnxq.errors import OnnxqError
from onnxq.graph import wire

MOST_PARTS = 2_000_000
"""A torch export of SDXL's UNet, 5,072 nodes with stack traces, has 0.23 million."""

MOST_NUMBERS = 100_000_000
"""Numbers that are fields of their own, as protobuf 2 wrote lists: each takes time, not memory."""

_DEEPEST = 100  # protobuf's own limit
# By field: how many bytes of a list of numbers weigh as much as a part. A number of a tensor takes
# 4 or 8 bytes where it took 1 or more; one of an attribute becomes a Python object besides.
_LISTS = {
    "onnx.AttributeProto": {7: 16, 8: 4},  # floats, ints
    "onnx.SparseTensorProto": {3: 4},  # dims
    "onnx.TensorProto": {1: 4, 5: 64, 7: 64, 11: 64},  # dims, int32_data, int64_data, uint64_data
}
_LARGEST_REFERENCE = 1 << 16  # more bytes than a tensor without data takes

_Span = tuple[int, int, "_Kind", int]  # start, end, message, depth


@dataclass(frozen=True)
class _Kind:
    """A message of onnx.proto: its fields that hold messages, and those that are `_LISTS`."""

    name: str
    messages: dict[int, str]
    lists: dict[int, int]


def refuse_oversized(buffer: memoryview) -> None:
    """Refuse a model that would take much more memory than its bytes.

    Raises:
        OnnxqError: too many parts; or bytes that are no protobuf messages.
    """
    parts = numbers = 0
    waiting: list[_Span] = [(0, len(buffer), _KINDS[_MODEL], 0)]
    while waiting:
        start, stop, kind, depth = waiting.pop()
        messages, lists = kind.messages, kind.lists
        for number, wire_type, _, value, end in wire.fields(buffer, start, stop):
            if wire_type != wire.BYTES:
                numbers += 1
                if numbers > MOST_NUMBERS:
                    raise _oversized("numbers", MOST_NUMBERS)
                continue
            parts += 1
            if number in messages:
                if end > value and depth < _DEEPEST:
                    waiting.append((value, end, _KINDS[messages[number]], depth + 1))
            elif number in lists:
                parts += (end - value) // lists[number]
            if parts > MOST_PARTS:
                raise _oversized("parts", MOST_PARTS)


def locations(buffer: memoryview) -> Iterator[str]:
    """The `location` of every tensor with external data, at any depth.

    Raises:
        OnnxqError: bytes that are no protobuf messages.
    """
    waiting: list[_Span] = [(0, len(buffer), _KINDS[_MODEL], 0)]
    while waiting:
        start, stop, kind, depth = waiting.pop()
        for number, wire_type, _, value, end in wire.fields(buffer, start, stop):
            inner = kind.messages.get(number)
            if wire_type != wire.BYTES or inner is None or depth == _DEEPEST:
                continue
            if inner == _ENTRY and kind.name == _TENSOR:
                yield from _location(bytes(buffer[value:end]))
            elif inner in _HOLDERS and (inner != _TENSOR or end - value < _LARGEST_REFERENCE):
                waiting.append((value, end, _KINDS[inner], depth + 1))


def _location(entry: bytes) -> Iterator[str]:
    try:
        found = onnx.StringStringEntryProto.FromString(entry)
    except Exception as error:  # protobuf's DecodeError, of either of its implementations
        raise OnnxqError("not an ONNX model", "export the file again") from error
    if found.key == "location" and isinstance(found.value, str):
        yield found.value


def _oversized(what: str, most: int) -> OnnxqError:
    return OnnxqError(
        f"it has more than {most:,} {what}", "no exporter writes such a file; export it again"
    )


def _kinds(descriptor: Descriptor, found: dict[str, _Kind]) -> dict[str, _Kind]:
    """The message and those in it, by name."""
    if descriptor.full_name in found:
        return found
    inside = {f.number: f.message_type for f in descriptor.fields if f.message_type is not None}
    messages = {number: inner.full_name for number, inner in inside.items()}
    lists = _LISTS.get(descriptor.full_name, {})
    found[descriptor.full_name] = _Kind(descriptor.full_name, messages, lists)
    for inner in inside.values():
        _kinds(inner, found)
    return found


def _holders(kinds: Mapping[str, _Kind], inside: str) -> frozenset[str]:
    """The messages that may hold one of a kind, at any depth; and that kind itself."""
    found = {inside}
    while True:
        more = {k.name for k in kinds.values() if not found.isdisjoint(k.messages.values())}
        if more <= found:
            return frozenset(found)
        found |= more


_MODEL = onnx.ModelProto.DESCRIPTOR.full_name
_TENSOR = onnx.TensorProto.DESCRIPTOR.full_name
_ENTRY = onnx.StringStringEntryProto.DESCRIPTOR.full_name
_KINDS = _kinds(onnx.ModelProto.DESCRIPTOR, {})
_HOLDERS = _holders(_KINDS, _TENSOR)
