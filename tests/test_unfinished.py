"""A run that was stopped goes on where it was, and ends with the same bytes; as do more threads."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_graphs import Net, recipe

import onnxq
from onnxq import rescaling
from onnxq.algorithms import awq, gptq
from onnxq.errors import OnnxqError
from onnxq.files import take
from onnxq.threads import Once, in_order

LAYERS = 4


def _net(folder: Path, name: str = "net", bump: float = 0.0) -> Path:
    """A norm, two layers that read it, and two behind those; a weight of more than 8 KB changed."""
    net = Net()
    x = net.input("x", ["batch", 8, 96])
    ones, zeros = net.const("ones", np.ones(96)), net.const("zeros", np.zeros(96))
    normal = net.op("LayerNormalization", x, ones, zeros, name="/norm")
    weights = [np.random.default_rng(i).standard_normal((96, 96)) / 10 for i in range(LAYERS)]
    weights[1][48, 48] += bump
    first, second, third, fourth = (net.const(f"w{i}", w) for i, w in enumerate(weights))
    a = net.op("MatMul", normal, first, name="/a")
    b = net.op("MatMul", normal, second, name="/b")
    c = net.op("MatMul", net.op("Mul", a, b, name="/mul"), third, name="/c")
    net.output(net.op("MatMul", c, fourth, name="/d"))
    return net.save(folder / f"{name}.onnx")


def _data(folder: Path, seed: int = 0) -> Path:
    path = folder / f"data{seed}.npz"
    np.savez(path, x=np.random.default_rng(seed).standard_normal((16, 8, 96)).astype(np.float32))
    return path


def _quantize(folder: Path, output: str, name: str = "int4-best", **options: Any) -> bytes:
    options = {"calib": folder / "data0.npz", "recipe": name} | options
    made = onnxq.quantize(folder / "net.onnx", folder / output, **options)
    assert len(made.files) == 1
    return made.files[0].read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    _net(tmp_path), _data(tmp_path)
    return tmp_path


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often GPTQ has run, and after how many runs Ctrl-C is pressed: [0, 0]."""
    counts = [0, -1]
    plain = gptq.Sweep.round

    def counted(self: Any, *arguments: Any) -> Any:
        if counts[0] == counts[1]:
            raise KeyboardInterrupt
        counts[0] += 1
        return plain(self, *arguments)

    monkeypatch.setattr(gptq.Sweep, "round", counted)
    return counts


def _cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(count)))


def _stopped(folder: Path, sweeps: list[int], after: int, name: str = "int4-best") -> Path:
    """A run of which that many layers are finished."""
    sweeps[:] = [0, after]
    with pytest.raises(KeyboardInterrupt):
        _quantize(folder, "m.onnx", name, resume=True)
    assert not (folder / "m.onnx").exists()
    sweeps[:] = [0, -1]
    return folder / "m.onnx.unfinished"


