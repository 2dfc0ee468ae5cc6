"""The decision table, written out by hand; and that every answer can be carried out."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import onnxq.advice as advice_module
from onnxq.advice import FEW, NVFP4, W4A16, Advice, Scheme, Use, advise, gpus_needed, headroom
from onnxq.footprint import Footprint, Kind
from onnxq.gpus import GPUS, gpu
from onnxq.recipe import presets
from onnxq.recommending import recommend

CAREFUL = ("int4-best", "int8-smoothquant-gptq", "fp8-gptq", "nvfp4-gptq")
PLAIN = ("int4-gptq", "int8-smoothquant", "fp8", "nvfp4")
EVERY = {
    *CAREFUL,
    *PLAIN,
    *("int8", "int8-dynamic", "fp8-dynamic", "int4-rtn"),
    *("fp8-sparse24", "int8-smoothquant-sparse24", "int8-weight-only", "fp8-weight-only"),
}
W4, I8, F8, F4 = range(4)

# GPU -> online with few users, offline.
TABLE = {
    "t4": (I8, I8),
    "a100": (W4, I8),
    "l40s": (F8, F8),
    "h100": (W4, F8),
    "b200": (F4, F4),
    "rtx 5090": (F4, F4),
}
CASES = [
    (card, workload, answer[index])
    for card, answer in TABLE.items()
    for index, workload in enumerate(("online", "offline"))
]


def ask(card: str, workload: str, kind: Kind | None = None, **more: object) -> Advice:
    return advise(Use(gpu(card), workload, **more), EVERY, kind)  # type: ignore[arg-type]


@pytest.mark.parametrize(("card", "workload", "answer"), CASES)
def test_the_decision_table(card: str, workload: str, answer: int) -> None:
    found = ask(card, workload, batch=5)
    assert found.recipe == found.wanted == PLAIN[answer]
    careful = ask(card, workload, batch=5, budget=0.005)
    assert careful.scheme is found.scheme
    assert careful.recipe == careful.wanted == CAREFUL[answer]


@pytest.mark.parametrize(("card", "answers"), TABLE.items())
@pytest.mark.parametrize("more", [{"batch": FEW}, {"batch": 64}, {"batch": 1, "saturated": True}])
def test_a_saturated_gpu_quantizes_activations_too(
    card: str, answers: tuple[int, int], more: dict[str, int]
) -> None:
    found = ask(card, "online", **more)
    assert found.recipe == PLAIN[answers[1]] and found.scheme is not W4A16


@pytest.mark.parametrize("card", ["a10", "a30", "rtx 3090", "orin"])
def test_all_of_ampere_is_alike(card: str) -> None:
    assert (ask(card, "online").recipe, ask(card, "offline").recipe) == (PLAIN[W4], PLAIN[I8])


@pytest.mark.parametrize(("card", "answers"), TABLE.items())
@pytest.mark.parametrize("workload", ["online", "offline"])
def test_models_that_do_not_generate_multiply(
    card: str, answers: tuple[int, int], workload: str
) -> None:
    assert ask(card, workload, Kind(generates=False)).recipe == PLAIN[answers[1]]
    convolutions = ask(card, workload, Kind(generates=False, convolutional=True))
    assert convolutions.recipe == ("int8" if answers[1] == I8 else "fp8")


def test_sparsity_is_an_option_where_it_is_there() -> None:
    offline = ask("h100", "offline")
    assert any(note.startswith("fp8-sparse24 ") for note in offline.notes)
    for use in ({"batch": 1}, {"batch": 64}):
        assert not any("sparse24" in note for note in ask("h100", "online", **use).notes)
    without = advise(Use(gpu("h100"), "offline"), EVERY - {"fp8-sparse24"})
    assert not any("sparse" in note for note in without.notes)


def test_a_recipe_that_is_missing_is_said() -> None:
    use = Use(gpu("a100"), "offline", budget=0.005)
    found = advise(use, {"int8-dynamic"})
    assert (found.recipe, found.wanted) == ("int8-dynamic", "int8-smoothquant-gptq")
    assert found.notes[0] == (
        "int8-smoothquant-gptq would be the one, which this onnxq lacks: int8-dynamic is nearest"
    )


def test_reasons_answer_the_questions() -> None:
    found = ask("h100", "online", batch=5, budget=0.005)
    reasons = dict(found.reasons)
    assert list(reasons) == ["workload", "GPU", "concurrency", "accuracy"]
    assert "bytes decide" in reasons["workload"] and "few" in reasons["concurrency"]
    # 989.4e12 operations a second, 3352e9 bytes: half a byte against 2 operations a request.
    assert f"{989.4e12 * 0.5 / (2 * 3352e9):.0f} in theory" in reasons["concurrency"]
    assert "0.5 % may be lost: tight" in reasons["accuracy"]
    assert "5.7 % of MMLU, more than that" in reasons["accuracy"]
    assert any("measure both" in note for note in found.notes)
    assert "from about 8 on" in dict(ask("h100", "online", batch=8).reasons)["concurrency"]
    busy = dict(ask("h100", "online", saturated=True).reasons)
    assert "in full use" in busy["concurrency"]
    assert "multiplications decide" in dict(ask("h100", "offline").reasons)["workload"]


CASES_OF_ALL = itertools.product(
    GPUS, ("online", "offline"), (1, FEW), (0.005, 0.02), (False, True)
)


@pytest.mark.parametrize("case", CASES_OF_ALL, ids=str)
def test_every_answer_is_a_recipe_the_gpu_runs(
    case: tuple[str, str, int, float, bool],
) -> None:
    card, workload, batch, budget, saturated = case
    found = recommend(
        gpu=card, workload=workload, batch=batch, accuracy_budget=budget, saturated=saturated
    )
    assert found.advice is not None
    recipe, target = presets()[found.advice.recipe], gpu(card).target
    for fmt in (recipe.weight_format, recipe.activation_format):
        assert fmt is None or target.runs(fmt.name)
    assert f"--recipe {recipe.name} --target {target.name}" in found.report.facts["command"]
    assert ("--text" in found.report.facts["command"]) is recipe.needs_data
    for note in found.report.notes:
        known = {w.strip("():,") for w in note.split()} & (EVERY | set(presets()))
        assert known <= set(presets()) | {found.advice.wanted}, note


def test_memory_and_gpus() -> None:
    """Llama-3.1-70B or so: 70e9 weights in FP8, 80 layers of 8 heads of 128, in FP16."""
    per_token = 80 * 2 * 8 * 128 * 2
    size = Footprint(
        coded=69_000_000_000, plain=2_000_000_000, full=140_000_000_000, cache=per_token
    )
    use = Use(gpu("h100"), "offline", batch=16, sequence=4096)
    cache = per_token * 16 * 4096
    assert cache == 21_474_836_480
    # 92.5 GB in GPUs of 72 usable; INT4 in blocks of 64 takes 4.25 bits of 8: 60.1 GB.
    assert gpus_needed(use, size.weights + cache) == 2
    said, notes = headroom(use, advise(use, EVERY), size)
    assert "weights 71.00 GB (140.00 GB in 16 bits)" in said
    assert "cache 21.47 GB (16 x 4096 tokens), of 80 GB: 2 GPUs" in said
    assert notes == ("INT4 weights alone (int4-gptq) would take 1 instead of 2",)
    # 137 GB in 8 bits are 72.8 GB in INT4 with its scales: two GPUs as well.
    large = Footprint(coded=137_000_000_000, plain=0, full=0, cache=0)
    assert headroom(use, advise(use, EVERY), large)[1] == ()
    online = Use(gpu("h100"), "online", sequence=4096)
    said, notes = headroom(online, advise(online, EVERY), size)
    taken = 71e9 + per_token * 4096
    assert notes == (
        f"a token reads all of it: {1e3 * taken / 2 / 3352e9:.2g} ms at the least, "
        "at the full bandwidth",
    )


def test_a_cache_of_unknown_size_is_said() -> None:
    use = Use(gpu("l4"), "offline")
    said, notes = headroom(use, advise(use, EVERY), Footprint(1_000_000_000, 0, 0, None))
    assert "cache" not in said and "comes on top" in notes[0]


def test_every_scheme_has_a_recipe_today() -> None:
    schemes = [found for found in vars(advice_module).values() if isinstance(found, Scheme)]
    assert len(schemes) == 8
    for scheme in schemes:
        assert set(scheme.recipes) & presets().keys(), scheme.name
    assert set(NVFP4.wider) <= presets().keys()


def test_what_is_left_to_do_where_too_much_is_lost() -> None:
    """Static INT8 of a language model first loses by its activations' constant scales."""
    known = set(presets())
    for use, said in (
        (Use(gpu("a100"), "offline"), "int8-smoothquant-dynamic, int8-weight-only or the worst"),
        (Use(gpu("h100"), "offline"), "fp8-weight-only or the worst layers left with --keep-flops"),
        (Use(gpu("a100"), "online"), "int8-weight-only or single layers left with --rule"),
    ):
        (note,) = [n for n in advise(use, known).notes if n.startswith("where it loses")]
        assert note.startswith(f"where it loses too much: {said}")


@pytest.mark.parametrize(("card", "name"), [("a100", "int8"), ("l40s", "fp8"), ("b200", "fp8")])
def test_convolutions_keep_calibrated_scales_where_accuracy_is_tight(card: str, name: str) -> None:
    found = ask(card, "offline", Kind(generates=False, convolutional=True), budget=0.005)
    assert found.recipe == name
    said = dict(found.reasons)["accuracy"]
    assert "with care" not in said and "Llama" not in said and said.endswith("measure it")


def test_a_diffusion_unet_gets_its_own_recipes(models: Path) -> None:
    source = models / "sdxl-unet-tiny-fp16" / "model.onnx"
    for card, name in (("a100", "sdxl-int8"), ("l40s", "sdxl-fp8"), ("b200", "sdxl-fp8")):
        found = recommend(source, gpu=card, workload="offline")
        assert found.advice is not None and found.advice.recipe == name
        assert any("--set level=2" in note for note in found.report.notes)
    for other in ("minilm", "ppocr_rec"):
        found = recommend(models / other / "model.onnx", gpu="l40s", workload="offline")
        assert found.advice is not None and found.advice.recipe == "fp8"
