"""Damage: to any bytes, to protobuf's wire format, to the fields of a model, to archives of arrays.

Every function takes its random numbers from the generator it is given, and nothing else: the same
generator makes the same damage.
"""

from __future__ import annotations

import io
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass

import onnx
from google.protobuf.descriptor import Descriptor
from onnx import TensorProto as T

Rng = random.Random

_EDGES = [0, 1, 2, 7, 8, 31, 32, 127, 128, 255, 1023, 1024, 65535, 2**31 - 1, 2**31, 2**32 - 1]
NUMBERS = [*_EDGES, *(-e for e in _EDGES), 2**62, 2**63 - 1, -(2**63), 2**64 - 1, 3, 5, 16, 17, 64]
NAMES = [
    "",
    "x",
    "y",
    "a",
    "w",
    "a\nb",
    "\x1b[31m",
    "é" * 40,
    "名前",
    "n" * 5000,
    "a\0b",
    "..",
    "/",
]
LOCATIONS = ["", "data", "/etc/passwd", "../data", "missing", ".", "pipe", "nul\0", "n" * 300]
_LARGEST = 4_000_000  # bytes of a damaged model
_WORDS = """
MatMul Gemm Conv ConvTranspose Add Mul Div Sub Relu Softmax Transpose Reshape Constant Cast
Identity QuantizeLinear DequantizeLinear If Loop Scan Gather Concat Slice Shape Where Pow Sqrt
ReduceMean LayerNormalization BatchNormalization Resize Pad TopK Split Squeeze Unsqueeze Expand
ConstantOfShape Range Einsum LSTM GRU MatMulInteger Attention Clip GroupNormalization Nothing
"""
_OTHER_WORDS = """
axis axes perm value to kernel_shape pads strides dilations group transA transB alpha beta keepdims
block_size output_dtype then_branch body value_ints value_float saturate epsilon x
"""
OPERATORS, ATTRIBUTES = _WORDS.split(), _OTHER_WORDS.split()


def pick(content: bytes, others: list[bytes], rng: Rng) -> bytes:
    """One to four kinds of damage to a model, one upon the other."""
    for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 4])):
        how = rng.choices([any_bytes, wire, fields], [2, 5, 6])[0]
        content = how(content, others, rng)[:_LARGEST]
    return content


# --- any bytes -----------------------------------------------------------------------------------


