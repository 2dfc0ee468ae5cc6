"""Recipes: what is read is what is written, and whatever cannot be read is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import recipe as r
from onnxq.errors import OnnxqError
from onnxq.gpus import TARGETS, target
from onnxq.recipe import Recipe, Rule

names = st.text("abcXYZ/._*?:0[]", min_size=1, max_size=12)
rules = st.builds(
    Rule,
    action=st.sampled_from(["leave", "quantize"]),
    node=names,
    weight=names | st.just(""),
    module=st.just(""),
    op=st.sampled_from(["", "MatMul"]),
)
formats = st.sampled_from(["int8", "fp8"])


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    fmt, mode = draw(formats), draw(st.sampled_from(["static", "dynamic"]))
    return Recipe(
        name=draw(st.sampled_from(["mine", "fp8.v2", "a-b_c+d"])),
        description=draw(st.sampled_from(["", "text: with colons, 'quotes' and ünïcode"])),
        weights=fmt,
        activations=fmt,
        mode=mode,
        weight_granularity=draw(st.sampled_from(["channel", "tensor"])),
        calibrator=draw(
            st.sampled_from(["max", "percentile:99.9", "percentile", "entropy", "mse", "mse:2"])
        ),
        attention=fmt == "fp8" and mode == "static" and draw(st.booleans()),
        lm_head=draw(st.sampled_from(["leave", "quantize"])),
        first=draw(st.sampled_from(["leave", "quantize"])),
        last=draw(st.sampled_from(["leave", "quantize"])),
        ops=tuple(draw(st.lists(st.sampled_from(["MatMul", "Gemm", "Conv"]), unique=True))),
        rules=tuple(draw(st.lists(rules, max_size=3))),
    )


@given(recipes())
@settings(max_examples=100, deadline=None)
def test_yaml_and_json_give_the_same_recipe_back(recipe: Recipe) -> None:
    text = yaml.safe_dump(recipe.as_dict())
    assert r.from_dict(yaml.safe_load(text), "x.yaml") == recipe
    assert r.from_dict(json.loads(json.dumps(recipe.as_dict())), "x.yaml") == recipe


@given(rules)
@settings(max_examples=200, deadline=None)
def test_a_rule_reads_what_it_prints(rule: Rule) -> None:
    assert r.parse_rule(str(rule)) == rule


PRESETS = {
    # weights, block, activations, data
    "fp8": ("fp8", 0, "fp8", True),
    "fp8-attention": ("fp8", 0, "fp8", True),
    "fp8-dynamic": ("fp8", 0, "fp8", False),
    "fp8-weight-only": ("fp8", 0, "none", False),
    "int4-rtn": ("int4", 64, "none", False),
    "int8": ("int8", 0, "int8", True),
    "int8-dynamic": ("int8", 0, "int8", False),
    "int8-weight-only": ("int8", 0, "none", False),
    "mxfp8": ("mxfp8", 32, "mxfp8", False),
    "nvfp4": ("nvfp4", 16, "nvfp4", False),
    "uint4-rtn": ("uint4", 32, "none", False),
    "w4a8-rtn": ("int4", 64, "int8", True),
    "w4a8-rtn-dynamic": ("int4", 64, "int8", False),
}


def test_every_preset_loads_and_says_what_it_is() -> None:
    assert r.presets().keys() >= PRESETS.keys()
    for name, preset in r.presets().items():
        assert preset.name == name and preset.description
        assert r.load(name) is preset
        assert preset.attention == (name in ("fp8-attention", "sdxl-fp8"))
        assert preset.lm_head == "leave"
    for name, (weights, block, activations, data) in PRESETS.items():
        preset = r.load(name)
        assert (preset.weights, preset.block) == (weights, block)
        assert (preset.activations, preset.needs_data) == (activations, data)


@pytest.mark.parametrize("name", TARGETS)
def test_default_recipe_is_one_the_target_runs(name: str) -> None:
    chosen, reason = r.default_for(target(name))
    fp8 = TARGETS[name].capability >= (8, 9)
    assert chosen.name == ("fp8-dynamic" if fp8 else "int8-dynamic")
    assert name in reason and "no data" in reason


def test_a_file_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "weights: int8\nactivations: int8\ncalibrator: percentile:99.9\n"
        "rules:\n- leave module=model.layers.0.*\n- {action: quantize, node: /fc1}\n"
    )
    recipe = r.load(str(path))
    assert recipe.name == "mine" and recipe.calibrator == "percentile:99.9"
    assert recipe.rules == (
        Rule("leave", module="model.layers.0.*"),
        Rule("quantize", node="/fc1"),
    )


def test_more_rules_come_last() -> None:
    first, second = Rule("leave", node="a"), Rule("quantize", op="MatMul")
    recipe = replace(r.load("int8"), rules=(first,)).with_rules((second,))
    assert recipe.rules == (first, second) and recipe.name == "int8"


BAD: list[tuple[Any, str]] = [
    ([1, 2], "not a mapping"),
    (None, "not a mapping"),
    ({"wieghts": "int8"}, "unknown field 'wieghts'"),
    ({"schema": 3, "weights": "int8"}, "newer onnxq"),
    ({"weights": "int7", "activations": "int7"}, "unknown format 'int7'"),
    ({"weights": 8}, "weights takes text"),
    ({"weights": ["int8"]}, "weights takes text"),
    ({"weights": "int8"}, "weights int8 with activations fp8"),
    ({"mode": "statik"}, "mode is 'statik'; choose one of: static, dynamic"),
    ({"mode": True}, "mode takes text"),
    ({"weight_granularity": "row"}, "weight_granularity is 'row'"),
    ({"calibrator": "histogram"}, "unknown calibrator 'histogram'"),
    ({"calibrator": 99.9}, "calibrator takes text"),
    ({"calibrator": "percentile:0"}, "unknown calibrator"),
    ({"calibrator": "percentile:101"}, "unknown calibrator"),
    ({"calibrator": "percentile:nan"}, "unknown calibrator"),
    ({"calibrator": "percentile:"}, "unknown calibrator"),
    ({"calibrator": "mse:0.5"}, "unknown calibrator"),
    ({"calibrator": "mse:inf"}, "unknown calibrator"),
    ({"calibrator": "mse:x"}, "unknown calibrator"),
    ({"calibrator": "entropy:2"}, "unknown calibrator"),
    ({"calibrator": "max:5"}, "unknown calibrator"),
    ({"attention": "yes"}, "attention takes true or false"),
    ({"attention": True, "mode": "dynamic"}, "static fp8 only"),
    ({"attention": True, "weights": "int8", "activations": "int8"}, "static fp8 only"),
    ({"center": "yes"}, "center takes true or false"),
    ({"center": True}, "center with fp8 fp8 static"),
    ({"center": True, "weights": "int8", "activations": "int8", "mode": "dynamic"}, "leave center"),
    ({"lm_head": False}, "lm_head takes text"),
    ({"first": "skip"}, "first is 'skip'; choose one of: quantize, leave"),
    ({"ops": "MatMul"}, "ops takes a list"),
    ({"ops": ["ConvTranspose"]}, "ops is 'ConvTranspose'"),
    ({"ops": [["MatMul"]]}, "ops is"),
    ({"rules": "leave node=x"}, "rules takes a list"),
    ({"rules": [{"action": "leave", "name": "x"}]}, "a rule cannot be read"),
    ({"rules": [{"node": "x"}]}, "action is None"),
    ({"rules": [{"action": "leave", "node": 5}]}, "patterns are text"),
    ({"rules": [{"action": "leave"}]}, "no pattern"),
    ({"rules": [7]}, "a rule cannot be read"),
    ({"rules": ["drop node=x"]}, "action is 'drop'"),
    ({"name": "a/b"}, "cannot be part of a file's name"),
    ({"name": ""}, "cannot be part of a file's name"),
]


@pytest.mark.parametrize(("content", "message"), BAD, ids=lambda v: str(v)[:40])
def test_what_cannot_be_read_is_named(content: Any, message: str) -> None:
    with pytest.raises(OnnxqError) as error:
        r.from_dict(content, "mine.yaml")
    assert message in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("leave", "a rule cannot be read"),
        ("", "a rule cannot be read"),
        ("leave node=", "no pattern"),
        ("leave node", "no pattern"),
        ("leave nodes=/fc1", "a rule cannot be read"),
        ("leave node=/fc1 foo=b", "a rule cannot be read"),
        ("leave node=a node=b", "two patterns for node"),
        ("drop node=a", "action is 'drop'"),
    ],
)
def test_rules_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(OnnxqError, match=message):
        r.parse_rule(text)


def test_a_rule_may_hold_spaces_and_equals_signs() -> None:
    assert r.parse_rule("leave  node=block 1/fc=2  op=Gemm ") == Rule(
        "leave", node="block 1/fc=2", op="Gemm"
    )


def test_recipes_made_in_python_are_checked_too() -> None:
    with pytest.raises(OnnxqError, match="weights int8 with activations fp8"):
        Recipe("mine", weights="int8")
    with pytest.raises(OnnxqError, match="no pattern"):
        Rule("leave")


def test_unknown_recipes_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match="unknown recipe 'fp9'; choose one of: fp8, fp8-attention"):
        r.load("fp9")
    with pytest.raises(OnnxqError, match="no such recipe file"):
        r.load(str(tmp_path / "gone.yaml"))
    with pytest.raises(OnnxqError, match="no such recipe file"):
        r.load(str(tmp_path))
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(OnnxqError, match="is not text"):
        r.load(str(tmp_path / "bytes.yaml"))
    (tmp_path / "open.yaml").write_text("a: [1")
    with pytest.raises(OnnxqError, match="is not YAML") as error:
        r.load(str(tmp_path / "open.yaml"))
    assert "\n" not in str(error.value)
    (tmp_path / "code.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(OnnxqError, match="is not YAML"):
        r.load(str(tmp_path / "code.yaml"))


def test_fields_are_set_by_name() -> None:
    changed = r.load("int4-gptq").with_changes(
        ["block_size=32", "activations=fp8", "steps=[awq, search]", "attention=false"]
    )
    assert (changed.block_size, changed.activations) == (32, "fp8")
    assert changed.steps == ("awq", "search")
    assert changed.name == "int4-gptq"
    assert r.load("fp8").with_changes([]) is r.load("fp8")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("block_size", "write field=value"),
        ("name=x", "write field=value"),
        ("blocksize=32", "unknown field 'blocksize'"),
        ("block_size=many", "block_size is 'many'"),
        ("block_size=48", "power of two"),
        ("steps=[", "not YAML"),
    ],
)
def test_what_cannot_be_set_is_refused(change: str, said: str) -> None:
    with pytest.raises(OnnxqError, match=said):
        r.load("int4-gptq").with_changes([change])
