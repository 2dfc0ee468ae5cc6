"""What a file says of the run that wrote it, and that run done to another file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_graphs import Net

import onnxq
from onnxq import record
from onnxq.errors import OnnxqError
from onnxq.graph.model import Model


def _net(folder: Path, name: str, seed: int = 0, width: int = 64) -> Path:
    net = Net(seed=seed)
    x = net.input("x", ["batch", 8, 96])
    net.output(net.op("MatMul", x, net.weight("w", 96, width), name=f"/{name}"))
    return net.save(folder / f"{name}.onnx")


def _data(folder: Path) -> Path:
    path = folder / "data.npz"
    np.savez(path, x=np.random.default_rng(1).standard_normal((16, 8, 96)).astype(np.float32))
    return path


def _record(path: Path) -> dict[str, Any]:
    props = onnx.load(path, load_external_data=False).metadata_props
    return json.loads({e.key: e.value for e in props}["onnxq"])


def test_every_edit_is_in_the_file(tmp_path: Path) -> None:
    made = onnxq.quantize(_net(tmp_path, "a"), recipe="fp8-gptq", calib=_data(tmp_path))
    kept = _record(made.files[0])
    listed = [
        (e["step"], e["verb"], target, e["reason"])
        for e in kept["edits"]
        for target in e["targets"]
    ]
    assert sorted(listed) == sorted((e.step, e.verb, e.target, e.reason) for e in made.report.edits)
    assert len(kept["recipe_digest"]) == 64 and kept["calibration"] and kept["source"]


def test_the_digest_is_that_of_what_a_recipe_does(tmp_path: Path) -> None:
    source, digests = _net(tmp_path, "a"), []
    named = tmp_path / "other-name.yaml"
    named.write_text("weights: int8\nactivations: int8\nmode: dynamic\n")
    for recipe, changes in (
        ("int8-dynamic", []),
        (str(named), []),
        ("int8-dynamic", ["lm_head=quantize"]),
    ):
        made = onnxq.quantize(source, tmp_path / "m.onnx", recipe=recipe, changes=changes)
        digests.append(_record(made.files[0])["recipe_digest"])
    assert digests[0] == digests[1] != digests[2]


def test_inspect_prints_them(cli: Callable[..., Any], tmp_path: Path) -> None:
    source = _net(tmp_path, "a")
    made = onnxq.quantize(source, tmp_path / "m.onnx", recipe="int8-dynamic").files[0]
    printed = cli("inspect", made).stdout
    assert "  recipe.name: int8-dynamic" in printed
    assert "  emit quantize /a: int8 weights per channel, int8 activations" in printed
    assert "  recipe_digest: " in printed


def test_the_same_is_done_to_another_file(tmp_path: Path) -> None:
    """Recipe, its changes, target and precision; what was measured is measured again."""
    data, first, second = _data(tmp_path), _net(tmp_path, "a"), _net(tmp_path, "b", 5)
    like = onnxq.quantize(
        first,
        recipe="int4-gptq",
        target="sm120",
        precision="bf16",
        changes=["block_size=32", "sparsity=2:4", "steps=[sparsegpt, gptq]"],
        calib=data,
    ).files[0]
    made = onnxq.quantize(second, recipe_from=like, calib=data)
    assert made.files[0].name == "b.int4-gptq.onnx"
    old, new = _record(like), _record(made.files[0])
    for field in ("recipe", "recipe_digest", "target", "precision"):
        assert old[field] == new[field]
    assert old["source"] != new["source"] and old["calibration"] != new["calibration"]
    assert made.report.title == "recipe int4-gptq for sm120: as a.int4-gptq.onnx was made"


def test_scales_are_not_carried_over_and_that_is_said(
    cli: Callable[..., Any], tmp_path: Path
) -> None:
    like = onnxq.quantize(_net(tmp_path, "a"), recipe="fp8", calib=_data(tmp_path)).files[0]
    done = cli("quantize", _net(tmp_path, "b", 5), "--recipe-from", like)
    assert done.returncode == 2
    assert f"what was measured for {like} is not carried over" in done.stderr
    assert "give --calib" in done.stderr
    done = cli(
        "quantize", tmp_path / "b.onnx", "--recipe-from", like, "--calib", tmp_path / "data.npz"
    )
    assert done.returncode == 0 and "as a.fp8.onnx was made" in done.stdout


def test_without_a_record_there_is_no_recipe_to_take(tmp_path: Path) -> None:
    source = _net(tmp_path, "a")
    with pytest.raises(OnnxqError, match="holds no record of onnxq"):
        onnxq.quantize(_net(tmp_path, "b"), recipe_from=source)
    made = onnxq.quantize(source, tmp_path / "m.onnx", recipe="int8-dynamic").files[0]
    with pytest.raises(OnnxqError, match="a recipe and a model to take one from"):
        onnxq.quantize(tmp_path / "b.onnx", recipe="fp8-dynamic", recipe_from=made)


def test_the_engine_is_built_sparse_where_the_record_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from onnxq.engine import build

    asked: list[bool] = []

    def compiled(*_: Any, sparse: bool, **__: Any) -> Any:
        asked.append(sparse)
        raise OnnxqError("enough")

    monkeypatch.setattr(build, "build", compiled)
    source = _net(tmp_path, "a")
    for model, options in (
        (source, {}),
        (onnxq.prune(source).files[0], {}),
        (onnxq.prune(source, tmp_path / "h.onnx", pattern="0.5").files[0], {}),
        (source, {"sparse": True}),
        (tmp_path / "a.sparse24.onnx", {"sparse": False}),
    ):
        with pytest.raises(OnnxqError, match="enough"):
            onnxq.build(model, **options)
    assert asked == [False, True, False, True, False]


@pytest.mark.parametrize(
    "edits", [None, 3, ["x"], [{}], [{"step": "emit", "verb": "leave"}], {"step": "emit"}]
)
def test_a_record_of_another_form_says_of_no_layer_why_it_was_left(
    tmp_path: Path, edits: Any
) -> None:
    model = onnx.load(_net(tmp_path, "a"))
    entry = model.metadata_props.add()
    entry.key, entry.value = "onnxq", json.dumps({"edits": edits})
    onnx.save(model, tmp_path / "odd.onnx")
    assert record.left(Model.load(tmp_path / "odd.onnx")) == {}
