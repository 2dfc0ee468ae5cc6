"""Largest magnitudes of constants: what was found follows rescalings, or is looked for anew."""

from __future__ import annotations

from pathlib import Path

import graph_models as g
import numpy as np
import onnx
import pytest

from onnxq.graph.edit import Editor
from onnxq.graph.model import Model
from onnxq.graph.query import ConstantOperand, constant_operand
from onnxq.graph.rescale import largest, rescale
from onnxq.graph.scaling import peaks
from onnxq.graph.weights import StoredValues, original

RNG = np.random.default_rng(3)


def _model(folder: Path, layout: str = "k") -> Model:
    """A layer; its weight as it is stored (k), behind a Transpose (t) or a Cast (c)."""
    k, n = (48, 32) if layout != "t" else (32, 48)
    read = {"k": "y = MatMul(x, w)", "t": "k = Transpose(w) y = MatMul(x, k)"}
    read["c"] = "h = Cast <to = 1> (w) y = MatMul(x, h)"
    proto = g.parsed(
        f"""<ir_version: 10, opset_import: ["": 18]>
        g (float[n, 48] x) => (float[n, 32] y) {{ {read[layout]} }}""",
        g.weight("w", k, n, dtype=np.float16 if layout == "c" else np.float32),
    )
    return Model.load(g.saved(proto, folder / f"{layout}.onnx"))


def _operand(model: Model) -> ConstantOperand:
    (layer,) = [n for n in model.graph.nodes if n.op == "MatMul"]
    found = constant_operand(layer, 1)
    assert found is not None
    return found


def _scaled(model: Model, factor: np.ndarray) -> None:
    (layer,) = [n for n in model.graph.nodes if n.op == "MatMul"]
    rescale(Editor(model), layer, 1, factor)


def _check(model: Model) -> None:
    """What is found is the largest of the values that are read."""
    operand = _operand(model)
    values = np.abs(operand.load().astype(np.float64))
    for kept in ((True, False), (False, True), (False, False), (True, True)):
        axes = tuple(i for i, keep in enumerate(kept) if not keep)
        wanted = values.max(axis=axes, keepdims=True)
        np.testing.assert_array_equal(peaks(operand, kept), wanted)


@pytest.mark.parametrize("layout", ["k", "t", "c"])
def test_the_largest_follow_every_rescaling(tmp_path: Path, layout: str) -> None:
    model = _model(tmp_path, layout)
    _check(model)
    for shape in ((48, 1), (1, 32), (48, 1), (1, 1), (48, 32)):
        _scaled(model, RNG.lognormal(0, 1, shape))
        _check(model)


@pytest.mark.filterwarnings("error")
def test_nan_is_the_largest_of_its_channel_and_no_warning(tmp_path: Path) -> None:
    values = RNG.standard_normal((48, 32)).astype(np.float32)
    values[3, 5] = np.nan
    proto = g.parsed(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[n, 48] x) => (float[n, 32] y) { y = MatMul(x, w) }""",
        onnx.numpy_helper.from_array(values, "w"),
    )
    model = Model.load(g.saved(proto, tmp_path / "nan.onnx"))
    channels = np.arange(48)[:, None] // 2  # two rows a channel
    wanted = np.abs(values).reshape(24, 64).max(axis=1)
    assert np.isnan(wanted[1]) and np.isnan(wanted).sum() == 1
    np.testing.assert_array_equal(largest(_operand(model), channels, 24), wanted)


def test_what_is_known_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(tmp_path)
    read: list[str] = []
    load = StoredValues.load
    monkeypatch.setattr(StoredValues, "load", lambda v: read.append(v.tensor.name) or load(v))
    rows, columns = (True, False), (False, True)
    peaks(_operand(model), rows)
    peaks(_operand(model), rows)
    assert read == ["w"]
    _scaled(model, RNG.lognormal(0, 1, (48, 1)))
    peaks(_operand(model), rows)  # all of a row is multiplied alike
    assert read == ["w"]
    before = peaks(_operand(model), columns)
    assert read == ["w", "w"]  # of each column something else may be the largest now
    _scaled(model, np.full((1, 32), 2.0))
    np.testing.assert_array_equal(peaks(_operand(model), columns), 2 * before)
    assert read == ["w", "w"]


@pytest.mark.parametrize("rank", [1, 2])
def test_a_larger_constant_is_looked_at_anew(tmp_path: Path, rank: int) -> None:
    """One value that is repeated for channels with factors of their own, along a new axis too."""
    proto = g.parsed(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[n, 32] x) => (float[n, 32] y) { y = Mul(x, w) }""",
        onnx.numpy_helper.from_array(np.full((1,) * rank, -3, np.float32), "w"),
    )
    model = Model.load(g.saved(proto, tmp_path / "m.onnx"))
    (layer,) = model.graph.nodes
    operand = constant_operand(layer, 1)
    assert operand is not None and peaks(operand, (False, True)[-rank:]) == 3
    s = np.exp2(np.arange(32.0) % 5).reshape(1, 32)
    rescale(Editor(model), layer, 1, s)
    now = constant_operand(layer, 1)
    assert now is not None
    np.testing.assert_array_equal(peaks(now, (False, True)), 3 * s)
    np.testing.assert_array_equal(original(now.constant), -3 * s)
