"""The recipes for diffusion UNets: what is recognised, and what each level quantizes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from core_graphs import Net, run, snr

import onnxq
from onnxq.calibrate.table import load_table
from onnxq.engine import kernels
from onnxq.errors import OnnxqError
from onnxq.gpus import target
from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from onnxq.placement import place
from onnxq.recipe import load
from onnxq.samples import Data
from onnxq.sites import Site, find_sites
from onnxq.unet import Role, recognised, unet_roles

SHAPES = [
    "sample:2x4x16x16",
    "timestep:2",
    "encoder_hidden_states:2x77x128",
    "text_embeds:2x64",
    "time_ids:2x6",
]


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
    ("model", "recipe", "named"),
    [
        ("sdxl-unet-tiny-fp16", "fp8", "sdxl-fp8"),
        ("sdxl-unet-tiny-fp16", "int8-smoothquant", "sdxl-int8"),
        ("sdxl-unet-tiny-fp16", "sdxl-int8", ""),
        ("sdxl-unet-tiny-fp16", "fp8-dynamic", ""),
        ("sdxl-unet-tiny-fp16", "int4-rtn", ""),
        ("minilm", "fp8", ""),
    ],
)
def test_the_recipe_for_a_diffusion_unet_is_named(
    models: Path, model: str, recipe: str, named: str
) -> None:
    notes = onnxq.inspect(models / model / "model.onnx", recipe=recipe).report.notes
    said = [note for note in notes if note.startswith("a diffusion UNet")]
    assert said == ([f"a diffusion UNet: --recipe {named} changes its samples less"] * bool(named))


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


@pytest.fixture(scope="module")
def made(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny UNet under the recipes."""
    source, folder = models / "sdxl-unet-tiny-fp16", tmp_path_factory.mktemp("unet")
    calib = Data(path=source / "calib.npz", batch=2)
    found = {}
    for name, recipe, level in (
        ("fp8 level 4", "sdxl-fp8", 4),
        ("fp8 level 3", "sdxl-fp8", 3),
        ("int8 level 3", "sdxl-int8", 3),
    ):
        found[name] = folder / f"{recipe}-{level}.onnx"
        onnxq.quantize(
            source / "model.onnx",
            found[name],
            recipe=recipe,
            changes=[f"level={level}"],
            calib=calib,
        )
    return found


@pytest.mark.parametrize(
    ("name", "least"), [("fp8 level 4", 18.0), ("fp8 level 3", 18.0), ("int8 level 3", 23.5)]
)
def test_accuracy(made: dict[str, Path], models: Path, name: str, least: float) -> None:
    """A decibel below what was measured; with a range each for q, k and v FP8 has 19.2."""
    source = models / "sdxl-unet-tiny-fp16"
    data = Data(path=source / "heldout.npz", batch=2)
    result = onnxq.compare(source / "model.onnx", made[name], data=data, min_snr=least, fp16=False)
    assert result.passed


