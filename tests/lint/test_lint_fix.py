"""--fix cures what it says, changes no number but by a rounding, and never the input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from lint_cases import PATIENTS, look, saved

import onnxq
from onnxq.errors import OnnxqError
from onnxq.linting.fix import CURES
from tools.lint_truth.building import Graph, product
from tools.lint_truth.forms import CASES

Feeds = dict[str, np.ndarray]


def outputs(path: Path) -> list[np.ndarray]:
    """What ONNX Runtime computes of a file as it stands, on fixed random inputs."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    made, feeds = np.random.default_rng(0), {}
    for entry in session.get_inputs():
        shape = [d if isinstance(d, int) else 2 for d in entry.shape]
        dtype = np.float16 if "float16" in entry.type else np.float32
        feeds[entry.name] = made.normal(size=shape).astype(dtype)
    return [np.asarray(o, np.float64) for o in session.run(None, feeds)]


def fixed(model: onnx.ModelProto, folder: Path) -> tuple[Path, Path]:
    source = saved(model, folder / "m.onnx")
    before = source.read_bytes()
    result = onnxq.lint(source, folder / "f.onnx", fix=True)
    assert source.read_bytes() == before
    assert result.report.edits
    return source, folder / "f.onnx"


CURED = sorted(
    name
    for name, case in CASES.items()
    if case.rules & set(CURES) and not case.rules - set(CURES) - {"onnxruntime-fp8"}
)


@pytest.mark.parametrize("name", CURED)
def test_a_cured_rule_is_not_tripped_any_more(name: str, tmp_path: Path) -> None:
    source = saved(CASES[name].model, tmp_path / "m.onnx")
    result = onnxq.lint(source, tmp_path / "f.onnx", fix=True)
    left = {f.rule for f in result.findings}
    if not result.files:  # nothing was cured: nothing is written, and all is told
        assert left == CASES[name].rules
        assert not (tmp_path / "f.onnx").exists()
    else:
        verbs = {e.verb for e in result.report.edits}
        assert not verbs & left
        assert left <= CASES[name].rules


def test_most_forms_of_curable_rules_are_cured(tmp_path: Path) -> None:
    cured = 0
    for index, name in enumerate(CURED):
        source = saved(CASES[name].model, tmp_path / f"{index}.onnx")
        cured += bool(onnxq.lint(source, tmp_path / f"f{index}.onnx", fix=True).files)
    assert cured >= 0.8 * len(CURED)


@pytest.mark.parametrize("codes", ["constant", "behind QuantizeLinear", "Gemm with a bias"])
def test_scales_behind_the_product_change_a_rounding_of_fp16(codes: str, tmp_path: Path) -> None:
    g = Graph()
    x = g.quantized(g.input("x", [8, 64]))
    scales = np.random.default_rng(3).uniform(0.002, 0.02, 96)
    if codes == "behind QuantizeLinear":
        w = g.quantized(g.floats(64, 96), "int8", scales, axis=1)
    else:
        w = g.weight((64, 96), "int8", scales, axis=1)
    inputs = [x, w, *([g.floats(96)] if "bias" in codes else [])]
    g.output(g.op("Gemm" if "bias" in codes else "MatMul", inputs, "product"))
    source, cured = fixed(g.model(), tmp_path)
    assert {f.rule for f in look(source).findings} == {"raw-sums"}
    assert not look(cured).findings
    (before,), (after,) = outputs(source), outputs(cured)
    # Both round the dequantized weight, the ratio and the result to FP16: 2^-11 each, of sums.
    assert np.abs(before - after).max() <= 2**-9 * np.abs(before).max()
    assert np.abs(before - after).max() > 0  # the ratios were really moved


def test_layers_of_one_tensor_get_one_scale(tmp_path: Path) -> None:
    _, cured = fixed(CASES["fp8 q, k, v, a scale each"].model, tmp_path)
    graph = onnx.load(cured).graph
    values = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    makers = {n.output[0]: n for n in graph.node}
    products = [n for n in graph.node if n.op_type == "MatMul"]
    found = {float(values[makers[n.input[1]].input[1]]) for n in products}
    assert len(products) == 3 and len(found) == 1


