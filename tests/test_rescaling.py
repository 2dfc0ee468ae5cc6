"""The rescale step through the whole spine: folded into the norm, searched on the data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from core_graphs import Net, initializer, operators, recipe, run, snr
from core_oracle import evaluate

import onnxq
from onnxq.errors import OnnxqError
from onnxq.recipe import Recipe
from onnxq.terminal import quantized_lines


def _net(folder: Path) -> Path:
    """A norm that two layers read; every 9th of its channels is loud."""
    net = Net()
    x = net.input("x", ["batch", 8, 64])
    gain = np.where(np.arange(64) % 9 == 0, 20.0, 1.0)
    scale, bias = net.const("gain", gain), net.const("bias", np.zeros(64))
    normal = net.op("LayerNormalization", x, scale, bias, name="/norm")
    a = net.op("MatMul", normal, net.weight("a", 64, 48), name="/a")
    b = net.op("MatMul", normal, net.weight("b", 64, 48), name="/b")
    net.output(net.op("Add", a, b, name="/sum"))
    return net.save(folder / "net.onnx")


def _data(folder: Path, seed: int) -> tuple[Path, np.ndarray]:
    x = np.random.default_rng(seed).standard_normal((24, 8, 64)).astype(np.float32)
    np.savez(folder / f"d{seed}.npz", x=x)
    return folder / f"d{seed}.npz", x


def _with(name: str, *steps: str) -> Recipe:
    return replace(recipe(name), name=f"{name}-{'-'.join(steps)}", steps=steps)


def test_awq_lowers_the_error_and_adds_no_operator(tmp_path: Path) -> None:
    source, (calib, _), (_, x) = _net(tmp_path), _data(tmp_path, 0), _data(tmp_path, 1)
    wanted = run(onnx.load(source), {"x": x})[0]
    found = {}
    for steps in ((), ("awq",)):
        made = tmp_path / f"{len(steps)}.onnx"
        options = {"recipe": _with("int4-rtn", *steps), "precision": "keep"}
        done = onnxq.quantize(source, made, calib=calib, **options)
        found[len(steps)] = snr(wanted, run(onnx.load(made), {"x": x})[0])
        assert operators(onnx.load(made)).count("Mul") == 0
        if steps:
            (edit,) = [e for e in done.report.edits if e.step == "awq"]
            assert (edit.verb, edit.target) == ("fold", "/norm:0")
            assert float(edit.reason.split(";")[0].removeprefix("alpha ")) > 0
            # One factor for both readers: the norm's gain says what it was.
            gain = initializer(onnx.load(made), "gain")
            assert gain[0] / gain[1] < 20
    assert found[1] > found[0] + 2


def test_ranges_are_those_of_the_rescaled_input(tmp_path: Path) -> None:
    """W4A8: the activation's scale is its largest value behind the fold, over 127."""
    source, (calib, x) = _net(tmp_path), _data(tmp_path, 0)
    made = tmp_path / "m.onnx"
    onnxq.quantize(source, made, recipe=_with("w4a8-rtn", "awq"), calib=calib, precision="keep")
    model = onnx.load(made)
    (q,) = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and "/norm" in n.input[0]]
    scale = float(initializer(model, q.input[1]))
    mean, deviation = x.mean(-1, keepdims=True), np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    normal = (x - mean) / deviation * initializer(model, "gain")
    assert scale == pytest.approx(np.abs(normal).max() / 127, rel=1e-5)
    assert initializer(model, "gain")[0] != 20


def test_largest_values_follow_from_a_table_alone(tmp_path: Path) -> None:
    """Those of a channel that is divided are divided: the scale is that of a second measurement."""
    source, (calib, _), table = _net(tmp_path), _data(tmp_path, 0), tmp_path / "t.npz"
    options = {"recipe": _with("w4a8-rtn", "awq"), "precision": "keep"}
    scales = []
    for given in ({"calib": calib, "save_calib": table}, {"load_calib": [table]}):
        made = tmp_path / f"{len(scales)}.onnx"
        onnxq.quantize(source, made, **options, **given)
        model = onnx.load(made)
        quantizes = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
        (q,) = [n for n in quantizes if "/norm" in n.input[0]]
        scales.append(float(initializer(model, q.input[1])))
        assert initializer(model, "gain")[0] != 20  # it was rescaled
    assert scales[1] == pytest.approx(scales[0], rel=1e-5)


def test_a_table_alone_does_not_serve_where_ranges_are_chosen(tmp_path: Path) -> None:
    source, (calib, _), table = _net(tmp_path), _data(tmp_path, 0), tmp_path / "t.npz"
    chosen = replace(_with("w4a8-rtn", "awq"), calibrator="mse")
    onnxq.quantize(source, tmp_path / "m.onnx", recipe=chosen, calib=calib, save_calib=table)
    with pytest.raises(OnnxqError, match="must be measured again"):
        onnxq.quantize(source, tmp_path / "n.onnx", recipe=chosen, load_calib=[table])
    onnxq.quantize(source, tmp_path / "n.onnx", recipe=_with("int4-rtn", "awq"), load_calib=[table])


