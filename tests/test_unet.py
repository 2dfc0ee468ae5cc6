"""The recipes for diffusion UNets: what is recognised, and what each level quantizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

import onnxq
from onnxq.errors import OnnxqError
from onnxq.gpus import target
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.placement import place
from onnxq.recipe import load
from onnxq.sites import Site, find_sites
from onnxq.unet import Role, recognised, unet_roles


@pytest.fixture(scope="module")
def tiny(models: Path) -> Model:
    return prepare(Model.load(models / "sdxl-unet-tiny-fp16/model.onnx"), 0)[0]


def by_module(site: Site) -> str:
    """What the module's path says, read here without patterns; '' for the other convolutions."""
    parts = site.module.split(".")
    if site.kind == "attention":
        return "attention"
    for word, role in (
        *((w, "embedding") for w in ("time_embedding", "add_embedding", "time_emb_proj")),
        *((w, "qkv") for w in ("to_q", "to_k", "to_v")),
        *((w, w) for w in ("conv_in", "conv_out", "proj_out")),
        *(("conv_shortcut", "shortcut"), ("ff", "feed_forward")),
        *((w, "linear") for w in ("to_out", "proj_in")),
    ):
        if word in parts:
            return role
    return "conv"


@pytest.mark.parametrize("names", [True, False])
def test_every_role_with_names_and_without(tiny: Model, names: bool) -> None:
    sites = find_sites(tiny)
    roles = unet_roles(tiny, sites, names=names)
    assert len(sites) == 213 + 51 + 34
    for site in sites:
        assert roles[id(site.node)].word == by_module(site), site.module


def test_what_was_recognised_is_said() -> None:
    found = [Role("qkv", True), Role("conv_in", True), Role("qkv", False), Role("qkv", True)]
    assert recognised(found) == [
        "recognised by name: 1 conv_in, 2 qkv",
        "recognised by position in the graph: 1 qkv",
    ]


LEVELS = {
    # of the roles that each level adds, how many layers the tiny model has: 17 transformer blocks
    1: {"conv": 38},
    2: {"feed_forward": 2 * 17},
    2.5: {"qkv": 6 * 17},
    3: {"linear": 2 * 17 + 11},
    4: {"attention": 2 * 17},
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["sdxl-fp8", "sdxl-int8"])
def test_levels(tiny: Model, name: str, level: float) -> None:
    placement = place(tiny, load(name).with_changes([f"level={level}"]), target("sm89"))
    wanted: Counter[str] = Counter()
    for each, roles in LEVELS.items():
        if each <= level and not (each == 4 and name == "sdxl-int8"):
            wanted.update(roles)
    assert Counter(by_module(d.site) for d in placement.quantized) == wanted


def test_a_model_that_is_no_unet_has_few_roles(models: Path) -> None:
    """Nothing is an error that is not there; layers are told by position."""
    seen = onnxq.inspect(models / "minilm/model.onnx", recipe="sdxl-fp8")
    assert seen.placement is not None
    assert Counter(d.site.role for d in seen.placement.quantized) == {
        "qkv": 18,
        "feed_forward": 12,
        "linear": 6,
        "attention": 6,
    }
    assert "recognised by position in the graph" in seen.report.notes[-1]


@pytest.mark.parametrize(
    ("recipe", "change", "message"),
    [
        ("sdxl-fp8", "level=5", "no level 5"),
        ("sdxl-fp8", "level=high", "takes a number"),
        ("fp8", "level=3", "has no levels"),
    ],
)
def test_levels_that_are_none(recipe: str, change: str, message: str) -> None:
    with pytest.raises(OnnxqError) as caught:
        load(recipe).with_changes([change])
    assert message in str(caught.value)


def test_a_rule_by_a_role_that_is_none() -> None:
    with pytest.raises(OnnxqError, match="role is 'head'"):
        onnxq.recipe.parse_rule("leave role=head")
