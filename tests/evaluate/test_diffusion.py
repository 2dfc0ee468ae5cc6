"""`evaluate diffusion` on models whose samples are known; the schedule against diffusers' own."""

from __future__ import annotations

import json
import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_models import write

from onnxq.errors import OnnxqError
from onnxq.evaluate.conditions import read_conditions
from onnxq.evaluate.diffusion import Diffusion, diffusion, psnr
from onnxq.evaluate.matching import Match
from onnxq.evaluate.schedule import SDXL, Schedule, find_schedule, schedule
from onnxq.evaluate.shares import paired

# What diffusers 0.42's DDIMScheduler makes of a model that predicts sin(1.3 x + t / 100).
GOLDEN = json.loads((Path(__file__).parent.parent / "golden/ddim.json").read_text())

# The noise that was added, if the clean sample is `target`: exact for one that is always the same.
# epsilon = (x - sqrt(a) target) / sqrt(1 - a), with a looked up by the timestep.
POINT = """agraph (float[B,1,4,4] sample, float[B] timestep, float[B,1,4,4] target)
    => (float[B,1,4,4] out_sample) {{
    t = Cast<to = 7>(timestep)  a = Gather(alphas, t)  one = Constant<value = float {{1.0}}>()
    axes = Constant<value = int64[3] {{1, 2, 3}}>()  wide = Unsqueeze(a, axes)
    root = Sqrt(wide)  clean = Mul(root, target)  rest = Sub(sample, clean)
    left = Sub(one, wide)  deviation = Sqrt(left)  out_sample = Div(rest, deviation) }}"""
# All of SDXL's inputs count: the sample, plus what the text and the sizes come to.
SDXL_FORM = """agraph (float16[{B},4,H,W] sample, {T} timestep,
    float16[{B},77,8] encoder_hidden_states, float16[{B},6] text_embeds,
    float16[{B},6] time_ids) => (float16[{B},4,H,W] out_sample) {{
    axes = Constant<value = int64[2] {{1, 2}}>()
    mean = ReduceMean<keepdims = 1>(encoder_hidden_states, axes)
    last = Constant<value = int64[1] {{3}}>()  wide = Unsqueeze(mean, last)
    one = Constant<value = int64[1] {{1}}>()
    pooled = ReduceMean<keepdims = 1>(text_embeds, one)
    ids = ReduceMean<keepdims = 1>(time_ids, one)
    side = Mul(pooled, ids)  where = Constant<value = int64[2] {{2, 3}}>()
    far = Unsqueeze(side, where)  both = Add(wide, far)
    out_sample = Add(sample, both) }}"""


def point_model(path: Path, plan: Schedule, shift: float = 0.0) -> Path:
    """Its samples are the target, whatever the noise; with a shift, off by what that does."""
    graph = POINT.format()
    if shift:
        graph = graph.replace(
            "out_sample = Div(rest, deviation) }",
            f"exact = Div(rest, deviation) off = Constant<value = float {{{shift}}}>() "
            "out_sample = Add(exact, off) }",
        )
    return write(path, graph, alphas=plan.alphas.astype(np.float32))


@pytest.fixture
def plan() -> Schedule:
    return schedule({**SDXL, "set_alpha_to_one": True}, "test")


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    path = tmp_path / "conditions.npz"
    np.savez(path, target=rng.uniform(-1, 1, (3, 1, 4, 4)).astype(np.float32), label=[2, 0, 1])
    return path


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_ddim_is_diffusers(case: dict[str, Any]) -> None:
    plan = schedule(case["config"], "golden")
    timesteps = plan.timesteps(case["steps"])
    assert timesteps == case["timesteps"]
    now = np.linspace(-2.5, 2.5, 7)
    for timestep in timesteps:
        now = plan.step(np.sin(1.3 * now + timestep / 100), timestep, now, case["steps"])
    # float32 between the steps; each divides by sqrt(alpha), down to 0.07 at the noisiest.
    assert now == pytest.approx(case["final"], rel=1e-5, abs=1e-5)