def test_what_cannot_be_folded_is_left_and_said(tmp_path: Path) -> None:
    net = Net()
    x = net.input("x", ["batch", 8, 64])
    h = net.op("Gelu", x, name="/gelu")
    net.output(net.op("MatMul", h, net.weight("a", 64, 48), name="/a"))
    calib, _ = _data(tmp_path, 0)
    source = net.save(tmp_path / "net.onnx")
    done = onnxq.quantize(source, tmp_path / "m.onnx", recipe=_with("int4-rtn", "awq"), calib=calib)
    (edit,) = [e for e in done.report.edits if e.step == "awq"]
    assert edit.verb == "leave"
    assert "Gelu" in edit.reason


def test_factors_leave_the_gain_a_number_that_16_bits_hold(tmp_path: Path) -> None:
    """gain / s rounded later errs alike for every token; the weights take what it would lose."""
    net = Net()
    gain = net.rng.lognormal(0, 1, 64)
    x = net.input("x", ["batch", 8, 64])
    normal = net.op(
        "LayerNormalization", x, net.const("gain", gain), net.const("b", np.zeros(64)), name="/norm"
    )
    net.output(net.op("MatMul", normal, net.weight("a", 64, 48), name="/a"))
    calib, _ = _data(tmp_path, 0)
    source, made = net.save(tmp_path / "net.onnx"), tmp_path / "m.onnx"
    onnxq.quantize(source, made, recipe=_with("int4-rtn", "awq"), calib=calib, precision="keep")
    found = initializer(onnx.load(made), "gain")
    assert (found != gain.astype(np.float32)).all()  # each was divided
    # FP32 of a number that FP16 has to all but FP64's last bits.
    np.testing.assert_array_equal(found, found.astype(np.float16).astype(np.float32))


def test_nothing_on_the_way_to_a_layer_overflows_in_16_bits(tmp_path: Path) -> None:
    """What `up` makes is large where the gate is small: AWQ would divide it there by 0.47."""
    loud = np.arange(64) % 9 == 0
    net = Net(dtype=np.float16)
    x = net.input("x", ["batch", 8, 64])
    up = net.op("MatMul", x, net.const("up", np.eye(64) * np.where(loud, 20.0, 2.0**14)))
    far, zero = net.const("far", np.full(64, 1e3)), net.const("zero", np.float16(0))
    factor = net.const("factor", np.where(loud, 1.0, 2.0**-14))
    factor = net.op("Where", net.op("Less", x, far), factor, zero)  # computed: takes no division
    gate = net.op("Mul", net.op("Sigmoid", x), factor)
    inner = net.op("Mul", up, gate, name="/inner")
    net.output(net.op("MatMul", inner, net.weight("down", 64, 48), name="/down"))
    x = np.random.default_rng(0).uniform(-3, 3, (8, 8, 64)).astype(np.float16)
    np.savez(tmp_path / "d.npz", x=x)
    source, made = net.save(tmp_path / "net.onnx"), tmp_path / "m.onnx"
    done = onnxq.quantize(source, made, recipe=_with("int4-rtn", "awq"), calib=tmp_path / "d.npz")
    (edit,) = [e for e in done.report.edits if e.step == "awq" and e.target == "/inner:0"]
    assert edit.verb == "fold"
    # onnx's evaluator rounds to FP16 behind every operator; ONNX Runtime's CPU does not.
    wanted, found = (evaluate(onnx.load(path), {"x": x})[0] for path in (source, made))
    assert snr(wanted, found) > 15


def test_every_phase_is_named_and_so_is_how_each_calibration_ran(tmp_path: Path) -> None:
    """In 16 bits largest values are measured too, before factors are searched."""
    net = Net(dtype=np.float16)
    x, gain = net.input("x", ["batch", 8, 64]), np.where(np.arange(64) % 9 == 0, 20.0, 1.0)
    scale, bias = net.const("gain", gain), net.const("bias", np.zeros(64))
    normal = net.op("LayerNormalization", x, scale, bias, name="/norm")
    net.output(net.op("MatMul", normal, net.weight("a", 64, 48), name="/a"))
    np.savez(tmp_path / "d.npz", x=_data(tmp_path, 0)[1].astype(np.float16))
    said: list[tuple[str, int, int]] = []
    done = onnxq.quantize(
        net.save(tmp_path / "net.onnx"),
        tmp_path / "m.onnx",
        recipe=_with("w4a8-rtn", "awq"),
        calib=tmp_path / "d.npz",
        memory=8_000_000_000,
        progress=lambda *call: said.append(call),
    )
    phases = ["calibrate", "measuring ranges", "rescaling", "calibrate again, rescaled"]
    assert [s for s in dict.fromkeys(step for step, _, _ in said) if s in phases] == phases
    assert [call for call in said if call[0] == "measuring ranges"] == [("measuring ranges", 1, 1)]
    lines = quantized_lines(done)
    assert lines[0].startswith("  calibrated in one piece; at most ")
    assert lines[1].startswith("  calibrated again, rescaled, in one piece; at most ")