def any_bytes(content: bytes, others: list[bytes], rng: Rng) -> bytes:
    """Bits turned, bytes cut out, doubled, added, or taken from elsewhere."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if not data:
            return b""
        # Most bytes of a model are weights, where no damage shows: aim at the rest, too.
        at = rng.randrange(len(data) if rng.random() < 0.6 else min(len(data), 900))
        span = rng.choice([1, 1, 2, 4, 8, 64, 512])
        match rng.randrange(8):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                data[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
            case 2:
                del data[at : at + span]
            case 3:
                data[at:at] = data[at : at + span]
            case 4:
                data[at:at] = rng.randbytes(span)
            case 5:
                place = rng.randrange(len(data))
                data[at : at + span] = data[place : place + span]
            case 6:
                del data[at:]
            case 7:
                other = rng.choice(others)
                place = rng.randrange(max(1, len(other)))
                data[at : at + span] = other[place : place + span]
    return bytes(data)


# --- the wire format -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Field:
    number: int
    kind: int
    value: bytes  # without tag and length

    def bytes(self) -> bytes:
        length = _varint(len(self.value)) if self.kind == 2 else b""
        return _varint(self.number << 3 | self.kind) + length + self.value


def wire(content: bytes, others: list[bytes], rng: Rng) -> bytes:
    """A field somewhere in the tree of messages removed, doubled, moved, retyped or refilled."""
    return _damaged(content, onnx.ModelProto.DESCRIPTOR, rng)


def _damaged(message: bytes, kind: Descriptor | None, rng: Rng) -> bytes:
    found = _split(message)
    if not found:
        return message + rng.choice([b"", b"\x08", _Field(1, 2, b"x").bytes(), rng.randbytes(3)])
    at = rng.randrange(len(found))
    if kind is not None and rng.random() < 0.5:  # the graph, of all the fields of a model
        at = max(range(len(found)), key=lambda i: len(found[i].value))
    chosen = found[at]
    known = kind.fields_by_number.get(chosen.number) if kind is not None else None
    inner = known.message_type if known is not None else None
    if inner is not None and chosen.kind == 2 and rng.random() < 0.85:
        found[at] = _Field(chosen.number, 2, _damaged(chosen.value, inner, rng))
    else:
        _damage_one(found, at, rng)
    return b"".join(f.bytes() for f in found)


def _damage_one(found: list[_Field], at: int, rng: Rng) -> None:
    chosen = found[at]
    match rng.randrange(10):
        case 0:
            del found[at]
        case 1:
            found.insert(at, chosen)
        case 2:
            found.insert(at, found.pop(rng.randrange(len(found))))
        case 3:
            found[at] = _Field(chosen.number, chosen.kind, rng.choice(found).value)
        case 4:
            found[at] = _Field(rng.choice([1, 2, 3, 5, 7, 9, 13, 99]), chosen.kind, chosen.value)
        case 5:
            found[at] = _Field(chosen.number, 0, _varint(rng.choice(NUMBERS) % 2**64))
        case 6:
            found[at] = _Field(chosen.number, 2, rng.choice(NAMES).encode())
        case 7:
            found[at] = _Field(chosen.number, 2, chosen.value[: rng.randrange(9)])
        case 8:
            count = min(rng.choice([3, 30, 300]), _LARGEST // (len(chosen.value) + 9))
            found[at:at] = [chosen] * count
        case 9:
            found[at] = _Field(chosen.number, chosen.kind, _other_value(chosen, rng))


def _other_value(chosen: _Field, rng: Rng) -> bytes:
    if chosen.kind == 0:
        return _varint(rng.choice(NUMBERS) % 2**64)
    if chosen.kind in (1, 5):
        width = 8 if chosen.kind == 1 else 4
        return rng.choice([b"\0" * width, b"\xff" * width, rng.randbytes(width)])
    return any_bytes(chosen.value, [chosen.value], rng)


def bomb(rng: Rng) -> bytes:
    """Few bytes that claim much: empty parts by the hundred thousand, or parts within parts."""
    count = rng.choice([1000, 50_000, 400_000, 1_000_000])
    part = _Field(rng.choice([1, 5, 11, 12, 13, 14, 15, 16]), 2, b"").bytes()
    match rng.randrange(4):
        case 0:
            inside = part * count
        case 1:
            inside = _Field(1, 2, _Field(rng.choice([1, 2, 5, 9]), 2, b"").bytes() * count).bytes()
        case 2:
            inside = _Field(
                5, 2, _Field(rng.choice([1, 5, 7, 11]), 2, b"\1" * count).bytes()
            ).bytes()
        case _:
            inside = b""
            for _ in range(rng.choice([10, 30, 32, 33, 34, 99, 400])):
                inside = _Field(1, 2, _Field(5, 2, _Field(6, 2, inside).bytes()).bytes()).bytes()
    return b"\x08\x08" + _Field(7, 2, inside).bytes() + b"\x42\x02\x10\x11"


def _split(message: bytes) -> list[_Field]:
    """The fields of a message, as far as they can be read."""
    found, position = [], 0
    while position < len(message):
        tag, position = _read_varint(message, position)
        start = position
        match tag & 7:
            case 0:
                _, position = _read_varint(message, position)
            case 1:
                position += 8
            case 5:
                position += 4
            case 2:
                size, start = _read_varint(message, position)
                position = start + size
            case _:
                break
        if position > len(message) or tag < 8:
            break
        found.append(_Field(tag >> 3, tag & 7, message[start:position]))
    return found


def _read_varint(message: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message):
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift > 63:
            break
        shift += 7
    return value, position


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


# --- the fields of a model -----------------------------------------------------------------------


def fields(content: bytes, others: list[bytes], rng: Rng) -> bytes:
    """One thing that a model says, said wrongly; bytes that are no model are left."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
        if model.graph.node:
            rng.choice(_FIELDS)(model, rng)
        return model.SerializeToString()
    except Exception:  # protobuf refuses some strings and some sizes: those are for the others
        return content


def _node(model: onnx.ModelProto, rng: Rng) -> onnx.NodeProto:
    return rng.choice(model.graph.node)


def _name(model: onnx.ModelProto, rng: Rng) -> str:
    """A tensor that there is, or one that there is not."""
    if rng.random() < 0.2:
        return rng.choice(NAMES)
    node = _node(model, rng)
    known = [*node.input, *node.output, *(t.name for t in model.graph.initializer)]
    return rng.choice(known or ["x"])


def _rewire(model: onnx.ModelProto, rng: Rng) -> None:
    node = _node(model, rng)
    ends = rng.choice([node.input, node.input, node.output])
    match rng.randrange(3):
        case 0 if ends:
            ends[rng.randrange(len(ends))] = _name(model, rng)
        case 1 if ends:
            del ends[rng.randrange(len(ends))]
        case _:
            ends.append(_name(model, rng))


