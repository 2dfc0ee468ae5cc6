"""Layers left for the error they cause: the search, and the whole spine on small graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from core_graphs import Net, recipe, run, snr

import onnxq
from onnxq import record
from onnxq.calibrate.session import InputSpec, Session
from onnxq.calibrate.trials import beginning
from onnxq.cli import main
from onnxq.errors import OnnxqError
from onnxq.graph.model import Model
from onnxq.keeping import select, worst
from onnxq.recipe import Recipe, load

OWN = np.random.default_rng(0).permutation(np.geomspace(1e-6, 1e-2, 64))


def _added() -> tuple[Callable[[Sequence[int]], float], list[int]]:
    """Errors that add up, and a count of the runs."""
    runs: list[int] = []

    def error(layers: Sequence[int]) -> float:
        runs.append(len(layers))
        return float(OWN[list(layers)].sum())

    return error, runs


def test_the_worst_come_first_in_few_runs() -> None:
    error, runs = _added()
    found = worst(64, error)
    first = [next(found) for _ in range(5)]
    assert [i for i, _ in first] == list(np.argsort(-OWN)[:5])
    np.testing.assert_allclose([own for _, own in first], np.sort(OWN)[::-1][:5], rtol=1e-6)
    assert len(runs) < 64  # it takes 64 to try each alone
    rest = [i for i, _ in found]
    assert sorted(rest + [i for i, _ in first]) == list(range(64))


def _selected(costs: Sequence[float] = (1.0,) * 64, **fields: Any) -> Any:
    return select(_added()[0], costs, replace(load("int8"), **fields))


def test_bounds_are_kept() -> None:
    order = list(np.argsort(-OWN))
    assert list(_selected(keep_worst=3).layers) == order[:3]
    assert list(_selected(keep_flops=0.05).layers) == order[:3]  # 3.2 of 64
    found = _selected(keep_worst=3)
    assert found.share == 3 / 64
    assert found.before == pytest.approx(OWN.sum(), rel=1e-3)
    assert found.after == pytest.approx(OWN.sum() - OWN[order[:3]].sum(), rel=1e-3)


def test_what_does_not_fit_makes_room_for_what_does() -> None:
    order = list(np.argsort(-OWN))
    costs = [1.0] * 64
    costs[order[0]] = 30.0
    found = _selected(costs, keep_flops=0.05)  # 4.65 of 93
    assert list(found.layers) == order[1:5]


def test_decibels_end_it() -> None:
    order = list(np.argsort(-OWN))
    wanted = -10 * np.log10(OWN.sum() - OWN[order[:4]].sum()) - 0.01
    found = _selected(snr=float(wanted))
    assert list(found.layers) == order[:4] and found.reached
    assert _selected(snr=1.0).layers == {}
    assert not _selected(snr=float(wanted), keep_worst=2).reached


def _net(folder: Path, kind: str = "linear") -> tuple[Path, np.ndarray]:
    """Three layers; what the second one reads has loud channels that hardly matter."""
    net = Net()
    loud = np.ones(32)
    loud[[3, 17]] = 400
    quiet = np.where(loud > 1, 1 / 4000, 1.0)
    if kind == "linear":
        x = net.input("x", ["batch", 8, 32])
        h = net.op("MatMul", x, net.weight("a", 32, 32), name="/a")
        h = net.op("Mul", h, net.const("loud", loud), name="/loud")
        b = net.rng.standard_normal((32, 32)) / 6 * quiet[:, None]
        h = net.op("MatMul", h, net.const("b", b), name="/b")
        net.output(net.op("MatMul", h, net.weight("c", 32, 32), name="/c"))
        shape = (8, 8, 32)
    else:
        x = net.input("x", ["batch", 32, 6, 6])
        h = net.op("Conv", x, net.weight("a", 32, 32, 1, 1), name="/a")
        h = net.op("Mul", h, net.const("loud", loud[:, None, None]), name="/loud")
        b = net.rng.standard_normal((32, 32, 1, 1)) / 6 * quiet[:, None, None]
        h = net.op("Conv", h, net.const("b", b), name="/b")
        net.output(net.op("Conv", h, net.weight("c", 32, 32, 1, 1), name="/c"))
        shape = (8, 32, 6, 6)
    calib, held = np.random.default_rng(0).standard_normal((2, *shape)).astype(np.float32)
    np.savez(folder / "calib.npz", x=calib)
    return net.save(folder / "net.onnx"), held


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("name", ["int8", "int8-dynamic", "fp8"])
def test_the_layer_that_costs_most_is_left(kind: str, name: str, tmp_path: Path) -> None:
    source, x = _net(tmp_path, kind)
    wanted = run(onnx.load(source), {"x": x})[0]
    found = {}
    for kept in (0, 1):
        chosen = replace(load(name), keep_worst=kept)
        done = onnxq.quantize(
            source,
            tmp_path / "m.onnx",
            recipe=chosen,
            calib=tmp_path / "calib.npz",
            precision="keep",
        )
        found[kept] = snr(wanted, run(onnx.load(tmp_path / "m.onnx"), {"x": x})[0])
    if name != "fp8":  # whose scale does not mind loud channels
        assert done.report.facts["kept"]["layers"] == ["/b"]
        assert found[1] > found[0] + 6
    facts = done.report.facts["kept"]
    # On other data.
    assert facts["snr_before"] == pytest.approx(found[0], abs=2.5)
    assert facts["snr_after"] == pytest.approx(found[1], abs=2.5)
    assert facts["share"] == pytest.approx(1 / 3, abs=1e-4)


@pytest.mark.parametrize("kind", ["MatMul", "Gemm transB", "Conv"])
def test_the_share_is_that_of_multiplications(kind: str, tmp_path: Path) -> None:
    """32 x 96 in the first layer, 96 x 64 in the second."""
    net = Net()
    given: list[Any] = ["batch", 32, 5, 5] if kind == "Conv" else ["batch", 32]
    h = net.input("x", given)
    for name, inputs, outputs in (("/a", 32, 96), ("/b", 96, 64)):
        if kind == "Conv":
            h = net.op("Conv", h, net.weight(name + "w", outputs, inputs, 1, 1), name=name)
        elif kind == "MatMul":
            h = net.op("MatMul", h, net.weight(name + "w", inputs, outputs), name=name)
        else:
            h = net.op("Gemm", h, net.weight(name + "w", outputs, inputs), name=name, transB=1)
    net.output(h)
    x = np.random.default_rng(0).standard_normal((4, *given[1:])).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    done = onnxq.quantize(
        net.save(tmp_path / "net.onnx"),
        tmp_path / "m.onnx",
        recipe=replace(load("int8"), keep_worst=1),
        calib=tmp_path / "x.npz",
    )
    facts = done.report.facts["kept"]
    assert facts["share"] == pytest.approx({"/a": 1 / 3, "/b": 2 / 3}[facts["layers"][0]], abs=1e-4)


def test_ranges_around_another_middle_are_tried_as_they_are(tmp_path: Path) -> None:
    """Of values from 10 to 11 nearly all would be clipped by a range around 0."""
    net = Net()
    x = net.input("x", ["batch", 8, 32])
    h = net.op("Add", net.op("Sigmoid", x), net.const("ten", np.float32(10)))
    for name in ("/a", "/b"):
        h = net.op("MatMul", h, net.weight(name + "w", 32, 32), name=name)
    net.output(h)
    source = net.save(tmp_path / "net.onnx")
    calib, held = np.random.default_rng(0).standard_normal((2, 8, 8, 32)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=calib)
    wanted = run(onnx.load(source), {"x": held})[0]
    chosen = replace(load("int8"), keep_worst=0, snr=1.0)
    done = onnxq.quantize(
        source,
        tmp_path / "m.onnx",
        recipe=chosen,
        calib=tmp_path / "x.npz",
        precision="keep",
    )
    real = snr(wanted, run(onnx.load(tmp_path / "m.onnx"), {"x": held})[0])
    assert done.report.facts["kept"]["snr_before"] == pytest.approx(real, abs=2.5)


def test_it_is_said_and_recorded(tmp_path: Path) -> None:
    source, _ = _net(tmp_path)
    given = ["quantize", str(source), "-o", str(tmp_path / "m.onnx"), "--recipe", "int8"]
    given += ["--calib", str(tmp_path / "calib.npz"), "--keep-flops", "40%", "--snr", "20"]
    done = CliRunner().invoke(main, given)
    assert done.exit_code == 0, done.output
    assert "1 layers left for their error, 33.3% of the multiplications" in done.output
    made = record.read(Model.load(tmp_path / "m.onnx"))
    assert made is not None
    rules = made["recipe"]["rules"]
    assert [rule["node"] for rule in rules] == ["/b"]
    again = onnxq.quantize(
        source,
        tmp_path / "n.onnx",
        recipe=replace(Recipe("int8"), **_fields(made["recipe"])),
        calib=tmp_path / "calib.npz",
    )
    assert not again.report.facts.get("kept")
    one, other = (onnx.load(tmp_path / f"{name}.onnx") for name in "mn")
    for model in (one, other):  # of the calibration's digest: it has one tensor less
        model.ClearField("metadata_props")
    assert one == other


def _fields(content: dict[str, Any]) -> dict[str, Any]:
    from onnxq.recipe import from_dict

    read = from_dict(content, "int8")
    return {name: getattr(read, name) for name in content}


def test_where_it_cannot_be_measured_it_is_refused(tmp_path: Path) -> None:
    source, _ = _net(tmp_path)
    with pytest.raises(OnnxqError, match="take an int8 or fp8 recipe"):
        replace(recipe("int4-rtn"), keep_worst=1)
    with pytest.raises(OnnxqError, match="a share from 0 to 1"):
        replace(recipe("int8"), keep_flops=10.0)
    with pytest.raises(OnnxqError, match="needs calibration data"):
        onnxq.quantize(source, recipe=replace(recipe("int8-dynamic"), keep_worst=1))
    table = tmp_path / "t.npz"
    calib = tmp_path / "calib.npz"
    onnxq.quantize(source, tmp_path / "m.onnx", recipe="int8", calib=calib, save_calib=table)
    with pytest.raises(OnnxqError, match="a calibration table is not enough"):
        onnxq.quantize(source, recipe=replace(recipe("int8"), keep_worst=1), load_calib=[table])


def test_a_long_text_is_ranked_by_its_beginning() -> None:
    """32 MB of outputs are what is looked at; images and caches are taken whole."""
    tokens = np.arange(512, dtype=np.int64).reshape(1, 512)
    text = tuple(InputSpec(n, tokens.dtype, ("batch", "length")) for n in ("ids", "mask"))
    feed = {"ids": tokens, "mask": tokens + 1}
    short = beginning(text, feed, 0.25)
    np.testing.assert_array_equal(short["ids"], tokens[:, :128])
    np.testing.assert_array_equal(short["mask"], tokens[:, :128] + 1)
    assert beginning(text, feed, 0.01)["ids"].shape == (1, 64)
    for dims in ((1, 512), ("batch", 512), ("batch", None), ("batch",)):
        assert beginning((InputSpec("ids", tokens.dtype, dims),), {"ids": tokens}, 0.25)[
            "ids"
        ].shape == (1, 512)
    cached = (*text, InputSpec("past", np.dtype(np.float32), ("batch", 3, "past", 64)))
    past = {"past": np.zeros((1, 3, 0, 64), np.float32)}
    assert beginning(cached, feed | past, 0.25)["ids"].shape == (1, 512)


def test_where_outputs_are_large_fewer_tokens_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of eight tokens' outputs fit, and the layer that costs most is still found."""
    source, _ = _net(tmp_path)
    model = onnx.load(source)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "length"
    for value in (*model.graph.output, *model.graph.value_info):
        value.type.tensor_type.shape.dim[1].dim_param = "any"
    onnx.save(model, source)
    monkeypatch.setattr("onnxq.calibrate.trials._OUTPUT_BYTES", 2 * 32 * 4)
    monkeypatch.setattr("onnxq.calibrate.trials._LEAST_LENGTH", 1)
    lengths: list[int] = []
    real = Session.run

    def run_(self: Session, names: Any, feed: Any) -> Any:
        if "onnxq_switches" in feed:
            lengths.append(feed["x"].shape[1])
        return real(self, names, feed)

    monkeypatch.setattr(Session, "run", run_)
    done = onnxq.quantize(
        source,
        tmp_path / "m.onnx",
        recipe=replace(load("int8"), keep_worst=1),
        calib=tmp_path / "calib.npz",
        precision="keep",
    )
    assert set(lengths) == {2}
    assert done.report.facts["kept"]["layers"] == ["/b"]