def test_samples_of_a_known_distribution(tmp_path: Path, plan: Schedule, targets: Path) -> None:
    """All mass at one point: DDIM ends there, and a constant error e of epsilon shifts each step's
    estimate of the clean sample by -e sqrt(1 - a) / sqrt(a), the last of which is what stays."""
    exact, shifted = point_model(tmp_path / "m.onnx", plan), tmp_path / "shifted.onnx"
    point_model(shifted, plan, 0.25)
    same = diffusion(exact, exact, plan, conditions=targets, steps=8, samples=5)
    assert same.exact == 5 and math.isinf(same.psnr) and same.peak == pytest.approx(2, abs=0.2)
    assert all(snr == math.inf for _, snr in same.by_step)

    found = diffusion(shifted, exact, plan, conditions=targets, steps=8, samples=5)
    error = 0.0  # of the sample so far
    for timestep in plan.timesteps(8):
        alpha = plan.alphas[timestep]
        before = timestep - 125
        next_alpha = plan.alphas[before] if before >= 0 else 1.0
        # the exact model turns an error of the sample into one of epsilon
        epsilon = error / math.sqrt(1 - alpha) + 0.25
        clean = (error - math.sqrt(1 - alpha) * epsilon) / math.sqrt(alpha)
        error = math.sqrt(next_alpha) * clean + math.sqrt(1 - next_alpha) * epsilon
    assert found.psnr == pytest.approx(20 * math.log10(found.peak / abs(error)), abs=0.01)
    assert found.psnr_error < 0.01 and found.worst == pytest.approx(found.psnr, abs=0.01)
    assert found.broken == found.exact == 0 and len(found.by_step) == 8


def test_mean_worst_and_error_by_hand(tmp_path: Path, plan: Schedule, targets: Path) -> None:
    """A model whose samples are 1.1 times the others': each is off by a tenth of its target."""
    larger = POINT.format().replace("Mul(root, target)", "Mul(wider, target)")
    larger = larger.replace(
        "clean =", "tenth = Constant<value = float {1.1}>() wider = Mul(root, tenth) clean ="
    )
    alphas = plan.alphas.astype(np.float32)
    other = write(tmp_path / "other.onnx", larger, alphas=alphas)
    model = point_model(tmp_path / "m.onnx", plan)
    found = diffusion(other, model, plan, conditions=targets, steps=6)
    target = np.load(targets)["target"].astype(np.float64)
    squared = np.square(0.1 * target).mean(axis=(1, 2, 3))
    ratios = 10 * np.log10(np.ptp(target) ** 2 / squared)
    assert found.psnr == pytest.approx(ratios.mean(), abs=0.01)
    assert found.each == pytest.approx(ratios, abs=0.01)
    assert found.psnr_error == pytest.approx(ratios.std(ddof=1) / math.sqrt(3), abs=0.01)
    assert (found.worst, found.worst_sample) == (
        pytest.approx(ratios.min(), abs=0.01),
        ratios.argmin(),
    )
    # Behind the last step both are at their targets, so the error is a tenth of the whole.
    assert found.by_step[-1][1] == pytest.approx(20, abs=0.01)