def _rename(model: onnx.ModelProto, rng: Rng) -> None:
    """One tensor, wherever it stands, or one node."""
    if rng.random() < 0.3:
        _node(model, rng).name = rng.choice([*NAMES, _node(model, rng).name])
        return
    old, new = _name(model, rng), rng.choice(NAMES)
    for node in model.graph.node:
        for ends in (node.input, node.output):
            for index, name in enumerate(ends):
                if name == old:
                    ends[index] = new
    for value in (*model.graph.input, *model.graph.output, *model.graph.initializer):
        value.name = new if value.name == old else value.name


def _operator(model: onnx.ModelProto, rng: Rng) -> None:
    node = _node(model, rng)
    node.op_type = rng.choice(OPERATORS)
    if rng.random() < 0.2:
        node.domain = rng.choice(["com.microsoft", "ai.onnx", "", "x", "ai.onnx.ml"])


def _attribute(model: onnx.ModelProto, rng: Rng) -> None:
    node = _node(model, rng)
    if not node.attribute or rng.random() < 0.3:
        found = node.attribute.add(name=rng.choice(ATTRIBUTES))
        found.type = rng.choice(list(onnx.AttributeProto.AttributeType.values()))
    else:
        found = rng.choice(node.attribute)
    match rng.randrange(7):
        case 0:
            found.i = _signed(rng)
        case 1:
            found.f = rng.choice([0.0, -1.0, float("nan"), float("inf"), 1e38, 1e-45])
        case 2:
            found.ints[:] = [_signed(rng) for _ in range(rng.randrange(6))]
        case 3:
            found.s = rng.choice(NAMES).encode()
        case 4:
            found.type = rng.choice(list(onnx.AttributeProto.AttributeType.values()))
        case 5:
            found.name = rng.choice(ATTRIBUTES)
        case 6:
            found.t.CopyFrom(_tensor(model, rng))


def _tensor(model: onnx.ModelProto, rng: Rng) -> onnx.TensorProto:
    found = [*model.graph.initializer]
    found += [a.t for node in model.graph.node for a in node.attribute if a.HasField("t")]
    return rng.choice(found) if found else onnx.TensorProto(name="t", data_type=1)


def _weights(model: onnx.ModelProto, rng: Rng) -> None:
    tensor = _tensor(model, rng)
    match rng.randrange(7):
        case 0:
            tensor.dims[:] = [
                abs(_signed(rng)) % 2**40 for _ in range(rng.choice([0, 1, 2, 3, 70]))
            ]
        case 1:
            tensor.data_type = rng.choice([*T.DataType.values(), 99])
        case 2 if tensor.dims:
            tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice([0, 1, -1, 2**40, 32])
        case 3:
            raw = rng.choice([float("inf"), float("nan"), 0.0, 1e-45, 3e38, 1e7])
            tensor.raw_data = struct.pack("<f", raw) * (len(tensor.raw_data) // 4)
        case 4:
            tensor.raw_data = tensor.raw_data[: rng.randrange(9)]
        case 5:
            tensor.float_data.extend([1.0] * rng.choice([1, 300]))
        case 6:
            _outside(tensor, rng)


def _outside(tensor: onnx.TensorProto, rng: Rng) -> None:
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = T.EXTERNAL
    tensor.external_data.add(key="location", value=rng.choice(LOCATIONS))
    for key in ("offset", "length"):
        if rng.random() < 0.7:
            value = rng.choice([str(rng.choice(NUMBERS)), "x", "0", str(len(tensor.raw_data))])
            tensor.external_data.add(key=key, value=value)


def _values(model: onnx.ModelProto, rng: Rng) -> None:
    graph = model.graph
    found = [*graph.input, *graph.output, *graph.value_info]
    if not found:
        return
    kind = rng.choice(found).type.tensor_type
    match rng.randrange(4):
        case 0:
            kind.elem_type = rng.choice([*T.DataType.values(), 99])
        case 1 if kind.shape.dim:
            rng.choice(kind.shape.dim).dim_value = _signed(rng)
        case 2 if kind.shape.dim:
            rng.choice(kind.shape.dim).dim_param = rng.choice(NAMES)
        case _:
            for _ in range(rng.choice([1, 3, 70])):
                kind.shape.dim.add(dim_value=_signed(rng))


def _order(model: onnx.ModelProto, rng: Rng) -> None:
    nodes = list(model.graph.node)
    at, other = rng.randrange(len(nodes)), rng.randrange(len(nodes))
    nodes[at], nodes[other] = nodes[other], nodes[at]
    if rng.random() < 0.3:
        nodes.insert(rng.randrange(len(nodes)), rng.choice(nodes))
    copies = [n.SerializeToString() for n in nodes]
    del model.graph.node[:]
    for copy in copies:
        model.graph.node.add().ParseFromString(copy)


def _versions(model: onnx.ModelProto, rng: Rng) -> None:
    if rng.random() < 0.3:
        model.ir_version = rng.choice([0, 1, 3, 4, 8, 10, 13, 99, 2**31])
    elif model.opset_import and rng.random() < 0.8:
        entry = rng.choice(model.opset_import)
        entry.version = rng.choice([0, 1, 5, 7, 9, 10, 11, 12, 13, 18, 19, 21, 23, 24, 25, 99, -1])
    else:
        model.opset_import.add(domain=rng.choice(["", "x", "ai.onnx"]), version=rng.choice([1, 18]))


def _outputs(model: onnx.ModelProto, rng: Rng) -> None:
    ends = rng.choice([model.graph.input, model.graph.output])
    if ends and rng.random() < 0.5:
        del ends[rng.randrange(len(ends))]
    else:
        ends.add(name=_name(model, rng))


def _body(model: onnx.ModelProto, rng: Rng) -> None:
    """The graph within a node of itself."""
    content = model.graph.SerializeToString()
    for _ in range(rng.choice([1, 1, 2])):
        found = _node(model, rng).attribute.add(
            name=rng.choice(["then_branch", "else_branch", "body"])
        )
        found.type = onnx.AttributeProto.GRAPH
        found.g.ParseFromString(content)


_FIELDS: list[Callable[[onnx.ModelProto, Rng], None]] = [
    *(_rewire, _rewire, _rename, _operator, _operator, _attribute, _attribute, _weights, _weights),
    *(_values, _order, _versions, _outputs, _body),
]


def _signed(rng: Rng) -> int:
    value = rng.choice(NUMBERS)
    return value if -(2**63) <= value < 2**63 else 3


# --- archives of arrays --------------------------------------------------------------------------

_HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 32), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776, 0), }",
    "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 16, 4096, 4096), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-5, 32), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (5,) * 3, }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (5, 32), }",
    "{'descr': '<f4', 'fortran_order': 1, 'shape': [5, 32], }",
    "{[]: 1}",
    "(" * 300,
    "-" * 5000 + "1",
    "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (5, 32), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1, " * 70 + "), }",
    "{'descr': '<f16', 'fortran_order': False, 'shape': (), }",
    "{'descr': '<U0', 'fortran_order': False, 'shape': (5, 32), }",
    "{'descr': '|b1', 'fortran_order': False, 'shape': (True, 32), }",
]


