"""The recipes with SmoothQuant through the whole spine, on small graphs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_graphs import Net, initializer, operators, recipe, run, snr

import onnxq
from onnxq.algorithms import smoothquant
from onnxq.errors import OnnxqError
from onnxq.recipe import load
from onnxq.samples import Data

FOLD = ("smoothquant", "fold")
LOUD = np.where(np.arange(64) % 9 == 0, 30.0, 1.0)


def _net(folder: Path, producer: str) -> tuple[Path, Path, np.ndarray]:
    """Two layers behind a norm, or behind a Gelu that can take no factor; and data."""
    net = Net()
    x = net.input("x", ["batch", 8, 64])
    if producer == "norm":
        h = net.op("LayerNormalization", x, net.const("gain", LOUD), name="/norm")
    else:
        h = net.op("Gelu", net.op("Mul", x, net.const("gain", LOUD), name="/loud"), name="/gelu")
    quiet = (net.rng.standard_normal((2, 64, 48)) / 8 / LOUD[:, None]).astype(np.float32)
    a = net.op("MatMul", h, net.const("a", quiet[0]), name="/a")
    b = net.op("MatMul", h, net.const("b", quiet[1]), name="/b")
    net.output(net.op("Add", a, b, name="/sum"))
    x_calib, x_held = np.random.default_rng(0).standard_normal((2, 24, 8, 64)).astype(np.float32)
    np.savez(folder / "calib.npz", x=x_calib)
    return net.save(folder / "net.onnx"), folder / "calib.npz", x_held


def _made(folder: Path, producer: str, name: str, **fields: Any) -> tuple[float, Any, Any]:
    """SNR in dB, the result, and the model."""
    source, calib, x = _net(folder, producer)
    wanted = run(onnx.load(source), {"x": x})[0]
    chosen = replace(load(name), **fields)
    done = onnxq.quantize(
        source, folder / "m.onnx", recipe=chosen, calib=calib, precision="keep", target="sm80"
    )
    model = onnx.load(folder / "m.onnx")
    return snr(wanted, run(model, {"x": x})[0]), done, model


@pytest.mark.parametrize("mode", ["static", "dynamic"])
def test_a_norm_takes_the_factors(mode: str, tmp_path: Path) -> None:
    name = "int8-smoothquant" if mode == "static" else "int8-smoothquant-dynamic"
    plain, _, before = _made(tmp_path, "norm", name, steps=())
    smooth, done, model = _made(tmp_path, "norm", name)
    assert smooth > plain + 6
    assert sorted(operators(model)) == sorted(operators(before))
    gain = initializer(model, "gain")
    assert gain.max() / gain.min() < 15  # of 30 before
    assert done.report.facts["rescaling"] == {"folded": 1, "multiplied": 0, "left": 0}
    (edit,) = [e for e in done.report.edits if e.step == "smoothquant"]
    assert (edit.verb, edit.target) == ("fold", "/norm:0")
    assert edit.reason.startswith("alpha 0.") or edit.reason.startswith("alpha 1.0")


def _gated(net: Net, x: str) -> str:
    """A gated MLP, whose up_proj has loud columns."""
    gate = net.op("MatMul", x, net.weight("gate", 64, 64), name="/gate")
    up = net.op("MatMul", x, net.const("up", _loud(net, 64, 1)), name="/up")
    h = net.op("Mul", net.op("Sigmoid", gate, name="/act"), up, name="/gated")
    return net.op("MatMul", h, net.const("down", _loud(net, 64, -1)), name="/down")


def _attending(net: Net, x: str) -> str:
    """An attention of two heads, whose v_proj has loud columns."""
    heads = net.const("heads", [0, 0, 2, 32], np.int64)
    flat = net.const("flat", [0, 0, 64], np.int64)
    parts = []
    for name in "qkv":
        weight = _loud(net, 64, 1) if name == "v" else net.rng.standard_normal((64, 64)) / 8
        made = net.op("MatMul", x, net.const(name, weight), name=f"/{name}")
        made = net.op("Reshape", made, heads, name=f"/{name}_heads")
        perm = [0, 2, 3, 1] if name == "k" else [0, 2, 1, 3]
        parts.append(net.op("Transpose", made, name=f"/{name}_t", perm=perm))
    scores = net.op("Softmax", net.op("MatMul", *parts[:2], name="/scores"), axis=-1, name="/p")
    h = net.op("MatMul", scores, parts[2], name="/values")
    h = net.op("Transpose", h, name="/back", perm=[0, 2, 1, 3])
    h = net.op("Reshape", h, flat, name="/joined")
    return net.op("MatMul", h, net.const("o", _loud(net, 64, -1)), name="/o")


def _loud(net: Net, size: int, sign: int) -> np.ndarray:
    """A weight with loud columns, or (-1) with rows that are quiet for them."""
    weight = (net.rng.standard_normal((size, size)) / 8).astype(np.float32)
    return weight * LOUD if sign > 0 else weight / LOUD[:, None]


@pytest.mark.parametrize(
    ("block", "where", "taker", "others"),
    [(_gated, "/gated:0", "up", "gate up"), (_attending, "/joined:0", "v", "q k v")],
    ids=["gated MLP", "attention"],
)
def test_a_weight_before_takes_the_factors(
    block: Any, where: str, taker: str, others: str, tmp_path: Path
) -> None:
    """up_proj before down_proj, v_proj before o_proj: as many operators, and 6 dB."""
    net = Net()
    net.output(block(net, net.input("x", ["batch", 8, 64])))
    source = net.save(tmp_path / "net.onnx")
    calib, held = np.random.default_rng(0).standard_normal((2, 24, 8, 64)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=calib)
    wanted, found, made = run(onnx.load(source), {"x": held})[0], {}, {}
    for name in ("int8", "int8-smoothquant"):
        options: dict[str, Any] = {"recipe": name, "precision": "keep", "target": "sm80"}
        rules = [f"leave node=/{n}" for n in others.split()]
        done = onnxq.quantize(
            source, tmp_path / "m.onnx", calib=tmp_path / "calib.npz", rules=rules, **options
        )
        made[name] = onnx.load(tmp_path / "m.onnx")
        found[name] = snr(wanted, run(made[name], {"x": held})[0])
    assert sorted(operators(made["int8"])) == sorted(operators(made["int8-smoothquant"]))
    folded = {e.target: e.reason for e in done.report.edits if (e.step, e.verb) == FOLD}
    assert list(folded) == [where] and f"into {taker} of" in folded[where]
    assert found["int8-smoothquant"] > found["int8"] + 6


@pytest.mark.parametrize("seed", [0, 1])
def test_alpha_is_judged_by_rows_that_did_not_make_it(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heavy tails: with each channel's largest value at the end of the range, others are clipped.

    Judged by the rows themselves, that is not seen.
    """
    net = Net()
    loud = np.random.default_rng(5).lognormal(0, 1, 256)
    h = net.op("Mul", net.input("x", ["batch", 16, 256]), net.const("gain", loud), name="/gain")
    net.output(net.op("MatMul", h, net.weight("a", 256, 64), name="/a"))
    source, calib = net.save(tmp_path / "net.onnx"), tmp_path / "calib.npz"
    x, held = np.random.default_rng(seed).standard_t(3, (2, 60, 16, 256)).astype(np.float32)
    np.savez(calib, x=x)
    wanted, found = run(onnx.load(source), {"x": held})[0], []
    for judged in (smoothquant.halved, _by_itself):
        monkeypatch.setattr(smoothquant, "halved", judged)
        options: dict[str, Any] = {"recipe": "int8-smoothquant", "precision": "keep"}
        onnxq.quantize(source, tmp_path / "m.onnx", calib=calib, target="sm80", **options)
        found.append(snr(wanted, run(onnx.load(tmp_path / "m.onnx"), {"x": held})[0]))
    assert found[0] > found[1] + 1.5  # 6.5 and 2.4 dB here