def test_each_sample_has_its_own_noise(tmp_path: Path, plan: Schedule) -> None:
    """Of a model that gives back its input, a sample is its noise times a number."""
    graph = "(float[B,8] sample, float[B] timestep) => (float[B,8] y) { y = Identity(sample) }"
    model = write(tmp_path / "m.onnx", f"agraph {graph}")
    factor = 1.0
    for visited, following in ((501, 1), (1, None)):
        a, b = plan.alphas[visited], 1.0 if following is None else plan.alphas[following]
        factor *= math.sqrt(b) * (1 - math.sqrt(1 - a)) / math.sqrt(a) + math.sqrt(1 - b)
    found = diffusion(model, model, plan, steps=2, samples=2, seed=8, batch=2)
    noise = [np.random.default_rng(seed).standard_normal(8) for seed in (8, 9)]
    assert found.peak == pytest.approx(factor * np.ptp(noise), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_the_batch_changes_nothing(
    tmp_path: Path, plan: Schedule, targets: Path, batch: int
) -> None:
    exact, shifted = point_model(tmp_path / "m.onnx", plan), tmp_path / "shifted.onnx"
    point_model(shifted, plan, 0.25)
    one, other = (
        diffusion(shifted, exact, plan, conditions=targets, steps=4, samples=5, batch=b)
        for b in (1, batch)
    )
    assert one.psnr == pytest.approx(other.psnr, abs=1e-4)
    assert dict(one.by_step) == pytest.approx(dict(other.by_step), abs=1e-3)


def test_psnr_by_hand() -> None:
    expected = np.zeros((3, 2, 2), np.float32)
    found = expected.copy()
    found[0, 1, 1] = 1.0
    found[2, 0, 0] = np.nan
    ratios = psnr(expected, found, peak=2.0)
    assert ratios[0] == pytest.approx(10 * math.log10(4 / 0.25))
    assert ratios[1] == math.inf and math.isnan(ratios[2])


def guided(folder: Path, rows: dict[str, Any]) -> Path:
    path = folder / "guided.npz"
    np.savez(path, **rows)
    return path


def test_guidance_leads_away_from_the_negative(tmp_path: Path, plan: Schedule) -> None:
    """Targets enter epsilon linearly, so guidance w samples negative + w (wanted - negative)."""
    rng = np.random.default_rng(1)
    wanted, negative = rng.uniform(-1, 1, (2, 2, 1, 4, 4)).astype(np.float32)
    led = negative[:1] + 3 * (wanted - negative[:1])
    model = point_model(tmp_path / "m.onnx", plan)
    first = tmp_path / "led.npz"
    np.savez(first, target=led)
    kept = tmp_path / "by_hand.npz"
    np.savez(kept, **{"target": wanted, "negative.target": negative[:1]})
    plain = diffusion(model, model, plan, conditions=first, steps=5)
    steered = diffusion(model, model, plan, conditions=kept, steps=5, guidance=3)
    assert steered.guidance == 3 and plain.guidance is None
    assert steered.peak == pytest.approx(plain.peak, rel=1e-4) == pytest.approx(np.ptp(led), 1e-3)
    default = diffusion(model, model, plan, conditions=kept, steps=5)
    assert default.guidance == 5
    none = diffusion(model, model, plan, conditions=kept, steps=5, guidance=1)
    assert none.guidance is None and none.peak == pytest.approx(np.ptp(wanted), 1e-3)


def captures(folder: Path) -> Path:
    """Two prompts at two steps as a pipeline feeds its UNet, a file a call, negative row first."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prompt in range(2):
        text = rng.standard_normal((2, 77, 8)).astype(np.float16)
        text[0] = 0
        pooled, ids = rng.standard_normal((2, 6)), np.full((2, 6), 1.0)
        for step in range(2):
            latents = rng.standard_normal((1, 4, 4, 6)).repeat(2, axis=0)
            np.savez(
                folder / f"{prompt:04}-{step:04}.npz",
                sample=latents.astype(np.float16),
                timestep=np.full(2, 900.0 - step),
                encoder_hidden_states=text,
                text_embeds=pooled.astype(np.float16),
                time_ids=ids.astype(np.float16),
            )
    return folder


@pytest.mark.parametrize(
    ("batch", "timestep"),
    [("B", "float16[B]"), ("2", "float16[2]"), ("3", "int64[1]"), ("1", "float")],
)
def test_the_form_of_sdxl(tmp_path: Path, batch: str, timestep: str) -> None:
    """Captures say what is asked for and how large samples are; any fixed batch will do."""
    folder = captures(tmp_path / "captures")
    model = write(tmp_path / "m.onnx", SDXL_FORM.format(B=batch, T=timestep))
    plan = find_schedule(None, model)
    assert plan.source == "SDXL's"
    found = diffusion(model, model, plan, conditions=folder, steps=2)
    assert found.samples == 2 and found.guidance == 5.0 and found.exact == 2
    # Linear in the sample: by hand in float64.
    made = []
    for prompt in range(2):
        fed = np.load(folder / f"{prompt:04}-0000.npz")
        sides = fed["encoder_hidden_states"].mean((1, 2), dtype=np.float64)
        sides += fed["text_embeds"].mean(1, dtype=np.float64)
        now = np.random.default_rng(prompt).standard_normal((4, 4, 6))
        for visited, following in ((501, 1), (1, 0)):  # behind the last: the first alpha
            a, b = plan.alphas[visited], plan.alphas[following]
            epsilon = now + sides[0] + 5 * (sides[1] - sides[0])
            clean = (now - np.sqrt(1 - a) * epsilon) / np.sqrt(a)
            now = np.sqrt(b) * clean + np.sqrt(1 - b) * epsilon
        made.append(now)
    # FP16 rounds what the model reads and gives: 2^-11 of values around 10.
    assert found.peak == pytest.approx(np.ptp(made), rel=2e-2)
    picture = tmp_path / "p.png"
    alone = diffusion(model, model, plan, conditions=folder, steps=2, samples=1, picture=picture)
    assert alone.peak == pytest.approx(np.ptp(made[0]), rel=2e-2)
    assert png(picture).shape[2] == 3


def test_conditions_are_taken_once(tmp_path: Path) -> None:
    names = ["encoder_hidden_states", "text_embeds", "time_ids"]
    folder = captures(tmp_path / "captures")
    found = read_conditions(folder, names)
    assert found.count == 2 and found.size == (4, 4, 6) and found.negative is not None
    assert not found.negative["encoder_hidden_states"].any()
    assert found.wanted["encoder_hidden_states"].all()
    # The same two by two in one file, as random data for calibration has them.
    calls = [dict(np.load(file)) for file in sorted(folder.glob("*.npz"))]
    joined = {name: np.concatenate([call[name] for call in calls]) for name in calls[0]}
    np.savez(tmp_path / "rows.npz", **joined)
    again = read_conditions(tmp_path / "rows.npz", names)
    assert again.count == 2
    assert np.array_equal(again.wanted["text_embeds"], found.wanted["text_embeds"])
    # Rows of which no two share a sample are a condition each, with nothing negative.
    joined["sample"] = np.random.default_rng(0).standard_normal(joined["sample"].shape)
    np.savez(tmp_path / "rows.npz", **joined)
    assert read_conditions(tmp_path / "rows.npz", names).negative is None


def classifier(path: Path, classes: int) -> Path:
    """The scores are the first numbers of the sample."""
    graph = f"""agraph (float[N,1,4,4] x) => (float[N,{classes}] scores) {{
        shape = Constant<value = int64[2] {{-1, 16}}>()  flat = Reshape(x, shape)
        first = Constant<value = int64[1] {{0}}>()
        last = Constant<value = int64[1] {{{classes}}}>()
        axis = Constant<value = int64[1] {{1}}>()  scores = Slice(flat, first, last, axis) }}"""
    return write(path, graph)


def test_classes_are_matched(tmp_path: Path, plan: Schedule) -> None:
    """Four conditions; of the last the shifted model makes another class than the original."""
    target = np.zeros((4, 1, 4, 4), np.float32)
    for row, first in enumerate([(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0.1, 0)]):
        target[row, 0, 0, :3] = first
    conditions = guided(tmp_path, {"target": target, "label": [0, 1, 0, 1]})
    judge = classifier(tmp_path / "c.onnx", 3)
    model = point_model(tmp_path / "m.onnx", plan)
    other = write(
        tmp_path / "other.onnx",
        POINT.format().replace(
            "clean = Mul(root, target)", "moved = Add(target, move) clean = Mul(root, moved)"
        ),
        alphas=plan.alphas.astype(np.float32),
        move=np.float32([0.2, 0, 0, 0]).reshape(1, 1, 1, 4)
        * np.float32([1, 0, 0, 0]).reshape(4, 1),
    )
    found = diffusion(
        other, model, plan, conditions=conditions, steps=5, samples=8, classifier=judge, batch=3
    ).match
    assert found == Match(8, 4, 6, found.low, found.high, -0.25, *paired(0, 2, 8), 0.75)
    assert (found.low, found.high) == pytest.approx((0.2152, 0.7848), abs=1e-4)  # Wilson, 4 of 8
    assert found.difference_low < -0.25 < found.difference_high


@pytest.mark.parametrize(("gained", "lost", "trials"), [(0, 0, 50), (2, 9, 100), (30, 4, 60)])
def test_the_paired_interval_covers(gained: int, lost: int, trials: int) -> None:
    """Agresti and Min 2005, equation 3.1 with t = 2, as they write it: by cells."""
    b, c, n = gained + 0.5, lost + 0.5, trials + 2
    p12, p21 = b / n, c / n
    half = 1.959964 * math.sqrt(((p12 + p21) - (p12 - p21) ** 2) / n)
    assert paired(gained, lost, trials) == pytest.approx((p12 - p21 - half, p12 - p21 + half))


def png(path: Path) -> np.ndarray[Any, Any]:
    """The pixels [height, width, channels], read by the specification."""
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    parts, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        (check,) = struct.unpack(">I", content[at + 8 + length : at + 12 + length])
        assert check == zlib.crc32(kind + body)
        parts[kind], at = body, at + 12 + length
    width, height, depth, color = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    channels = {0: 1, 2: 3}[color]
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8)
    lines = lines.reshape(height, 1 + width * channels)
    assert depth == 8 and not lines[:, 0].any()
    return lines[:, 1:].reshape(height, width, channels)


def test_the_picture_shows_both(tmp_path: Path, plan: Schedule, targets: Path) -> None:
    """Originals above, scaled from black to white; what stands below is the other model's."""
    exact, shifted = point_model(tmp_path / "m.onnx", plan), tmp_path / "shifted.onnx"
    point_model(shifted, plan, 0.25)
    path = tmp_path / "grid.png"
    diffusion(shifted, exact, plan, conditions=targets, steps=4, picture=path)
    pixels = png(path)[::16, ::16, 0]  # a side of 4 is enlarged to 64
    target = np.load(targets)["target"][:, 0]
    low, high = target.min(), target.max()
    for index, picture in enumerate(target):
        shown = pixels[:4, 6 * index : 6 * index + 4].astype(float)
        assert np.abs(shown - 255 * (picture - low) / (high - low)).max() <= 1.5
    assert (pixels[:4, 4] == 255).all() and pixels.shape == (12, 18)
    assert not np.array_equal(pixels[:4, :4], pixels[6:10, :4])


def test_a_broken_candidate(tmp_path: Path, plan: Schedule, targets: Path) -> None:
    model = point_model(tmp_path / "m.onnx", plan)
    broken = point_model(tmp_path / "broken.onnx", plan, float("inf"))
    judge = classifier(tmp_path / "c.onnx", 3)
    found = diffusion(broken, model, plan, conditions=targets, steps=3, classifier=judge)
    assert found.match is not None and found.match.right == 0 and found.match.agreement == 0
    assert found.broken == 3 and math.isnan(found.psnr)
    assert found.by_step[-1][1] is None
    assert "PSNR none: 3 of 3 samples are NaN or infinite" in found.lines()
    assert json.loads(json.dumps(found.as_dict()))["psnr"] == "nan"
    with pytest.raises(OnnxqError, match="is the schedule the model's own"):
        diffusion(model, broken, plan, conditions=targets, steps=3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot read the schedule"),
        ("[]", "holds no schedule but a list"),
        ('{"beta_schedule": "sigmoid"}', "beta_schedule is 'sigmoid'"),
        ('{"beta_start": 2}', "beta_start is 2"),
        ('{"num_train_timesteps": 0}', "num_train_timesteps is 0"),
        ('{"num_train_timesteps": 1e3}', "num_train_timesteps is 1000.0"),
        ('{"prediction_type": ["epsilon"]}', "prediction_type is"),
        ('{"thresholding": true}', "thresholding is not supported"),
        ('{"trained_betas": "few"}', "trained_betas is no list"),
        ('{"trained_betas": [0.1, 1.5]}', "not all between 0 and 1"),
        ('{"rescale_betas_zero_snr": true}', "no epsilon is defined"),
        ('{"steps_offset": -1}', "steps_offset is -1"),
    ],
)
def test_what_is_no_schedule(tmp_path: Path, config: str, message: str) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(config)
    with pytest.raises(OnnxqError, match=message):
        find_schedule(path, tmp_path / "m.onnx")