def archive(content: bytes, others: list[bytes], rng: Rng) -> bytes:
    """Damage to an archive's bytes, or to its members, which are then packed rightly."""
    if rng.random() < 0.35:
        return any_bytes(content, others, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            members = [(name, opened.read(name)) for name in opened.namelist()]
    except zipfile.BadZipFile:
        return array(content, others, rng)
    at = rng.randrange(len(members)) if members else 0
    match rng.randrange(5):
        case 0 if members:
            del members[at]
        case 1 if members:
            members.append((rng.choice([*NAMES, "x.npy", "x", "ids.npy"]), members[at][1]))
        case 2 if members:
            members[at] = (rng.choice([*NAMES, "ids.npy", "x/"]), members[at][1])
        case _ if members:
            members[at] = (members[at][0], array(members[at][1], others, rng))
    stream = io.BytesIO()
    how = rng.choice(
        [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    )
    with zipfile.ZipFile(stream, "w", how) as made:
        for name, value in members:
            try:
                made.writestr(name, value)
            except (ValueError, IndexError, UnicodeEncodeError):
                continue
    return stream.getvalue()


def array(content: bytes, others: list[bytes], rng: Rng) -> bytes:
    """Damage to a .npy file: its header, its values, or any bytes."""
    if rng.random() < 0.4 or len(content) < 12:
        return any_bytes(content, others, rng)
    end = 10 + int.from_bytes(content[8:10], "little")
    header, values = content[10:end].decode("latin-1"), content[end:]
    match rng.randrange(4):
        case 0:
            header = rng.choice(_HEADERS)
        case 1:
            old = rng.choice(["<f4", "<f8", "5", "32", "False", "<i8", "shape", "'"])
            header = header.replace(
                old, rng.choice(["<i4", "|b1", "0", "-1", "7", "True", "", "|O"]), 1
            )
        case 2:
            bad = rng.choice([float("nan"), float("inf"), 3e38, 1e-45])
            values = struct.pack("<f", bad) * (len(values) // 4)
        case 3:
            values = values * rng.choice([0, 2, 100])
    version = bytes([rng.choice([1, 1, 1, 2, 3, 9]), 0])
    encoded = header.encode("latin-1")
    size = struct.pack("<H" if version[0] == 1 else "<I", len(encoded) % 65536)
    return content[:6] + version + size + encoded + values
