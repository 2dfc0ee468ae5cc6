"""Lint on whole files: weights stay unread, broken graphs are told of, the command line's codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from lint_cases import PATIENTS, look, saved
from onnx import TensorProto, helper

import onnxq
import onnxq.graph.save
from onnxq.graph.weights import StoredValues
from onnxq.linting.finding import Severity
from tools.lint_truth.building import Graph, product
from tools.lint_truth.forms import CASES

Cli = Callable[..., "object"]


def test_weights_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales are, wherever they lie; a weight beside them is not, in or out of the file."""
    g = Graph()
    x = g.quantized(g.input("x", [8, 512]))
    model = product(g, x, g.weight((512, 1024), "int8", np.full(1024, 0.0), axis=1))
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    read = StoredValues.load

    def load(values: StoredValues) -> np.ndarray:
        assert values.nbytes < 8192, values.tensor.name
        return np.asarray(read(values))

    monkeypatch.setattr(StoredValues, "load", load)
    assert "scale-value" in {f.rule for f in look(path).findings}
    monkeypatch.setattr(StoredValues, "load", read)
    assert "scale-value" in {f.rule for f in look(path).findings}


def test_a_graph_that_fails_shape_inference_is_looked_at(tmp_path: Path) -> None:
    g = Graph()
    x = g.quantized(g.input("x", [2, 48, 64]))
    y = g.op("MatMul", [x, g.weight((64, 96), "uint8")], "product")
    g.output(g.op("Reshape", [y, g.integers(7, 7, 7)]))
    g.outputs[0].type.tensor_type.elem_type = TensorProto.INT64
    found = look(saved(g.model(), tmp_path / "m.onnx"))
    assert "uint8" in {f.rule for f in found.findings}


def test_bodies_and_functions_are_looked_into(tmp_path: Path) -> None:
    found = look(saved(CASES["Foo in an If"].model, tmp_path / "m.onnx")).findings
    assert [f.rule for f in found] == ["operator"]
    assert "in a body of If" in found[0].reason
    g = Graph("fp32")
    g.output(g.op("Own", [g.input("x", [4, 16])], "call", "my.domain"))
    model = g.model()
    body = [helper.make_node("Foo", ["a"], ["b"], name="inside")]
    made = helper.make_function("my.domain", "Own", ["a"], ["b"], body, model.opset_import)
    model.functions.append(made)
    (only,) = look(saved(model, tmp_path / "f.onnx")).findings
    assert only.rule == "operator" and "Foo" in only.reason


def test_what_only_a_profile_decides_is_a_note(tmp_path: Path) -> None:
    g = Graph()
    tensors = [g.input(name, ["B", 4, "S", 64]) for name in "qkv"]
    tensors[1] = g.op("Transpose", [tensors[1]], perm=[0, 1, 3, 2])
    q, k, v = (g.quantized(t, "fp8") for t in tensors)
    p = g.quantized(g.op("Softmax", [g.op("MatMul", [q, k], "scores")]), "fp8", 1 / 448)
    g.output(g.op("MatMul", [p, v], "context"))
    found = look(saved(g.model(), tmp_path / "m.onnx"), ignore=["portability"])
    assert not found.findings
    assert any("starts at 32 or more" in n and "onnxq build" in n for n in found.notes)


@pytest.mark.parametrize(
    ("name", "rules"),
    {
        "mo_bert_int8": {"raw-sums", "residual-quantized"},
        "mo_bert_fp8": {"raw-sums", "residual-quantized", "onnxruntime-layout", "onnxruntime-fp8"},
        "mo_cnn_int8": {"one-operand", "convolution", "thin"},
        "nncf_bert_wINT8_SYM": {"scale-value", "in-between", "thin"},
    }.items(),
)
def test_what_peers_write(name: str, rules: set[str]) -> None:
    assert {f.rule for f in look(PATIENTS / f"{name}.onnx").findings} == rules


def test_quantize_looks_at_its_own_output(tmp_path: Path) -> None:
    """An UNet's block with 16 keys: FP8 attention is asked for, and cannot fuse."""
    data = {"ids": np.zeros((2, 16), np.int64), "mask": np.ones((2, 16), np.int64)}
    np.savez(tmp_path / "d.npz", **data)
    model = onnx.load(PATIENTS / "bert.onnx")
    for value in model.graph.input:
        for dim, size in zip(value.type.tensor_type.shape.dim, (1, 16), strict=True):
            dim.ClearField("dim_param")
            dim.dim_value = size
    path = saved(model, tmp_path / "m.onnx")
    made = onnxq.quantize(path, recipe="fp8-attention", calib=tmp_path / "d.npz")
    found = made.report.facts["lint"]
    assert {f["rule"] for f in found if f["severity"] == Severity.SLOW.value} <= {"attention-size"}
    plain = onnxq.quantize(path, recipe="int8-dynamic")
    assert plain.report.facts["lint"] == []
    assert not [n for n in plain.report.notes if n.startswith("lint")]