def _by_itself(
    rows: np.ndarray, counts: np.ndarray, _: np.ndarray, peaks: np.ndarray
) -> list[smoothquant.Trial]:
    return [smoothquant.Trial(rows, counts, peaks.max(0), rows, counts)]


def test_alpha_may_be_given(tmp_path: Path) -> None:
    """s_j = max|x_j|^0.5 / max|w_j|^0.5 divides the norm's gain."""
    _, done, model = _made(tmp_path, "norm", "int8-smoothquant", alpha=0.5)
    source, calib, _ = _net(tmp_path, "norm")
    x = np.load(calib)["x"]
    normal = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * LOUD
    w = np.maximum(*(np.abs(initializer(onnx.load(source), n)).max(1) for n in "ab"))
    s = np.sqrt(np.abs(normal).max((0, 1)) / w)
    found = LOUD / initializer(model, "gain")
    # The gain is rounded to what FP16 holds, s with it: 2^-11.
    np.testing.assert_allclose(found / found[0], s / s[0], rtol=2e-3)
    assert any("alpha 0.50 as the recipe says" in e.reason for e in done.report.edits)


def test_behind_a_gelu_a_mul_is_put_only_if_asked_for(tmp_path: Path) -> None:
    plain, done, model = _made(tmp_path, "gelu", "int8-smoothquant")
    assert done.report.facts["rescaling"] == {"folded": 0, "multiplied": 0, "left": 1}
    muls = operators(model).count("Mul")
    smooth, done, model = _made(tmp_path, "gelu", "int8-smoothquant", explicit=True)
    assert done.report.facts["rescaling"] == {"folded": 0, "multiplied": 1, "left": 0}
    assert operators(model).count("Mul") == muls + 1
    assert smooth > plain + 6


