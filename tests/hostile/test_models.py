"""Models that claim, hide or repeat things: right or refused, in bounded time and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh
from onnx import parser

import onnxq
from onnxq.errors import OnnxqError
from onnxq.graph.exporting import export
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.sites import find_sites

SMALL = h.make_model(
    h.make_graph(
        [h.make_node("MatMul", ["x", "w"], ["y"])],
        "small",
        [h.make_tensor_value_info("x", T.FLOAT, [1, 4])],
        [h.make_tensor_value_info("y", T.FLOAT, [1, 4])],
        [nh.from_array(np.eye(4, dtype=np.float32), "w")],
    ),
    opset_imports=[h.make_opsetid("", 17)],
    ir_version=8,
).SerializeToString()


def _varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def _field(number: int, content: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _packed(node_field: int, content: bytes) -> bytes:
    """An attribute `x` of a node, with a packed list."""
    attribute = _field(1, b"x") + _field(node_field, content)
    return _field(7, _field(1, _field(4, b"Own") + _field(5, attribute)))


COUNT = 4_000_000
BOMBS = {
    "nodes": _field(7, b"\x0a\x00" * COUNT),
    "initializers": _field(7, b"\x2a\x00" * COUNT),
    "inputs": _field(7, b"\x5a\x00" * COUNT),
    "value_infos": _field(7, b"\x6a\x00" * COUNT),
    "opsets": b"\x42\x00" * COUNT,
    "metadata": b"\x72\x00" * COUNT,
    "functions": b"\xca\x01\x00" * COUNT,
    "names of a node's inputs": _field(7, _field(1, b"\x0a\x00" * COUNT)),
    "attributes of a node": _field(7, _field(1, b"\x2a\x00" * COUNT)),
    "dims of a tensor": _field(7, _field(5, _field(1, b"\x01" * 3 * COUNT))),
    "ints of an attribute": _packed(8, b"\x01" * 3 * COUNT),
    "strings of an attribute": _packed(9, b"")[:0]
    + _field(7, _field(1, _field(4, b"Own") + _field(5, _field(1, b"x") + b"\x4a\x00" * COUNT))),
    "nodes of a body": _field(7, _field(1, _field(5, _field(6, b"\x0a\x00" * COUNT)))),
    "small nodes of many parts": _field(7, _field(1, b"\x0a\x00" * 400) * (COUNT // 400)),
}

CHILD = """
import sys, time
from pathlib import Path
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.errors import OnnxqError
try:
    prepare(Model.load(sys.argv[1]), 21)
except OnnxqError as error:
    print(error)
else:
    print("accepted")