@pytest.mark.parametrize("name", ["int4-gptq", "int4-best", "w4a8-gptq", "fp8-gptq"])
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_run_goes_on_and_ends_with_the_same_bytes(
    name: str, after: int, folder: Path, sweeps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _cores(monkeypatch, 1)
    whole = _quantize(folder, "whole.onnx", name)
    assert sweeps[0] == LAYERS
    kept = _stopped(folder, sweeps, after, name)
    factors = 3 if name == "int4-best" else 0  # of the norm, of /mul and of /c
    assert len(list(kept.glob("*.npz"))) == after + factors + 1  # and the calibration
    assert _quantize(folder, "m.onnx", name, resume=True) == whole
    assert sweeps[0] == LAYERS - after
    assert not kept.exists()


def test_factors_are_not_searched_again(
    folder: Path, sweeps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    _cores(monkeypatch, 1)
    whole = _quantize(folder, "whole.onnx")
    searched: list[int] = []
    plain = awq.search_channel_scales

    def counted(weights: Any, *arguments: Any) -> Any:
        searched.append(len(weights))
        if len(searched) == 3:
            raise KeyboardInterrupt
        return plain(weights, *arguments)

    monkeypatch.setattr(rescaling, "search_channel_scales", counted)
    with pytest.raises(KeyboardInterrupt):
        _quantize(folder, "m.onnx", resume=True)
    assert _quantize(folder, "m.onnx", resume=True) == whole
    assert searched == [2, 1, 1, 1]  # the layers that read each input; the last one's again


def test_it_is_said(folder: Path, sweeps: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    _cores(monkeypatch, 1)
    fresh = onnxq.quantize(
        folder / "net.onnx", recipe="int4-gptq", calib=folder / "data0.npz", resume=True
    )
    assert not any("stopped" in note for note in fresh.report.notes)
    _stopped(folder, sweeps, 2, "int4-gptq")
    options = {"recipe": "int4-gptq", "calib": folder / "data0.npz", "resume": True}
    made = onnxq.quantize(folder / "net.onnx", folder / "m.onnx", **options)
    assert "3 parts were finished by a run that was stopped" in made.report.notes
    assert made.report.facts["rounding"] == fresh.report.facts["rounding"]
    rounds = [[e for e in m.report.edits if e.step == "round"] for m in (made, fresh)]
    assert rounds[0] == rounds[1] and len(rounds[0]) == LAYERS


def test_without_resume_nothing_is_kept_or_looked_at(folder: Path, sweeps: list[int]) -> None:
    kept = _stopped(folder, sweeps, 2)
    before = sorted(kept.iterdir())
    _quantize(folder, "m.onnx")
    assert sweeps[0] == LAYERS and sorted(kept.iterdir()) == before
    sweeps[:] = [0, 1]
    with pytest.raises(KeyboardInterrupt):
        _quantize(folder, "n.onnx")
    assert not (folder / "n.onnx.unfinished").exists()


def _another_recipe(folder: Path) -> dict[str, Any]:
    return {"recipe": replace(recipe("int4-best"), block_size=32)}


def _another_data(folder: Path) -> dict[str, Any]:
    return {"calib": _data(folder, 1)}


def _another_model(folder: Path) -> dict[str, Any]:
    """In one weight, far from its ends."""
    _net(folder, bump=1.0)
    return {}


def _another_precision(folder: Path) -> dict[str, Any]:
    return {"precision": "keep"}


@pytest.mark.parametrize(
    "change", [_another_recipe, _another_data, _another_model, _another_precision]
)
def test_what_another_run_kept_is_refused(
    change: Callable[[Path], dict[str, Any]], folder: Path, sweeps: list[int]
) -> None:
    kept = _stopped(folder, sweeps, 2)
    before = {path: path.read_bytes() for path in kept.iterdir()}
    what = change.__name__.removeprefix("_another_")
    with pytest.raises(OnnxqError, match=f"the unfinished run of another {what}"):
        _quantize(folder, "m.onnx", resume=True, **change(folder))
    assert {path: path.read_bytes() for path in kept.iterdir()} == before


@pytest.mark.parametrize("content", [b"", b"PK", b"\0" * 1000])
def test_a_part_that_is_not_whole_is_made_again(
    content: bytes, folder: Path, sweeps: list[int]
) -> None:
    whole = _quantize(folder, "whole.onnx")
    kept = _stopped(folder, sweeps, 2)
    for path in kept.glob("*.npz"):
        if path.name != "calibration.npz":
            path.write_bytes(content)
    assert _quantize(folder, "m.onnx", resume=True) == whole
    assert sweeps[0] == LAYERS


def test_two_runs_do_not_share_it(folder: Path, sweeps: list[int]) -> None:
    kept = _stopped(folder, sweeps, 1)
    with (kept / "lock").open("w") as lock:
        assert take(lock.fileno())
        with pytest.raises(OnnxqError, match="another run is at work"):
            _quantize(folder, "m.onnx", resume=True)
    _quantize(folder, "m.onnx", resume=True)


@pytest.mark.parametrize("name", ["int4-awq", "int4-gptq", "int4-best", "fp8-gptq"])
def test_any_number_of_cores_gives_the_same_bytes(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    for count in (1, 2, 5):
        _cores(monkeypatch, count)
        made.append(_quantize(folder, f"{count}.onnx", name))
    assert made[0] == made[1] == made[2]


def test_a_weight_of_two_layers_is_decided_by_the_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be by whoever of several threads comes first."""
    net = Net()
    x = net.input("x", ["batch", 8, 96])
    shared = net.weight("w", 96, 96)
    behind = net.op("Gelu", net.op("MatMul", x, shared, name="/a"), name="/gelu")
    net.output(net.op("MatMul", behind, shared, name="/b"))
    net.save(folder / "net.onnx")
    made = []
    for count in (1, 4, 4, 4):
        _cores(monkeypatch, count)
        made.append(_quantize(folder, f"{len(made)}.onnx", "int4-gptq"))
    assert len(set(made)) == 1
    codes = [t for t in onnx.load_from_string(made[0]).graph.initializer if t.data_type == 22]
    assert len(codes) == 1


def test_in_order() -> None:
    started: list[int] = []

    def work(i: int) -> int:
        started.append(i)
        return i * i

    for workers in (1, 3, 50):
        assert list(in_order(work, range(20), workers)) == [i * i for i in range(20)]
    started.clear()
    results = in_order(work, iter(range(1000)), 4)
    assert next(results) == 0 and len(started) <= 4


def test_an_error_in_a_thread_is_raised_in_its_turn() -> None:
    results = in_order(lambda i: 1 // (2 - i), range(9), 3)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_once() -> None:
    made: list[int] = []
    once = Once(lambda: made.append(1) or len(made))
    assert list(in_order(lambda _: once(), range(20), 8)) == [1] * 20


def test_awq_picks_the_first_of_equal_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of inputs all alike every alpha gives ones: none is the answer, whatever the threads do."""
    _cores(monkeypatch, 4)
    scheme = recipe("int4-rtn").weight_format
    from onnxq.formats import PerBlock, QuantScheme

    weight = np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)
    found = awq.search_channel_scales(
        [(weight, QuantScheme(scheme, PerBlock(0, 32), "float32"))], np.eye(64)
    )
    assert found[1] == 0.0 and (found[0] == 1).all()


def _without_codes(path: Path) -> None:
    arrays = dict(np.load(path))
    del arrays[next(name for name in ("codes", "table") if name in arrays)]
    np.savez(path, **arrays)


def _of_another_shape(path: Path) -> None:
    """The codes, or the Gram matrices, without their last row."""
    arrays = dict(np.load(path))
    np.savez(path, **{n: a[:-1] if n.endswith(("codes", "gram")) else a for n, a in arrays.items()})


def _no_json(path: Path) -> None:
    arrays = dict(np.load(path))
    name = next(name for name in ("about", "table") if name in arrays)
    np.savez(path, **{**arrays, name: arrays[name][:-1]})


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("damage", [_without_codes, _of_another_shape, _no_json, _cut])
def test_what_is_damaged_is_made_again(
    damage: Callable[[Path], None],
    folder: Path,
    sweeps: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each part, and the calibration too."""
    _cores(monkeypatch, 1)
    whole = _quantize(folder, "whole.onnx", "int4-gptq")
    kept = _stopped(folder, sweeps, 3, "int4-gptq")
    for path in kept.glob("*.npz"):
        damage(path)
    assert _quantize(folder, "m.onnx", "int4-gptq", resume=True) == whole
    assert sweeps[0] == LAYERS