@pytest.mark.parametrize(
    "name", ["uint8 weight, zero point 128", "uint8 activation, zero point 128"]
)
def test_signed_codes_stand_for_the_same_numbers(name: str, tmp_path: Path) -> None:
    source, cured = fixed(CASES[name].model, tmp_path)
    for before, after in zip(outputs(source), outputs(cured), strict=True):
        np.testing.assert_array_equal(before, after)
    types = {t.data_type for t in onnx.load(cured).graph.initializer}
    assert onnx.TensorProto.UINT8 not in types


def test_a_bias_comes_out_in_floating_point(tmp_path: Path) -> None:
    g = Graph("fp32")
    x = g.quantized(g.input("x", [2, 32, 8, 8]))
    scales = np.random.default_rng(1).uniform(1e-4, 1e-3, 64)
    bias = g.op("DequantizeLinear", [g.codes((64,), "int32"), g.constant(scales)], axis=0)
    g.output(g.op("Conv", [x, g.weight((64, 32, 3, 3)), bias], "product"))
    source, cured = fixed(g.model(), tmp_path)
    for before, after in zip(outputs(source), outputs(cured), strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-6, atol=1e-6)


def test_types_that_mix_are_cast_to_the_widest(tmp_path: Path) -> None:
    g = Graph()
    left, right = g.input("x", [4, 16]), g.input("z", [4, 16], "fp32")
    g.output(g.op("Concat", [left, right], axis=0), "fp32")
    _, cured = fixed(g.model(), tmp_path)
    assert not look(cured).findings
    outputs(cured)  # ONNX Runtime refuses what mixes


def test_qdq_that_gain_nothing_are_taken_off(tmp_path: Path) -> None:
    for name in ("int8 attention", "fp16 attention, quantized mask", "fp8 q only"):
        _, cured = fixed(CASES[name].model, tmp_path)
        ops = {n.op_type for n in onnx.load(cured).graph.node}
        assert not ops & {"QuantizeLinear", "DequantizeLinear"}, name


def test_residual_additions_of_a_peer_are_freed(tmp_path: Path) -> None:
    result = onnxq.lint(PATIENTS / "mo_bert_int8.onnx", tmp_path / "f.onnx", fix=True)
    assert {e.verb for e in result.report.edits} == {"raw-sums", "residual-quantized"}
    assert not result.findings and result.passed


def test_the_input_is_never_the_output(tmp_path: Path) -> None:
    source = saved(CASES["int8 channels"].model, tmp_path / "m.onnx")
    before = source.read_bytes()
    with pytest.raises(OnnxqError, match="the output is the input"):
        onnxq.lint(source, source, fix=True)
    (tmp_path / "link.onnx").symlink_to(source)
    with pytest.raises(OnnxqError, match="the output is the input"):
        onnxq.lint(source, tmp_path / "link.onnx", fix=True)
    assert source.read_bytes() == before
    with pytest.raises(OnnxqError, match="-o without --fix"):
        onnxq.lint(source, tmp_path / "f.onnx")


def test_what_is_sound_is_not_written(tmp_path: Path) -> None:
    source = saved(CASES["int8 linear"].model, tmp_path / "m.onnx")
    result = onnxq.lint(source, fix=True)
    assert result.passed and not result.files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx"]


def test_a_fixed_file_keeps_its_products(tmp_path: Path) -> None:
    g = Graph()
    x = g.quantized(g.input("x", [2, 48, 64]))
    model = product(g, x, g.weight((64, 96), "int8", np.full(96, 0.01), axis=1))
    _, cured = fixed(model, tmp_path)
    assert [n.name for n in onnx.load(cured).graph.node if n.op_type == "MatMul"] == ["product"]
