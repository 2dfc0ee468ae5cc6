"""Peers are run once each, their results kept while nothing they depend on changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tools.bench import peers, side_by_side
from tools.bench.judge import compiled, outputs
from tools.bench.models import Case
from tools.bench.peers import FLOOR, OURS, Peer
from tools.bench.side_by_side import side_by_side as measure

# What the made-up peer does; every call leaves a line in the file `calls`.
_SCRIPT = """
import shutil, sys
from pathlib import Path
recipe, model, calib, output, *block = sys.argv[1:]
with Path({calls!r}).open("a") as stream:
    print("@".join([recipe, *block]), file=stream)
if recipe == "good":
    shutil.copy(model, output)
elif recipe == "bad":
    sys.exit("it is broken")
elif recipe == "rude":
    shutil.copy(model, output)
    Path(model).write_bytes(b"gone")
"""


def layer(path: Path, weight: np.ndarray[Any, Any], name: str = "fc") -> None:
    """y = x @ weight, FP32, in a file with external data."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], name=name)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 32])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", weight.shape[1]])],
        [numpy_helper.from_array(weight.astype(np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")


@dataclass
class Bench:
    """A folder with a model, its data, and a peer that is a script of ours."""

    folder: Path
    case: Case
    script: Path
    peer: Peer = field(
        default_factory=lambda: Peer("fake", ("good", "bad", "rude"), four=("good",))
    )
    judged: list[str] = field(default_factory=list)

    def calls(self) -> list[str]:
        path = self.folder / "calls"
        return path.read_text().split() if path.exists() else []

    def rows(self, **options: Any) -> dict[str, dict[str, Any]]:
        found = measure(["tiny"], ["fake"], **options)
        return {f"{row['peer']} {row['recipe']}": row for row in found}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    weight = np.random.default_rng(0).standard_normal((32, 48))
    layer(tmp_path / "tiny.onnx", weight)
    rows = np.random.default_rng(1).standard_normal((6, 32)).astype(np.float32)
    np.savez(tmp_path / "calib.npz", x=rows[:4])
    np.savez(tmp_path / "heldout.npz", x=rows[4:])
    case = Case(
        "tiny",
        tmp_path / "tiny.onnx",
        (),
        ("--data", str(tmp_path / "heldout.npz")),
        ("x:1x32,4x32,8x32",),
        (),
        shared=("--calib", str(tmp_path / "calib.npz")),
        four=("--calib", str(tmp_path / "heldout.npz")),
        heldout_four=("--data", str(tmp_path / "calib.npz")),
        block=16,
    )
    script = tmp_path / "scripts/fake_peer.py"
    script.parent.mkdir()
    for path in (script, script.with_name("fake_int4.py")):
        path.write_text(_SCRIPT.format(calls=str(tmp_path / "calls")))
    made = Bench(tmp_path, case, script)
    known = {peer.name: peer for peer in (Peer(FLOOR, ()), Peer(OURS, ()), made.peer)}
    monkeypatch.setattr(peers, "_SCRIPTS", script.parent)
    monkeypatch.setattr(side_by_side, "PEERS", known)
    monkeypatch.setattr(side_by_side, "CASES", {"tiny": case})
    monkeypatch.setattr(side_by_side, "BENCH", tmp_path / "bench")

    def judged(part: str, case: Case, model: Path, folder: Path) -> dict[str, Any]:
        made.judged.append(f"{model.parent.name} {part}")
        return {"loads": part}

    # The judging process knows the real models only.
    monkeypatch.setattr(side_by_side, "_judged", judged)
    return made


def test_results_are_kept(bench: Bench) -> None:
    first = bench.rows()
    assert bench.rows() == first
    assert bench.calls() == ["good", "bad", "rude"]
    parts = ("outputs", "compiled", "linted")
    assert bench.judged == [f"fake.{recipe} {p}" for recipe in ("good", "rude") for p in parts]


def test_a_result_whose_model_is_gone_is_made_again(bench: Bench) -> None:
    bench.rows()
    (bench.folder / "bench/tiny/fake.good/model.onnx").unlink()
    assert bench.rows()["fake good"]["bytes"] > 0
    assert bench.calls() == ["good", "bad", "rude", "good"]


def test_methods_for_four_bits_have_their_own_script_data_and_judgement(bench: Bench) -> None:
    bench.rows()
    row = bench.rows(bits=4)["fake good"]
    assert bench.calls() == ["good", "bad", "rude", "good@16"]
    assert row["outputs"] and "compiled" not in row
    of_eight, of_four = (bench.folder / f"bench/tiny{kind}" for kind in ("", "-4bit"))
    for eight, four in (("calib", "heldout"), ("heldout", "calib")):
        with np.load(of_eight / f"{eight}.npz") as a, np.load(of_four / f"{four}.npz") as b:
            assert np.array_equal(a["x"], b["x"])
    script = bench.script.with_name("fake_int4.py")
    script.write_text(script.read_text() + "# another version\n")
    bench.rows(), bench.rows(bits=4)
    assert bench.calls()[4:] == ["good@16"]


def test_a_run_that_takes_too_long_is_stopped(bench: Bench) -> None:
    script = bench.script.with_name("fake_int4.py")
    script.write_text("import time\ntime.sleep(60)\n")
    assert bench.rows(bits=4, limit=0.2)["fake good"]["failed"] == "stopped after 0 minutes"


def test_the_same_output_is_judged_once(bench: Bench) -> None:
    bench.rows()
    bench.rows(rounds=2)
    assert bench.judged.count("fake.good outputs") == 1
    np.savez(bench.folder / "heldout.npz", x=np.ones((2, 32), np.float32))
    bench.rows()
    assert bench.judged.count("fake.good outputs") == 2


def test_a_row_of_a_good_run(bench: Bench) -> None:
    row = bench.rows()["fake good"]
    size = sum(f.stat().st_size for f in bench.folder.glob("tiny.onnx*"))
    assert row["original_bytes"] == size
    assert len(row["runs"]) == 1 and row["runs"][0]["code"] == 0
    assert not row["failed"] and not row["input_changed"]
    assert row["compiled"]["loads"] == "compiled" and row["linted"]["loads"] == "linted"


def test_a_failure_is_a_row_with_its_reason_and_is_not_tried_again(bench: Bench) -> None:
    row = bench.rows(rounds=2)["fake bad"]
    assert row["failed"] == "it is broken"
    assert "outputs" not in row
    assert bench.calls().count("bad") == 1


def test_a_changed_input_is_said_and_put_back_for_the_next(bench: Bench) -> None:
    rows = bench.rows()
    assert rows["fake rude"]["input_changed"]
    copy = bench.folder / "bench/tiny/input/tiny.onnx"
    assert copy.read_bytes() == bench.case.model.read_bytes()
    assert not bench.rows()["fake good"]["input_changed"]


def test_rounds_add_up_to_what_is_there(bench: Bench) -> None:
    bench.rows()
    assert len(bench.rows(rounds=3)["fake good"]["runs"]) == 3
    assert bench.calls().count("good") == 3
    assert len(bench.rows(rounds=2)["fake good"]["runs"]) == 3


def test_fresh_runs_all_again(bench: Bench) -> None:
    bench.rows()
    assert len(bench.rows(fresh=True)["fake good"]["runs"]) == 1
    assert bench.calls().count("good") == 2
    assert len(bench.rows(fresh=True, rounds=2)["fake good"]["runs"]) == 2
    assert bench.calls().count("good") == 4


@pytest.mark.parametrize("what", ["script", "model", "data", "packages"])
def test_what_a_result_depends_on(bench: Bench, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.rows()
    if what == "script":
        bench.script.write_text(bench.script.read_text() + "# another version\n")
    elif what == "model":
        layer(bench.case.model, np.ones((32, 48)))
    elif what == "data":
        np.savez(bench.folder / "calib.npz", x=np.ones((4, 32), np.float32))
    else:
        monkeypatch.setattr(Peer, "environment", lambda self: {"numpy": "another"})
    bench.rows()
    assert bench.calls().count("good") == 2
    # An output that is the same again is not judged again; what judges has packages too.
    judgements = 2 if what in ("model", "packages") else 1
    assert bench.judged.count("fake.good outputs") == judgements


def test_results_do_not_depend_on_when_the_data_was_written(bench: Bench) -> None:
    bench.rows()
    with np.load(bench.folder / "calib.npz") as arrays:
        again = dict(arrays)
    np.savez_compressed(bench.folder / "calib.npz", **again)
    bench.rows()
    assert bench.calls().count("good") == 1


def judged(bench: Bench, part: Any, weight: np.ndarray[Any, Any]) -> dict[str, Any]:
    bench.rows()
    candidate = bench.folder / "candidate.onnx"
    layer(candidate, weight)
    return dict(part(bench.case, candidate, bench.folder / "bench/tiny"))


def weight_of(bench: Bench) -> np.ndarray[Any, Any]:
    return np.array(numpy_helper.to_array(onnx.load(bench.case.model).graph.initializer[0]))


def test_the_error_of_the_outputs(bench: Bench) -> None:
    """Every weight 1 % larger: so is the output, which is 40 dB and the same direction."""
    found = judged(bench, outputs, 1.01 * weight_of(bench))
    assert found["loads"] == "yes" and not found["reason"]
    assert found["snr"] == pytest.approx(40.0, abs=0.01)
    assert found["cosine"] == pytest.approx(1.0, abs=1e-6)


def test_outputs_that_are_nan(bench: Bench) -> None:
    weight = weight_of(bench)
    weight[3, 5] = np.nan
    found = judged(bench, outputs, weight)
    assert found["loads"] == "yes" and found["snr"] is None


def test_a_model_that_does_not_load(bench: Bench) -> None:
    bench.rows()
    (bench.folder / "no.onnx").write_bytes(b"nothing")
    found = outputs(bench.case, bench.folder / "no.onnx", bench.folder / "bench/tiny")
    assert found["loads"] == "no" and found["reason"]
    found = compiled(bench.case, bench.folder / "no.onnx", bench.folder / "bench/tiny")
    assert found["compiles"] is False and found["reason"]


def test_the_share_of_flops_in_eight_bits(bench: Bench) -> None:
    """As it is none; quantized by onnxq, of the only product all."""
    import onnxq

    plain = judged(bench, compiled, weight_of(bench))
    assert plain["compiles"] and plain["eight_bits"] == 0.0
    assert sum(plain["shares"].values()) == pytest.approx(1.0)
    quantized = bench.folder / "quantized.onnx"
    onnxq.quantize(bench.case.model, quantized, recipe="int8", calib=bench.folder / "calib.npz")
    found = compiled(bench.case, quantized, bench.folder / "bench/tiny")
    assert found["compiles"] and found["eight_bits"] == pytest.approx(1.0)