lines = Path("/proc/self/status").read_text().splitlines()  # ru_maxrss begins with the parent's
print(next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")))
print(time.process_time())
"""


def _looked_at(path: Path) -> tuple[str, int, float]:
    """What is said of a model; MiB and seconds that it took a process of its own to say it."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, path], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    said, peak, seconds = done.stdout.splitlines()
    return said, int(peak), float(seconds)


@pytest.mark.parametrize("name", BOMBS)
def test_few_bytes_that_unfold_into_gigabytes(name: str, tmp_path: Path) -> None:
    """Each takes 1 to 10 GB when it is parsed and walked as it is."""
    path = tmp_path / "bomb.onnx"
    path.write_bytes(SMALL + BOMBS[name])
    said, peak, seconds = _looked_at(path)
    assert said.startswith(f"{path}: it has more than"), said
    assert peak < 200 and seconds < 20, (peak, seconds)  # 100 MiB and 2 s on an idle machine


def test_just_under_the_limit_is_bounded_too(tmp_path: Path) -> None:
    path = tmp_path / "many.onnx"
    path.write_bytes(SMALL + b"\x72\x00" * 1_900_000)
    said, peak, seconds = _looked_at(path)
    assert said == "accepted"
    assert peak < 1500 and seconds < 60, (peak, seconds)


@pytest.mark.parametrize("part", ["node", "initializer", "input", "output"])
def test_more_of_one_kind_than_any_model_has(part: str, tmp_path: Path) -> None:
    number = {"node": 1, "initializer": 5, "input": 11, "output": 12}[part]
    path = tmp_path / "many.onnx"
    path.write_bytes(SMALL + _field(7, (_varint(number << 3 | 2) + b"\x00") * 200_001))
    with pytest.raises(OnnxqError, match=f"more than 200,000 {part}s"):
        Model.load(path)


def _saved(text: str, path: Path, *weights: onnx.TensorProto) -> Path:
    model = parser.parse_model(text)
    model.graph.initializer.extend(weights)
    path.write_bytes(model.SerializeToString())
    return path


def test_a_negative_dimension_before_a_slice_does_not_end_the_process(tmp_path: Path) -> None:
    """Exporters write -1 for an open dimension; onnx 1.23's inference aborts on it."""
    path = _saved(
        """<ir_version: 8, opset_import: ["": 17]>
        g (float[a, 4] x, bool c) => (float[a, 4] z) {
            y = Slice(x, zero, two, zero)
            z = If(c) < then_branch = t () => (float[a, 4] p) { p = Slice(x, zero, two, zero) },
                        else_branch = e () => (float[a, 4] q) { q = Relu(y) } > }""",
        tmp_path / "m.onnx",
        *(nh.from_array(np.array([v], np.int64), n) for n, v in (("zero", 0), ("two", 2))),
    )
    content = onnx.load(path)
    body = content.graph.node[1].attribute[0].g
    body.value_info.append(h.make_tensor_value_info("p", T.FLOAT, [-1, 4]))
    for value in (content.graph.input[0], content.graph.output[0], *body.output):
        value.type.tensor_type.shape.dim[0].dim_value = -1
    path.write_bytes(content.SerializeToString())
    assert _looked_at(path)[0] == "accepted"
    loaded, _ = prepare(Model.load(path), 21)
    assert [s.shape for s in loaded.inputs()] == [(None, 4), ()]


def test_an_attribute_that_an_operator_does_not_have_is_not_obeyed(tmp_path: Path) -> None:
    weight = nh.from_array(np.ones((32, 64), np.float32), "w")
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[n, 32] x) => (float[n, 64] y) {
        y = MatMul <transB = "yes", group = [3, 4]> (x, w) }"""
    loaded, _ = prepare(Model.load(_saved(text, tmp_path / "m.onnx", weight)), 21)
    (site,) = find_sites(loaded)
    assert "transB" not in site.node.attrs and "group" not in site.node.attrs
    kept = {a.name for a in loaded.export().graph.node[0].attribute}
    assert kept == {"transB", "group"}


def test_large_weights_in_bodies_are_not_copied_to_infer_types(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (bool c, float[n, 64] x) => (y) {
        y = If(c) < then_branch = t () => (float[n, 96] p) { p = MatMul(x, inner) },
                    else_branch = e () => (float[n, 96] q) { q = MatMul(x, inner2) } > }"""
    model = parser.parse_model(text)
    for attribute, name in zip(model.graph.node[0].attribute, ("inner", "inner2"), strict=True):
        weight = nh.from_array(np.ones((64, 96), np.float32), name)
        attribute.g.initializer.append(weight)
        attribute.g.initializer.append(nh.from_array(np.ones(3, np.float32), f"{name}_small"))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    loaded, _ = prepare(Model.load(tmp_path / "m.onnx"), 17)
    bare = export(loaded, bare=True)
    assert bare.ByteSize() < 2000 < 2 * 64 * 96 * 4 < loaded.export().ByteSize()
    y = next(t for n, t in loaded.graph.tensors().items() if n == "y")
    assert tuple(y.shape) == ("n", 96)  # as with the weights
    assert loaded.export().graph == model.graph


@pytest.mark.parametrize("number", [-31, 99, 2**31 - 1])
def test_a_cast_to_a_type_that_onnx_does_not_know_can_be_linted(
    number: int, tmp_path: Path
) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (bool c, float[n] x) => (float[n] z) {
        z = If(c) < then_branch = t () => (float[n] p) { q = Cast <to = 10> (x) p = Relu(x) },
                    else_branch = e () => (float[n] q) { q = Relu(x) } > }"""
    path = _saved(text, tmp_path / "m.onnx")
    model = onnx.load(path)
    model.graph.node[0].attribute[0].g.node[0].attribute[0].i = number
    path.write_bytes(model.SerializeToString())
    assert onnxq.lint(path).findings == ()
