"""Memory without reading a weight: against bytes counted by hand, and against written files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper as nh
from onnx import parser

import onnxq
from onnxq.errors import OnnxqError
from onnxq.footprint import Footprint, Kind, footprint, kind
from onnxq.gpus import target
from onnxq.graph.cache import cache_values, generates
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.placement import place
from onnxq.recipe import presets

# An embedding that the vocabulary projection shares, and two layers.
TIED = """<ir_version: 10, opset_import: ["": 21]>
g (int64[B,S] input_ids) => (float[B,S,100] logits) {
    x = Gather(embedding, input_ids)
    a = MatMul(x, up)   b = Relu(a)   c = MatMul(b, down)   d = Add(c, bias)
    turned = Transpose<perm = [1, 0]>(embedding)   logits = MatMul(d, turned)
}"""


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    model = parser.parse_model(TIED)
    for name, shape in (
        ("embedding", (100, 64)),
        ("up", (64, 128)),
        ("down", (128, 64)),
        ("bias", (64,)),
    ):
        model.graph.initializer.append(nh.from_array(np.ones(shape, np.float32), name))
    onnx.save(model, tmp_path / "tied.onnx")
    return tmp_path / "tied.onnx"


def measured(path: Path, recipe: str, sm: str = "sm120") -> Footprint:
    model, _ = prepare(Model.load(path), 0)
    return footprint(model, place(model, presets()[recipe], target(sm)))


LAYERS = 64 * 128  # elements of either layer
REST = 2 * (100 * 64 + 64)


@pytest.mark.parametrize(
    ("recipe", "coded"),
    [
        ("int8-dynamic", LAYERS + 2 * 128 + LAYERS + 2 * 64),
        ("fp8-dynamic", LAYERS + 2 * 128 + LAYERS + 2 * 64),
        ("int8-weight-only", LAYERS + 2 * 128 + LAYERS + 2 * 64),
        # A layer of one block of 64 gets blocks of 32.
        ("int4-rtn", LAYERS // 2 + 2 * (2 * 128) + LAYERS // 2 + 2 * (2 * 64)),
        ("nvfp4", LAYERS // 2 + 4 * 128 + LAYERS // 2 + 8 * 64),
        ("mxfp8", LAYERS + 2 * 128 + LAYERS + 4 * 64),
    ],
)
def test_bytes_by_hand(tied: Path, recipe: str, coded: int) -> None:
    found = measured(tied, recipe)
    assert (found.coded, found.plain) == (coded, REST)
    assert found.weights == coded + REST
    assert found.full == 2 * 2 * LAYERS + REST


def test_a_weight_that_something_else_reads_stays_too(tied: Path) -> None:
    model = onnx.load(tied)
    node = onnx.helper.make_node("ReduceSum", ["up"], ["total"], keepdims=0)
    model.graph.node.append(node)
    model.graph.output.append(onnx.helper.make_tensor_value_info("total", 1, []))
    onnx.save(model, tied)
    assert measured(tied, "int8-dynamic").plain == REST + 2 * LAYERS


def test_a_weight_that_is_an_output_stays_too(tied: Path) -> None:
    model = onnx.load(tied)
    model.graph.output.append(onnx.helper.make_tensor_value_info("up", 1, [64, 128]))
    onnx.save(model, tied)
    assert measured(tied, "int8-dynamic").plain == REST + 2 * LAYERS


# Constants beside the weights, and norms that stay FP32, are not counted: 3 %.
@pytest.mark.parametrize("name", ["minilm", "smollm2-fp32"])
@pytest.mark.parametrize("recipe", ["fp8-dynamic", "int4-rtn", "nvfp4"])
def test_the_file_that_is_written_is_as_large(
    models: Path, tmp_path: Path, name: str, recipe: str
) -> None:
    source = models / name / "model.onnx"
    made = onnxq.quantize(source, tmp_path / "q.onnx", recipe=recipe, target="sm120")
    written = onnx.load(made.files[0], load_external_data=False)
    size = 0
    for tensor in written.graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        size += int(where.get("length", 0)) or len(tensor.SerializeToString())
    assert measured(source, recipe).weights == pytest.approx(size, rel=0.03)


@pytest.mark.parametrize("name", ["smollm2-fp32", "smollm2-torch", "smollm2-torch-decode"])
def test_the_cache_of_smollm2(models: Path, name: str) -> None:
    """30 layers, keys and values, 3 heads of 64: with a cache in the graph or without."""
    model, _ = prepare(Model.load(models / name / "model.onnx"), 0)
    assert generates(model) and cache_values(model) == 30 * 2 * 3 * 64
    assert kind(model) == Kind(generates=True, convolutional=False)


def test_kinds_of_models(models: Path, tied: Path) -> None:
    expected = {"minilm": Kind(False, False), "ppocr_rec": Kind(False, True)}
    for name, found in expected.items():
        assert kind(Model.load(models / name / "model.onnx")) == found
    assert kind(Model.load(tied)).generates
    assert measured(models / "minilm" / "model.onnx", "int8-dynamic").cache == 0
    assert measured(tied, "int8-dynamic").cache is None  # logits, but no attention that it knows


# q, k and v of one product; rotated by angles that are a product too; a shape read off another one.
FUSED = """<ir_version: 10, opset_import: ["": 21]>
g (int64[B,S] input_ids, float[B,S,1] positions) => (float[B,S,96] logits) {
    x = Gather(embedding, input_ids)   qkv = MatMul(x, w)
    q, k, v = Split<axis = 2>(qkv, sizes)
    angles = MatMul(positions, frequencies)   turn = Cos(angles)   turned = Mul(k, turn)
    other = MatMul(x, aside)   extent = Shape<start = 0, end = 2>(other)
    kv_heads = Concat<axis = 0>(extent, rest)
    q4 = Reshape(q, heads)   k4 = Reshape(turned, kv_heads)   v4 = Reshape(v, kv_heads)
    qt = Transpose<perm = [0, 2, 1, 3]>(q4)   kt = Transpose<perm = [0, 2, 3, 1]>(k4)
    vt = Transpose<perm = [0, 2, 1, 3]>(v4)
    scores = MatMul(qt, kt)   p = Softmax<axis = -1>(scores)   o = MatMul(p, vt)
    ot = Transpose<perm = [0, 2, 1, 3]>(o)   joined = Reshape(ot, flat)
    logits = MatMul(joined, out)
}"""


def fused(path: Path, text: str) -> Model:
    model = parser.parse_model(text)
    shapes = {
        "embedding": (96, 64),
        "w": (64, 64 + 32 + 32),
        "frequencies": (1, 32),
        "aside": (64, 48),
        "more": (64, 32),
        "out": (64, 96),
    }
    for name, shape in shapes.items():
        model.graph.initializer.append(nh.from_array(np.ones(shape, np.float32), name))
    for name, values in {
        "sizes": [64, 32, 32],
        "heads": [0, 0, 2, 32],
        "rest": [1, 32],
        "flat": [0, 0, 64],
    }.items():
        model.graph.initializer.append(nh.from_array(np.array(values, np.int64), name))
    onnx.save(model, path)
    return prepare(Model.load(path), 0)[0]


def test_the_cache_behind_one_product_of_q_k_and_v(tmp_path: Path) -> None:
    assert cache_values(fused(tmp_path / "m.onnx", FUSED)) == 32 + 32


def test_keys_of_several_layers_are_not_guessed_at(tmp_path: Path) -> None:
    """Added up from two layers, they could be cached in more than one way."""
    text = FUSED.replace("Reshape(turned,", "Reshape(both,").replace(
        "other = ", "second = MatMul(x, more)   both = Add(turned, second)   other = "
    )
    assert cache_values(fused(tmp_path / "m.onnx", text)) is None


def test_a_model_of_two_sequences_does_not_generate(tied: Path) -> None:
    """Masked language models give logits too."""
    model = onnx.load(tied)
    model.graph.input.append(onnx.helper.make_tensor_value_info("token_type_ids", 7, ["B", "S"]))
    onnx.save(model, tied)
    assert not generates(Model.load(tied))


def test_recommend_on_a_model(models: Path) -> None:
    found = onnxq.recommend(
        models / "smollm2-fp32" / "model.onnx",
        gpu="h100",
        workload="online",
        batch=5,
        accuracy_budget=0.005,
        seq_len=1000,
    )
    facts = found.report.facts
    assert facts["cache_bytes"] == 5 * 1000 * 30 * 2 * 3 * 64 * 2
    assert facts["gpus"] == 1 and facts["weight_bytes"] < 0.5 * facts["weight_bytes_in_16_bits"]
    assert found.advice is not None and found.advice.scheme.name.startswith("W4A16")
    assert [question for question, _ in found.advice.reasons] == [
        *("workload", "GPU", "concurrency", "headroom", "accuracy")
    ]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"gpu": "rtx 9999"}, "unknown GPU"),
        ({"workload": "sometimes"}, "unknown workload"),
        ({"batch": 0}, "out of range"),
        ({"seq_len": 0}, "out of range"),
        ({"accuracy_budget": 0.0}, "out of range"),
        ({"accuracy_budget": 1.0}, "out of range"),
    ],
)
def test_bad_questions(more: dict[str, object], message: str) -> None:
    asked: dict[str, object] = {"gpu": "h100", "workload": "online", **more}
    with pytest.raises(OnnxqError, match=message):
        onnxq.recommend(**asked)  # type: ignore[arg-type]