def test_what_quantize_says_is_what_lint_says_of_the_file(tmp_path: Path) -> None:
    written = tmp_path / "q.onnx"
    made = onnxq.quantize(PATIENTS / "bert.onnx", written, recipe="fp8-dynamic", precision="keep")
    assert made.report.facts["lint"] == [f.as_dict() for f in look(written).findings] != []


def test_another_run_on_one_output_is_no_concern(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output is looked at as it was written, whatever lies there by then."""
    written = tmp_path / "q.onnx"

    def saved_and_replaced(*given: object, **options: object) -> list[Path]:
        files = save(*given, **options)  # type: ignore[arg-type]
        written.write_bytes(b"another run's, half written")
        return files

    save = onnxq.graph.save.save
    monkeypatch.setattr("onnxq.graph.save.save", saved_and_replaced)
    made = onnxq.quantize(PATIENTS / "bert.onnx", written, recipe="int8-dynamic")
    assert made.report.facts["lint"] == []


def test_exit_codes_and_json(cli: Cli, tmp_path: Path) -> None:
    sound = saved(CASES["int8 linear"].model, tmp_path / "sound.onnx")
    ill = saved(CASES["uint8 weight, zero point 0"].model, tmp_path / "ill.onnx")
    assert cli("lint", sound).returncode == 0  # type: ignore[attr-defined]
    told = cli("lint", ill)
    assert told.returncode == 1  # type: ignore[attr-defined]
    assert "refused: uint8" in told.stdout and "cure:" in told.stdout  # type: ignore[attr-defined]
    assert "onnxq build" in told.stdout  # type: ignore[attr-defined]
    as_json = cli("lint", ill, "--json")
    assert as_json.returncode == 1  # type: ignore[attr-defined]
    content = json.loads(as_json.stdout)  # type: ignore[attr-defined]
    (finding,) = content["findings"]
    assert finding["rule"] == "uint8" and finding["severity"] == "refused"
    assert set(finding) >= {"node", "operator", "reason", "cure", "fixable"}
    assert cli("lint", ill, "--ignore", "refused").returncode == 0  # type: ignore[attr-defined]
    for words in (["lint", tmp_path / "none.onnx"], ["lint", ill, "--target", "sm1"]):
        bad = cli(*words)
        assert bad.returncode == 2 and "Traceback" not in bad.stderr  # type: ignore[attr-defined]
        assert bad.stderr.count("\n") == 1  # type: ignore[attr-defined]


def test_fix_from_the_command_line(cli: Cli, tmp_path: Path) -> None:
    ill = saved(CASES["int8 channels"].model, tmp_path / "ill.onnx")
    done = cli("lint", ill, "--fix")
    assert done.returncode == 0, done.stdout  # type: ignore[attr-defined]
    assert "fixed" in done.stdout  # type: ignore[attr-defined]
    assert cli("lint", tmp_path / "ill.fixed.onnx").returncode == 0  # type: ignore[attr-defined]


def loads(model: onnx.ModelProto, moves: bool) -> bool:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    if not moves:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    try:
        ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception:
        return False
    return True


ORT_VERSION = tuple(map(int, ort.__version__.split(".")[:2]))


@pytest.mark.skipif(ORT_VERSION < (1, 31), reason="seen with ONNX Runtime 1.31 and 1.32")
def test_what_onnxruntime_cannot_load_is_mostly_told() -> None:
    """Of the forms that fail by default and load without its Q/DQ passes 23 are told rightly.

    1.32 loads FP8: of its failures all 8 are told.
    """
    rules, least, most = (
        ("onnxruntime-layout", 8, 0) if ORT_VERSION >= (1, 32) else ("onnxruntime", 23, 4)
    )
    right = wrong = 0
    for case in CASES.values():
        fails = not loads(case.model, True) and loads(case.model, False)
        told = any(rule.startswith(rules) for rule in case.rules)
        if fails or told:
            right += fails and told
            wrong += fails != told
    assert right >= least and wrong <= most, (right, wrong)
