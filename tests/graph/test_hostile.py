"""A file that is no model, or a damaged one, ends in one line: what, where, and what to do."""

from __future__ import annotations

import os
import random
import resource
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import graph_hostile as hostile
import graph_models as g
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto as T
from onnx import helper as h

from onnxq.errors import OnnxqError
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.graph.save import save
from onnxq.graph.wire import field, varint


def _refused(path: Path | str, *words: str, opset: int = 21) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(OnnxqError) as caught:
        prepare(Model.load(path), opset)
    error = caught.value
    assert error.hint, error
    assert "\n" not in str(error) and len(str(error)) < 1000
    for word in words:
        assert word in str(error), error
    return str(error)


def _refused_model(model: onnx.ModelProto, tmp_path: Path, *words: str, opset: int = 21) -> str:
    return _refused(g.saved(model, tmp_path / "bad.onnx"), "bad.onnx", *words, opset=opset)


def test_what_is_no_file(tmp_path: Path) -> None:
    _refused(tmp_path / "missing.onnx", "no such file", "missing.onnx")
    _refused(tmp_path / "no/folder/model.onnx", "no such file")
    _refused(str(tmp_path / "nul\0.onnx"), "no such file")
    _refused(tmp_path, "not a file")
    _refused("/dev/null", "not a file")
    os.mkfifo(tmp_path / "pipe.onnx")
    _refused(tmp_path / "pipe.onnx", "not a file")
    (tmp_path / "loop.onnx").symlink_to(tmp_path / "loop.onnx")
    _refused(tmp_path / "loop.onnx", "cannot read")
    _refused(tmp_path / ("x" * 300 + ".onnx"), "cannot read", "name too long")
    (tmp_path / "empty.onnx").touch()
    _refused(tmp_path / "empty.onnx", "is empty")