COMPILED = {
    # format, fused attentions, kernels that multiply no matrices: 236 in FP16
    "fp8 level 4": ("fp8", {"fused fp8": 22, "fp8 gemms": 12}, 306),
    "fp8 level 3": ("fp8", {"fused fp16": 34}, 282),
    "int8 level 3": ("int8", {"fused fp16": 34}, 373),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(made: dict[str, Path], name: str) -> None:
    form, attentions, most = COMPILED[name]
    built = onnxq.build(made[name], made[name].with_suffix(".plan"), shapes=SHAPES)
    made[name].with_suffix(".plan").unlink()
    assert built.engine is not None
    assert built.report.facts["products"] == {
        "gemm": {form: 181, "fp16": 32},
        "conv": {form: 38, "fp16": 13},
        "attention": attentions,
    }
    elementwise = [layer for layer in built.engine.layers if kernels.is_elementwise(layer)]
    assert len(elementwise) <= most
    for layer in elementwise:  # codes multiplied by the ratio of two scales would round twice
        assert not any(t.dtype == form for t in layer.constants), layer.name


def test_open_height_and_width(models: Path, tmp_path: Path) -> None:
    """Calibrated at 16 x 16 latents, compiled for 64 x 64 to 160 x 128 and one to four rows.

    The shortest sequences are then 16 x 16 = 256: above what FP8 attention needs to fuse.
    """
    source, made = models / "sdxl-unet-tiny-fp16-dynamic", tmp_path / "m.onnx"
    calib = Data(path=source / "calib.npz", batch=2)
    onnxq.quantize(source / "model.onnx", made, recipe="sdxl-fp8", calib=calib)
    shapes = ["sample:1x4x64x64,2x4x128x128,4x4x160x128"]
    for name, rest in (("timestep", ""), *(s.split(":2") for s in SHAPES[2:])):
        shapes.append(f"{name}:" + ",".join(f"{rows}{rest}" for rows in (1, 2, 4)))
    built = onnxq.build(made, tmp_path / "m.plan", shapes=shapes)
    assert built.report.facts["products"] == {
        "gemm": {"fp8": 181, "fp16": 32},
        "conv": {"fp8": 38, "fp16": 13},
        "attention": {"fused fp8": 34},
    }


def test_ranges_by_denoising_step(models: Path, tmp_path: Path) -> None:
    """What the report says of the first convolution's input, against the samples themselves."""
    source = models / "sdxl-unet-tiny-fp16"
    data = dict(np.load(source / "calib.npz"))
    data["timestep"] = np.repeat(np.array([900, 900, 100, 100], np.float16), 2)
    np.savez(tmp_path / "captures.npz", **data)
    made = onnxq.quantize(
        source / "model.onnx",
        tmp_path / "made.onnx",
        recipe="sdxl-int8",
        changes=["steps=[]"],
        rules=["quantize node=node_conv2d"],
        calib=Data(path=tmp_path / "captures.npz", batch=2),
        save_calib=tmp_path / "table.npz",
    )
    found = made.report.facts["amax_by_step"]
    assert found["steps"] == [900.0, 100.0]
    peaks = np.abs(data["sample"].astype(np.float64)).reshape(4, -1).max(axis=1)  # two rows each
    entry = found["layers"]["node_conv2d"]
    assert entry["peaks"] == [peaks[:2].max(), peaks[2:].max()]
    assert entry["means"] == [peaks[:2].mean(), peaks[2:].mean()]
    table = load_table(tmp_path / "table.npz")
    assert (entry["module"], entry["covered"]) == ("conv_in", table.range("sample", "mse:2"))
    assert table.range("sample", "steps") == min(peaks[:2].mean(), peaks[2:].mean())
    assert table.range("sample", "mse:2") < peaks.max()  # and what the recipe's ranges come from
    assert any("amax over 2 steps" in note for note in made.report.notes)


def _by_step(loud: float, huge: float, seed: int) -> dict[str, np.ndarray]:
    """Inputs of five steps, 8 rows each; at one `loud` times as large; one value `huge`."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((40, 16, 32, 32)).astype(np.float32)
    x[16:24] *= loud
    x.reshape(-1)[rng.integers(x.size)] = huge
    return {"x": x, "timestep": np.repeat(np.arange(900, -1, -200), 8).astype(np.float32)}


@pytest.mark.parametrize(
    ("loud", "huge", "beaten"),
    [(5, 1, {"steps": 20}), (1, 30, {"max": 4}), (5, 150, {"steps": 10, "max": 4})],
    ids=["a loud step", "a huge value", "both"],
)
def test_the_ranges_of_convolutions(
    tmp_path: Path, loud: float, huge: float, beaten: dict[str, float]
) -> None:
    """sdxl-int8 loses neither a loud step, as NVIDIA's rule does, nor the rest for one value.

    Decibels by which other calibrators are beaten, on values that no range was chosen by.
    """
    net = Net()
    x, step = net.input("x", ["n", 16, 32, 32]), net.input("timestep", ["n"])
    made = net.op("Conv", x, net.weight("w", 32, 16, 3, 3), name="conv", pads=[1, 1, 1, 1])
    net.output(made)
    net.output(net.op("Identity", step))
    source = net.save(tmp_path / "m.onnx")
    np.savez(tmp_path / "calib.npz", **_by_step(loud, huge, 1))
    heldout = _by_step(loud, huge, 2)
    exact = run(onnx.load(source), heldout)[0]

    def measured(*changes: str) -> float:
        onnxq.quantize(
            source,
            tmp_path / "q.onnx",
            recipe="sdxl-int8",
            rules=["quantize node=conv"],
            changes=changes,
            calib=tmp_path / "calib.npz",
            precision="keep",
        )
        return snr(exact, run(onnx.load(tmp_path / "q.onnx"), heldout)[0])

    found = measured()
    for calibrator, decibels in beaten.items():
        other = measured(f"conv_calibrator={calibrator}")
        assert found > other + decibels, (calibrator, found, other)


def test_data_without_steps_is_said(models: Path, tmp_path: Path) -> None:
    source = models / "minilm"
    made = onnxq.quantize(
        source / "model.onnx",
        tmp_path / "made.onnx",
        recipe="sdxl-fp8",
        changes=["level=3"],
        calib=Data(path=source / "calib.npz", batch=4),
    )
    assert any("no denoising step" in note for note in made.report.notes)
    assert "amax_by_step" not in made.report.facts
