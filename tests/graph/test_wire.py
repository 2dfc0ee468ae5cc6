"""The wire format against protobuf's own reader and writer."""

from __future__ import annotations

import graph_models as g
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper as nh

from onnxq.errors import OnnxqError
from onnxq.graph import parts, wire


def _strip(model: onnx.ModelProto) -> tuple[bytes, onnx.ModelProto]:
    content = model.SerializeToString()
    return content, onnx.ModelProto.FromString(wire.strip(memoryview(content), "here.onnx"))


def _filled(tensor: onnx.TensorProto, content: bytes) -> onnx.TensorProto:
    """The tensor with its bytes put back as raw_data, if it refers to `here.onnx`."""
    where = {e.key: e.value for e in tensor.external_data}
    out = onnx.TensorProto()
    out.CopyFrom(tensor)
    if where.get("location") == "here.onnx":
        start = int(where["offset"])
        out.raw_data = content[start : start + int(where["length"])]
        out.ClearField("external_data")
        out.ClearField("data_location")
    return out


@pytest.mark.parametrize("make", [g.mlp, g.with_if, g.with_functions, g.with_everything])
def test_what_is_cut_out_can_be_put_back(make: object) -> None:
    model = make()  # type: ignore[operator]
    content, stripped = _strip(model)
    assert len(stripped.SerializeToString()) < len(content)
    for tensor in stripped.graph.initializer:
        tensor.CopyFrom(_filled(tensor, content))
    for node in stripped.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                attribute.t.CopyFrom(_filled(attribute.t, content))
    assert stripped == model


def _tensor(**fields: object) -> onnx.TensorProto:
    return onnx.TensorProto(name="w", data_type=T.FLOAT, dims=[400], **fields)  # type: ignore[arg-type]


RAW = np.arange(400, dtype=np.float32)
KEPT = {
    "small": _tensor(raw_data=bytes(wire.STRIP_THRESHOLD - 1)),
    "two payloads": _tensor(raw_data=RAW.tobytes(), float_data=RAW),
    "float_data of another type": onnx.TensorProto(data_type=T.COMPLEX64, float_data=RAW),
    "doubles": onnx.TensorProto(data_type=T.DOUBLE, double_data=RAW),
    "integers": onnx.TensorProto(data_type=T.INT32, int32_data=RAW.astype(int)),
    "external already": _tensor(
        raw_data=RAW.tobytes(),
        data_location=T.EXTERNAL,
        external_data=[onnx.StringStringEntryProto(key="location", value="there")],
    ),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_is_not_in_one_piece_stays(name: str) -> None:
    model = g.parsed('<ir_version: 8, opset_import: ["": 17]> g () => () {}', KEPT[name])
    assert _strip(model)[1] == model


def test_float_data_is_cut_out_packed_and_kept_unpacked() -> None:
    packed = g.parsed('<ir_version: 8, opset_import: ["": 17]> g () => () {}')
    packed.graph.initializer.append(_tensor(float_data=RAW))
    content, stripped = _strip(packed)
    (found,) = (_filled(t, content) for t in stripped.graph.initializer)
    np.testing.assert_array_equal(nh.to_array(found), RAW)

    # As protobuf 2 wrote it: a field for each float. protobuf reads both.
    head = _tensor().SerializeToString()
    tensor = head + b"".join(b"\x25" + x.tobytes() for x in RAW)
    content = wire.field(7, wire.field(5, tensor))
    stripped = onnx.ModelProto.FromString(wire.strip(memoryview(content), "here.onnx"))
    assert stripped.graph.initializer[0] == packed.graph.initializer[0]


def test_unknown_fields_survive() -> None:
    """Those of a newer onnx.proto, in the model, in the graph and in a node."""
    unknown = wire.field(1000, b"from the future")
    model = g.mlp()
    node = model.graph.node[0].SerializeToString() + unknown
    graph = wire.field(1, node) + unknown
    content = wire.field(7, graph) + unknown
    parsed = onnx.ModelProto.FromString(wire.strip(memoryview(content), "x"))
    assert parsed.SerializeToString().count(b"from the future") == 3


def test_nested_weights_stay_inline() -> None:
    body = h.make_graph([], "b", [], [], [nh.from_array(RAW, "inner")])
    model = g.parsed('<ir_version: 8, opset_import: ["": 17]> g (bool c) => () {}')
    model.graph.node.append(h.make_node("If", ["c"], [], then_branch=body, else_branch=body))
    assert _strip(model)[1] == model


@given(st.binary(max_size=200))
def test_any_bytes_are_fields_or_an_error(content: bytes) -> None:
    try:
        spans = [
            (tag, end) for _, _, tag, _, end in wire.fields(memoryview(content), 0, len(content))
        ]
    except OnnxqError:
        return
    assert [tag for tag, _ in spans] == [0, *(end for _, end in spans)][: len(spans)]
    assert not content or spans[-1][1] == len(content)


@given(st.integers(0, 2**64 - 1), st.binary(max_size=40))
def test_what_is_written_is_what_protobuf_reads(number: int, text: bytes) -> None:
    model = onnx.ModelProto.FromString(b"\x28" + wire.varint(number >> 1) + wire.field(7, b""))
    assert model.model_version == number >> 1
    attribute = onnx.AttributeProto.FromString(wire.field(4, text))
    assert attribute.s == text


def _elsewhere(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=location, data_type=1, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return tensor


def test_data_is_found_wherever_tensors_are() -> None:
    """In attributes, bodies, functions, sparse tensors and what trains a model; and only there."""
    body = onnx.GraphProto(name="body", initializer=[_elsewhere("body")])
    inner = onnx.helper.make_node("If", ["c"], ["d"], then_branch=body, else_branch=body)
    outer = onnx.GraphProto(name="outer", node=[inner], initializer=[_elsewhere("outer")])
    node = onnx.helper.make_node("Loop", ["m"], ["y"], body=outer, value=_elsewhere("attribute"))
    node.attribute.add(name="many", type=9).tensors.append(_elsewhere("list"))
    node.attribute.add(name="graphs", type=10).graphs.append(
        onnx.GraphProto(name="g", initializer=[_elsewhere("graphs")])
    )
    node.metadata_props.add(key="location", value="metadata")
    model = onnx.ModelProto(graph=onnx.GraphProto(name="main", node=[node]))
    model.metadata_props.add(key="location", value="metadata")
    model.graph.initializer.append(_elsewhere("main"))
    model.graph.sparse_initializer.add(values=_elsewhere("values"), indices=_elsewhere("indices"))
    constant = onnx.helper.make_node("Constant", [], ["k"], value=_elsewhere("function"))
    model.functions.add(name="f", node=[constant])
    model.training_info.add(algorithm=onnx.GraphProto(initializer=[_elsewhere("training")]))
    found = list(parts.locations(memoryview(model.SerializeToString())))
    wanted = "main body body outer attribute list graphs values indices function training"
    assert sorted(found) == sorted(wanted.split())
