"""Damaged models: bytes changed at random, and fields changed at random."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import graph_models as g
import onnx
from google.protobuf.descriptor import FieldDescriptor as F
from google.protobuf.message import Message

from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare


def old_operators() -> onnx.ModelProto:
    """Operators whose form changed between opset 9 and 21, so that raising rewrites them."""
    return g.parsed(
        """<ir_version: 6, opset_import: ["": 10, "my.domain": 1]>
        old (float[1, 3, 8, 8] x, bool c) => (float[n] y, k) {
            s = Squeeze <axes = [0]> (x)      u = Unsqueeze <axes = [0]> (s)
            d, mask = Dropout <ratio = 0.25> (u)
            p = Pad <pads = [0, 0, 1, 1, 0, 0, 1, 1], mode = "constant"> (d)
            r = Resize <mode = "nearest"> (p, scales)
            q = Clip <min = -1.0, max = 1.0> (r)
            e = Softmax <axis = 3> (q)        f = ReduceSum <axes = [2, 3], keepdims = 0> (e)
            t, i = TopK <axis = 1> (f, two)   h, o = Split <axis = 1, split = [1, 1]> (t)
            m = my.domain.Own <k = 1> (h)     b = BatchNormalization(q, three, three, three, three)
            v = If(c) <
                then_branch = a () => (float[w] z) { z0 = ReduceSum <keepdims = 0> (b)
                                                     z = Unsqueeze <axes = [0]> (z0) },
                else_branch = a2 () => (float[w] z2) { z2 = Reshape(b, minus) }
            >
            l = ReduceMean <keepdims = 0> (v) k = Flatten(l)
            y = Unsqueeze <axes = [0]> (l)
        }""",
        onnx.numpy_helper.from_array(g.np.array([1, 1, 2, 2], g.np.float32), "scales"),
        onnx.numpy_helper.from_array(g.np.array([2], g.np.int64), "two"),
        onnx.numpy_helper.from_array(g.np.array([-1], g.np.int64), "minus"),
        onnx.numpy_helper.from_array(g.np.ones(3, g.np.float32), "three"),
    )


SOURCES: list[Callable[[], onnx.ModelProto]] = [
    g.mlp,
    g.with_if,
    g.with_loop,
    g.with_functions,
    g.with_everything,
    old_operators,
]


def damaged_bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled or added."""
    content = bytearray(data)
    # Most of a model's bytes are weights, where no damage shows: aim at the rest, too.
    for _ in range(rng.randint(1, 4)):
        at = (
            rng.randrange(len(content))
            if rng.random() < 0.5
            else rng.randrange(min(800, len(content)))
        )
        span = rng.choice([1, 1, 2, 8, 64])
        match rng.randrange(6):
            case 0:
                content[at] ^= 1 << rng.randrange(8)
            case 1:
                content[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
            case 2:
                del content[at : at + span]
            case 3:
                content[at:at] = content[at : at + span]
            case 4:
                content[at:at] = rng.randbytes(span)
            case 5:
                content[at : at + span] = content[
                    (place := rng.randrange(len(content))) : place + span
                ]
        if not content:
            return b""
    return bytes(content)


def damaged_fields(model: onnx.ModelProto, rng: random.Random) -> onnx.ModelProto:
    """Fields of random parts of the model cleared, changed, doubled or exchanged."""
    for _ in range(rng.randint(1, 3)):
        parts = [m for m in _messages(model) if m.ListFields()]
        part = rng.choice(parts)
        field, value = rng.choice(part.ListFields())
        if rng.random() < 0.3 or field.name in ("raw_data", "float_data"):
            part.ClearField(field.name)
        elif field.is_repeated:
            _damage_list(value, field, rng, parts)
        elif field.message_type is not None:
            value.ParseFromString(_alike(value, rng, parts))
        else:
            setattr(part, field.name, _other(value, field, rng, parts))
    return model


def _messages(message: Message) -> Iterator[Message]:
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from _messages(inner)


def _damage_list(values: Any, field: F, rng: random.Random, parts: list[Message]) -> None:
    at = rng.randrange(len(values))
    match rng.randrange(3):
        case 0:
            del values[at]
        case 1 if field.message_type is None:
            values.insert(at, values[at])
        case 1:
            values.add().ParseFromString(_alike(values[at], rng, parts))
        case 2 if field.message_type is None:
            values[at] = _other(values[at], field, rng, parts)


def _alike(value: Message, rng: random.Random, parts: list[Message]) -> bytes:
    """A message of the same kind, as bytes: protobuf crashes on a copy into its own parent."""
    same = [p for p in parts if p.DESCRIPTOR is value.DESCRIPTOR] or [value]
    return rng.choice(same).SerializeToString()


def _other(value: Any, field: F, rng: random.Random, parts: list[Message]) -> Any:
    """Another value of the field's type: one that is elsewhere in the model, or an extreme one."""
    same = [
        other
        for part in parts
        for f, other in part.ListFields()
        if f.type == field.type and not f.is_repeated
    ]
    if field.enum_type is not None:
        return rng.choice([v.number for v in field.enum_type.values])
    if field.type in (F.TYPE_INT64, F.TYPE_INT32):
        limit = 2**31 if field.type == F.TYPE_INT32 else 2**63
        same = [
            *(v for v in same if -limit <= v < limit),
            0,
            -1,
            1,
            7,
            2**31 - 1,
            -(2**31),
            limit - 1,
        ]
    if field.type == F.TYPE_STRING:
        same += ["", "x", "a\0b", "..", "/", "é" * 50]
    return rng.choice(same) if same else value


def survive(path: Path, opset: int = 21) -> None:
    """What every command does with a model before it looks at data."""
    model, _ = prepare(Model.load(path), opset)
    model.session_model()
    model.inputs()