def test_gptq_goes_on_with_what_is_smoothed(tmp_path: Path) -> None:
    """Its second moments follow the factors, through a fold and through a Mul."""
    for producer in ("norm", "gelu"):
        fields: dict[str, Any] = {"explicit": True}
        smooth, _, _ = _made(tmp_path, producer, "int8-smoothquant", **fields)
        fields["steps"] = ("smoothquant", "search", "gptq")
        both, done, _ = _made(tmp_path, producer, "int8-smoothquant", **fields)
        assert done.report.facts["rounding"]["improved"] == 2
        assert both > smooth - 0.3


def test_where_it_makes_no_sense_it_is_refused() -> None:
    with pytest.raises(OnnxqError, match="smoothquant with activations none"):
        replace(recipe("int4-rtn"), steps=("smoothquant",))
    with pytest.raises(OnnxqError, match=r"alpha is 1\.5"):
        replace(recipe("int8-smoothquant"), alpha=1.5)
    with pytest.raises(OnnxqError, match="alpha takes a number"):
        recipe("int8-smoothquant").with_changes(["alpha=high"])
    with pytest.raises(OnnxqError, match="no sense in this order"):
        replace(recipe("int8"), steps=("smoothquant", "awq"))


def test_the_calibrator_output_clips_what_few_rows_need(tmp_path: Path) -> None:
    """One row in 40 is 200 times as loud: the others keep digits, and it is clipped."""
    net = Net()
    x = net.input("x", ["batch", 40, 32])
    h = net.op("MatMul", x, net.weight("a", 32, 48), name="/a")
    net.output(net.op("Relu", h, name="/out"))
    source = net.save(tmp_path / "net.onnx")
    calib, held = np.random.default_rng(0).standard_normal((2, 24, 40, 32)).astype(np.float32)
    for data in (calib, held):
        data[:, 0] *= 200
    np.savez(tmp_path / "calib.npz", x=calib)
    wanted, found = run(onnx.load(source), {"x": held})[0], {}
    for calibrator in ("mse:2", "output"):
        made = tmp_path / "m.onnx"
        options: dict[str, Any] = {"recipe": "int8", "calibrator": calibrator, "precision": "keep"}
        onnxq.quantize(source, made, calib=tmp_path / "calib.npz", target="sm80", **options)
        got = run(onnx.load(made), {"x": held})[0]
        found[calibrator] = snr(wanted[:, 1:], got[:, 1:])
    assert found["output"] > found["mse:2"] + 10


def test_a_mul_costs_no_kernel(tmp_path: Path) -> None:
    """Behind a norm that a residual reads too; compiled for sm89."""
    net = Net()
    x = net.input("x", [4, 32, 64])
    h = net.op("LayerNormalization", x, net.const("gain", LOUD), name="/norm")
    a = net.op("Gelu", net.op("MatMul", h, net.weight("a", 64, 64), name="/a"))
    b = net.op("MatMul", a, net.weight("b", 64, 64), name="/b")
    net.output(net.op("Add", b, h, name="/residual"))
    source = net.save(tmp_path / "net.onnx")
    data = np.random.default_rng(0).standard_normal((4, 32, 64)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=data)
    layers = {}
    for changes in (("alpha=0.5",), ("alpha=0.5", "explicit=true")):
        made = tmp_path / "m.onnx"
        options: dict[str, Any] = {"recipe": "int8-smoothquant", "changes": changes}
        done = onnxq.quantize(
            source, made, calib=Data(path=str(tmp_path / "calib.npz"), batch=4), **options
        )
        built = onnxq.build(made, tmp_path / "m.plan", strict=True)
        assert built.passed and built.engine is not None
        layers[done.report.facts["rescaling"]["multiplied"]] = len(built.engine.layers)
    assert layers[2] == layers[0]