def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = g.saved(g.mlp(), tmp_path / "mine.onnx")
    path.chmod(0)
    if os.geteuid() == 0:
        for folder in (tmp_path, *tmp_path.parents[:2]):
            folder.chmod(0o755)
        os.seteuid(65534)
    try:
        _refused(path, "cannot read", "Permission denied")
    finally:
        if os.getuid() == 0:
            os.seteuid(0)


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04" + bytes(60),
        b"GGUF" + bytes(60),
        b'{"format": "json"}' * 9,
        b"\n" * 100,
        bytes(100),
        b"\x89PNG\r\n\x1a\n" + bytes(range(200)),
        b"\x0b\x0c" * 40,  # groups
        b"\x08" + b"\xff" * 10 + b"\x01",  # a number of more than 70 bits
        b"\x3a" + varint(2**63) + b"x" * 40,  # a graph longer than any file
        b"\x3a" + varint(2**70 - 1)[:10] + b"x" * 40,
        b"\x08\x08",  # a model of nothing
        b"\x08\x08\x3a\x00",  # an empty graph
    ],
    ids=lambda c: repr(c[:8]),
)
def test_wrong_content(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    _refused(path, "bad.onnx")


def test_random_bytes(tmp_path: Path) -> None:
    rng, path = random.Random(1), tmp_path / "bad.onnx"
    for size in (1, 2, 10, 1000, 100_000):
        path.write_bytes(rng.randbytes(size))
        _refused(path, "bad.onnx")


@pytest.mark.parametrize("make", [g.mlp, g.with_if, g.with_functions], ids=lambda m: m.__name__)
def test_truncation_anywhere(make: Callable[[], onnx.ModelProto], tmp_path: Path) -> None:
    """Cut between two fields of the model, a file can still be whole; then it must be accepted."""
    content = make().SerializeToString()
    path = tmp_path / "bad.onnx"
    accepted = 0
    for end in range(1, len(content), max(1, len(content) // 400)):
        path.write_bytes(content[:end])
        try:
            prepare(Model.load(path), 21)
            accepted += 1
        except OnnxqError as error:
            assert error.hint and "\n" not in str(error)
    assert accepted <= 2


LOCATIONS = {
    "": "outside",
    "/etc/passwd": "outside",
    "../secret.bin": "outside",
    "sub/../../secret.bin": "outside",
    "missing.bin": "No such file",
    ".": "outside",
    "folder": "not a regular file",
    "pipe": "not a regular file",
    "nul\0": "null",
    "n" * 300: "too long",
}


@pytest.mark.parametrize("location", LOCATIONS, ids=lambda s: repr(s[:20]))
@pytest.mark.parametrize("where", ["initializer", "constant", "body", "attribute", "sparse"])
def test_external_data_elsewhere(location: str, where: str, tmp_path: Path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(9000))
    folder = tmp_path / "in"
    (folder / "folder").mkdir(parents=True)
    (folder / "sub").mkdir()
    os.mkfifo(folder / "pipe")
    model = _with_external(where, {"location": location})
    _refused_model(model, folder, LOCATIONS[location])


EXTENTS: list[tuple[dict[str, str], str]] = [
    ({"offset": "-4"}, "needs 4096 bytes at -4"),
    ({"offset": "5000"}, "at 5000"),
    ({"offset": str(2**70)}, "truncated"),
    ({"length": "4095"}, "declared: 4095"),
    ({"length": str(2**70)}, "truncated"),
    ({"length": "-4096"}, "declared: -4096"),
    ({"offset": "zero"}, "zero"),
    ({"length": "9" * 5000}, "cannot read"),
    ({"offset": "0x10"}, "0x10"),
]


@pytest.mark.parametrize(("entries", "words"), EXTENTS, ids=lambda e: str(e)[:30])
def test_external_data_that_does_not_fit(
    entries: dict[str, str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(8000))
    model = _with_external("initializer", {"location": "w.bin", **entries})
    _refused_model(model, tmp_path, words)


def test_a_link_to_data_elsewhere_is_followed_but_no_link_to_a_device(tmp_path: Path) -> None:
    model = _with_external("initializer", {"location": "w.bin"})
    (tmp_path / "w.bin").symlink_to("/dev/zero")
    _refused_model(model, tmp_path, "not a regular file")


def _with_external(where: str, entries: dict[str, str]) -> onnx.ModelProto:
    """`with_if` with one tensor of 1024 floats made external."""
    model = g.with_if()
    then = model.graph.node[2].attribute[0].g
    if where == "initializer":
        tensor = model.graph.initializer[0]
    elif where == "constant":
        tensor = model.graph.node.add(op_type="Constant", output=["k"]).attribute.add().t
        model.graph.node[-1].attribute[0].name = "value"
        model.graph.node[-1].attribute[0].type = onnx.AttributeProto.TENSOR
    elif where == "body":
        tensor = then.initializer.add(name="extra")
    elif where == "attribute":
        attribute = then.node.add(op_type="Own", output=["o"], domain="d").attribute.add()
        attribute.name, attribute.type = "a", onnx.AttributeProto.TENSORS
        tensor = attribute.tensors.add()
    else:
        sparse = model.graph.sparse_initializer.add(dims=[4096])
        sparse.values.name = "sparse"
        sparse.indices.CopyFrom(h.make_tensor("at", T.INT64, [1024], range(1024)))
        tensor = sparse.values
    name = tensor.name
    tensor.CopyFrom(onnx.TensorProto(name=name, data_type=T.FLOAT, dims=[1024]))
    if where == "initializer":
        tensor.dims[:] = [32, 32]
    tensor.data_location = T.EXTERNAL
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return model


def _dims(*dims: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].dims[:] = dims

    return change


def _set_type(number: int) -> Callable[[onnx.ModelProto], None]:
    def change(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].data_type = number

    return change


def _cycle(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "d"


def _self(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "a"


def _body_cycle(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute[0].g.node[0].input[0] = "v"


def _made_twice(model: onnx.ModelProto) -> None:
    model.graph.node[3].output[0] = "a"


def _made_as_input(model: onnx.ModelProto) -> None:
    model.graph.node[3].output[0] = "x"


def _two_weights(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].name = "w1"


def _two_inputs(model: onnx.ModelProto) -> None:
    model.graph.input.append(model.graph.input[0])


def _unknown_input(model: onnx.ModelProto) -> None:
    model.graph.node[1].input[1] = "ghost"


def _unknown_in_body(model: onnx.ModelProto) -> None:
    model.graph.node[2].attribute[0].g.node[0].input[0] = "ghost"


def _unknown_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].name = "ghost"


def _short(model: onnx.ModelProto) -> None:
    model.graph.initializer[2].raw_data = b"abc"


def _no_opset(model: onnx.ModelProto) -> None:
    model.ClearField("opset_import")


def _bad_arity(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 9
    model.graph.node[0].input.append("x")


def _no_import(model: onnx.ModelProto) -> None:
    model.graph.node[0].domain = "nowhere"


BROKEN: list[tuple[Callable[[], onnx.ModelProto], Callable[[onnx.ModelProto], None], str]] = [
    (g.mlp, _dims(-1, 64), "negative dimension"),
    (g.mlp, _dims(2**62, 2**62, 4), "needs"),
    (g.mlp, _dims(2**63 - 1), "needs"),
    (g.mlp, _dims(2**32, 2**32), "needs"),
    (g.mlp, _set_type(0), "element type 0"),
    (g.mlp, _set_type(99), "element type 99"),
    (g.mlp, _set_type(T.STRING), "strings"),
    (g.mlp, _short, "'s' holds 3 bytes"),
    (g.mlp, _cycle, "cycle"),
    (g.mlp, _self, "cycle"),
    (g.with_if, _body_cycle, "cycle"),
    (g.mlp, _made_twice, "'a' is made twice"),
    (g.mlp, _made_as_input, "'x' is made twice"),
    (g.mlp, _two_weights, "two initializers are named 'w1'"),
    (g.mlp, _two_inputs, "two inputs are named 'x'"),
    (g.mlp, _unknown_input, "node 1 (Mul) reads 'ghost'"),
    (g.with_if, _unknown_in_body, "reads 'ghost'"),
    (g.mlp, _unknown_output, "output 'ghost'"),
    (g.mlp, _no_opset, "opset_import"),
    (g.mlp, _bad_arity, "MatMul"),
    (g.mlp, _no_import, "inference"),
]


@pytest.mark.parametrize(
    ("make", "change", "words"), BROKEN, ids=[f"{c.__qualname__} {w}" for _, c, w in BROKEN]
)
def test_broken_models(
    make: Callable[[], onnx.ModelProto],
    change: Callable[[onnx.ModelProto], None],
    words: str,
    tmp_path: Path,
) -> None:
    model = make()
    change(model)
    _refused_model(model, tmp_path, words)


@pytest.mark.parametrize(
    "name", [b"batch", b"then_g", b"only_then", b"p0", b"Relu", b"ow", b"vv", b"the whole"]
)
def test_names_that_are_no_text(name: bytes, tmp_path: Path) -> None:
    model = g.with_if()
    model.graph.name = "the whole"
    model.graph.input[1].type.tensor_type.shape.dim[0].dim_param = "batch"
    model.graph.node[0].domain, model.graph.node[1].overload = "ow", "vv"
    content = model.SerializeToString()
    assert name in content
    (tmp_path / "bad.onnx").write_bytes(content.replace(name, b"\xff" * len(name)))
    if name == b"then_g":  # of a body: nobody asks for it
        Model.load(tmp_path / "bad.onnx")
    else:
        _refused(tmp_path / "bad.onnx", "not text")


def test_comments_that_are_no_text_pass(tmp_path: Path) -> None:
    """Doc strings and metadata in Latin-1 are nobody's names."""
    model = g.mlp()
    for part in (model, model.graph, model.graph.node[0]):
        part.doc_string = "caf."
        part.metadata_props.add(key="k", value="caf.")
    model.producer_name = "caf."
    content = model.SerializeToString().replace(b"caf.", b"caf\xe9")
    (tmp_path / "in.onnx").write_bytes(content)
    prepared, _ = prepare(Model.load(tmp_path / "in.onnx"), 21)
    assert prepared.metadata(prepared.graph.nodes[0]) == {}
    written = save(prepared, tmp_path / "out.onnx")[0].read_bytes()
    assert written.count(b"caf\xe9") == 7


def _nested(depth: int) -> onnx.ModelProto:
    graph = h.make_graph(
        [h.make_node("Relu", ["x"], ["y0"])], "g", [], [h.make_empty_tensor_value_info("y0")]
    )
    for level in range(1, depth):
        node = h.make_node("If", ["c"], [f"y{level}"], then_branch=graph, else_branch=graph)
        # One branch each, or the model would double at every level.
        node.attribute[1].g.CopyFrom(
            h.make_graph([h.make_node("Neg", ["x"], ["n"])], "e", [], graph.output[:0])
        )
        node.attribute[1].g.output.add(name="n")
        output = h.make_empty_tensor_value_info(f"y{level}")
        graph = h.make_graph([node], f"g{level}", [], [output])
    graph.input.append(h.make_tensor_value_info("c", T.BOOL, []))
    graph.input.append(h.make_tensor_value_info("x", T.FLOAT, [2]))
    return h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)


def test_bodies_as_deep_as_protobuf_allows_pass_and_deeper_ones_are_refused(tmp_path: Path) -> None:
    path = g.saved(_nested(30), tmp_path / "deep.onnx")
    prepared, _ = prepare(Model.load(path), 21)
    assert prepared.export().graph.node[0].op_type == "If"
    deeper = b""
    for _ in range(200):  # a graph in an attribute of a node of a graph ...
        deeper = field(1, field(5, field(6, deeper)))
    (tmp_path / "bad.onnx").write_bytes(field(7, deeper))
    _refused(tmp_path / "bad.onnx", "not an ONNX model")


def _functions(calls: dict[str, list[str]]) -> onnx.ModelProto:
    """Functions by what they call; the model calls the first."""
    imports = [h.make_opsetid("", 18), h.make_opsetid("f", 1)]
    functions = []
    for name, called in calls.items():
        nodes = [h.make_node(c, ["x"], [f"y{i}"], domain="f") for i, c in enumerate(called)]
        nodes.append(h.make_node("Relu", ["x"], ["r"]))
        functions.append(h.make_function("f", name, ["x"], ["r"], nodes, imports))
    x, y = (h.make_tensor_value_info(n, T.FLOAT, [1]) for n in "xy")
    graph = h.make_graph([h.make_node(next(iter(calls)), ["x"], ["y"], domain="f")], "g", [x], [y])
    return h.make_model(graph, functions=functions, opset_imports=imports, ir_version=9)


def test_functions_without_end(tmp_path: Path) -> None:
    _refused_model(_functions({"a": ["b"], "b": ["a"]}), tmp_path, "calls itself")
    names = [f"f{i}" for i in range(40)]
    laughs = {a: [b, b] for a, b in pairwise(names)} | {names[-1]: []}
    _refused_model(_functions(laughs), tmp_path, "unfold")
    names = [f"f{i}" for i in range(3000)]
    chain = {a: [b] for a, b in pairwise(names)} | {names[-1]: []}
    _refused_model(_functions(chain), tmp_path, "deep")
    twice = _functions({"a": []})
    twice.functions.append(twice.functions[0])
    _refused_model(twice, tmp_path, "one name")


def test_a_claim_of_any_size_costs_nothing(tmp_path: Path) -> None:
    """Neither a tensor that claims 2^60 bytes nor a sparse one is made room for."""
    sparse = g.with_everything()
    sparse.graph.sparse_initializer[0].dims[:] = [2**40, 2**40]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    model = Model.load(g.saved(sparse, tmp_path / "sparse.onnx"))
    with pytest.raises(OnnxqError, match="does not fit its shape"):
        next(c for c in model.constants() if c.name == "sparse")._values.load()
    large = g.mlp()
    large.graph.initializer[0].dims[:] = [2**30, 2**30]
    _refused_model(large, tmp_path, "needs")
    assert time.monotonic() - started < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_many_bodies_take_no_time_to_speak_of(tmp_path: Path) -> None:
    """Each body is checked against the names around it without copying them."""
    branch = h.make_graph(
        [h.make_node("Relu", ["x"], ["r"])], "b", [], [h.make_empty_tensor_value_info("r")]
    )
    nodes = [
        h.make_node("If", ["c"], [f"y{i}"], then_branch=branch, else_branch=branch)
        for i in range(1000)
    ]
    inputs = [
        h.make_tensor_value_info("c", T.BOOL, []),
        h.make_tensor_value_info("x", T.FLOAT, [1]),
    ]
    graph = h.make_graph(nodes, "g", inputs, [h.make_tensor_value_info("y1", T.FLOAT, [1])])
    model = h.make_model(graph, opset_imports=[h.make_opsetid("", 17)], ir_version=8)
    started = time.monotonic()
    prepare(Model.load(g.saved(model, tmp_path / "many.onnx")), 21)
    assert time.monotonic() - started < 10  # 2 s on a busy core


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), which=st.integers(0, len(hostile.SOURCES) - 1))
def test_damaged_bytes_never_crash(seed: int, which: int, tmp_path: Path) -> None:
    content = hostile.SOURCES[which]().SerializeToString()
    _survives(hostile.damaged_bytes(content, random.Random(seed)), tmp_path)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32), which=st.integers(0, len(hostile.SOURCES) - 1))
def test_damaged_fields_never_crash(seed: int, which: int, tmp_path: Path) -> None:
    damaged = hostile.damaged_fields(hostile.SOURCES[which](), random.Random(seed))
    _survives(damaged.SerializeToString(), tmp_path)


def _survives(content: bytes, folder: Path) -> None:
    path = folder / "damaged.onnx"
    path.write_bytes(content)
    try:
        hostile.survive(path)
    except OnnxqError as error:
        assert "\n" not in str(error)