def test_where_the_schedule_is_found(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "scheduler").mkdir()
    model = tmp_path / "unet/model.onnx"
    (tmp_path / "scheduler/scheduler_config.json").write_text('{"beta_schedule": "linear"}')
    assert find_schedule(None, model).alphas[0] == pytest.approx(1 - 0.0001)
    (tmp_path / "unet/scheduler_config.json").write_text('{"trained_betas": [0.5]}')
    assert len(find_schedule(None, model).alphas) == 1
    found = find_schedule(tmp_path / "scheduler", model, "scaled_linear", "v_prediction")
    assert found.prediction == "v_prediction"
    assert found.alphas[499] == pytest.approx(
        np.prod(1 - np.linspace(0.0001**0.5, 0.02**0.5, 1000)[:500] ** 2)
    )


def test_as_data_and_as_text() -> None:
    found = Diffusion(
        4,
        6,
        5.0,
        31.25,
        0.5,
        28.0,
        2,
        2.0,
        by_step=tuple((600 - 100 * i, 20.0 + i) for i in range(6)),
    )
    assert (
        found.lines()[1] == "PSNR 31.25 +- 0.50 dB mean, 28.00 dB worst (sample 2), of a range of 2"
    )
    assert "600: 20.00, 500: 21.00" in found.lines()[2] and "100: 25.00" in found.lines()[2]
    assert found.as_dict()["by_step"][0] == {"timestep": 600, "snr_db": 20.0}
