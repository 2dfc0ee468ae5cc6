"""Nodes that do not fit their operators are refused when a model is read, as ONNX Runtime would."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import parser

from onnxq.errors import OnnxqError
from onnxq.graph.model import Model

WRONG = {
    "y = MatMul(x)": "has 1 inputs; the operator has 2",
    "y = MatMul(x, x, x)": "has 3 inputs; the operator has 2",
    "y = Relu()": "has 0 inputs; the operator has 1",
    "y = Conv(x)": "has 1 inputs; the operator has 2 or more",
    "y, z = Relu(x)": "has 2 outputs; the operator has 1",
    "y = Softmax <axis = 1> (x, x)": "has 2 inputs",
    'y = Softmax <axis = "last"> (x)': "'axis' of another type",
    "y = Cast(x)": "lacks the attribute 'to'",
    "y = Concat(x, x)": "lacks the attribute 'axis'",
    "y = Gemm <alpha = 2> (x, x)": "'alpha' of another type",
    "y = Where(x, , x)": "leaves out one of its inputs, which the operator needs: X",
    "y = Transpose <perm = 1.0> (x)": "'perm' of another type",
    "y = DequantizeLinear <axis = [1]> (x, x)": "'axis' of another type",
}
RIGHT = [
    "y = Clip(x, , x)",  # what is optional may be left out
    "y = Concat <axis = 0> (x, x, x, x, x)",
    "y = Sum(x)",
    "y, mask = Dropout(x)",
    "y = my.domain.MatMul(x)",  # another operator of that name
    "y = NoSuchOperator(x)",  # of a plugin
    'y = Relu <nobody_knows = "it"> (x)',
    "y = Constant <value_float = 1.0> ()",
    "y = LSTM <hidden_size = 3> (x, x, x, , , x)",
]


def _written(path: Path, node: str, opset: int = 19) -> Path:
    model = parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": {opset}, "my.domain": 1]>
        g (float[2, 2] x) => (float[2, 2] y) {{ [culprit] {node} }}"""
    )
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("node", WRONG)
def test_what_does_not_fit_is_named(node: str, tmp_path: Path) -> None:
    path = _written(tmp_path / "m.onnx", node)
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(onnx.load(path))
    with pytest.raises(OnnxqError) as caught:
        Model.load(path)
    assert str(caught.value).startswith(f"{path}: node 'culprit' (")
    assert WRONG[node] in str(caught.value)


@pytest.mark.parametrize("node", RIGHT)
def test_what_fits_or_is_unknown_passes(node: str, tmp_path: Path) -> None:
    assert Model.load(_written(tmp_path / "m.onnx", node)).opset == 19


def test_a_node_in_a_body_is_named_too(tmp_path: Path) -> None:
    model = parser.parse_model(
        """<ir_version: 8, opset_import: ["": 19]> g (bool c, float[2] x) => (float[2] y) {
            y = If(c) < then_branch = a () => (float[2] p) { [inner] p = MatMul(x) },
                        else_branch = b () => (float[2] q) { q = Relu(x) } > }"""
    )
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(OnnxqError, match=r"node 'inner' \(MatMul\) has 1 inputs"):
        Model.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("opset", [99, 2**31, 2**63 - 1, -1, -(2**63)])
def test_versions_that_do_not_exist(opset: int, tmp_path: Path) -> None:
    model = onnx.load(_written(tmp_path / "m.onnx", "y = Relu(x)"))
    model.opset_import[0].version = opset
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(OnnxqError, match=f"uses version {opset} of ONNX's operators.*update"):
        Model.load(tmp_path / "m.onnx")


def test_operators_that_are_no_longer_pass_as_they_are(tmp_path: Path) -> None:
    """Upsample has no definition to speak of from opset 10 on; TensorRT still takes it."""
    path = _written(tmp_path / "m.onnx", "y = Upsample(x, x, x, x)", 10)
    assert Model.load(path).opset == 10
