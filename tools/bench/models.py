"""The models of the benchmark: where they lie, their data, shapes and yardstick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path("models/out")
WIKI = OUT / "wiki"
SMOLLM2 = OUT / "smollm2-fp32"


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        calib, heldout: options that name its data, for `quantize` and `compare`.
        shapes: of the compiled profile.
        recipes: what is measured on it.
        yardstick: name of the task's measure, and the function that takes it of a model.
    """

    name: str
    model: Path
    calib: tuple[str, ...]
    heldout: tuple[str, ...]
    shapes: tuple[str, ...]
    recipes: tuple[str, ...]
    yardstick: tuple[str, Callable[[Path], float]] | None = None


def _text(name: str, samples: int) -> tuple[str, ...]:
    tokenizer = str(SMOLLM2 / "tokenizer.json")
    return ("--text", str(WIKI / name), "--tokenizer", tokenizer, "--samples", str(samples))


def _each(names: tuple[str, ...], shape: str) -> tuple[str, ...]:
    return tuple(f"{name}:{shape}" for name in names)


def perplexity(model: Path) -> float:
    """Of the first 16 windows of the evaluation text."""
    from onnxq.evaluate.perplexity import perplexity as measure

    return measure(model, WIKI / "wiki_eval.txt", SMOLLM2 / "tokenizer.json", limit=16).value


def wordsim(model: Path) -> float:
    """Spearman's rank correlation with WordSim353."""
    from models.minilm_data import wordsim353
    from onnxq.calibrate.session import open_session

    session = open_session(model)

    def embed(feed: dict[str, Any]) -> Any:
        return session.run(["sentence_embedding"], feed)[0]

    return float(wordsim353(embed))


def character_errors(model: Path) -> float:
    """Character error rate on the rendered lines, in percent."""
    from models.ppocr import character_error_rate
    from onnxq.calibrate.session import open_session

    session = open_session(model)
    return 100 * character_error_rate(lambda image: session.run(None, {"x": image})[0])


_STATIC_AND_DYNAMIC = ("fp8", "int8", "fp8-dynamic", "int8-dynamic")

CASES = {
    case.name: case
    for case in (
        Case(
            "minilm",
            OUT / "minilm/model.onnx",
            ("--calib", str(OUT / "minilm/calib.npz")),
            ("--data", str(OUT / "minilm/heldout.npz")),
            _each(("input_ids", "attention_mask", "token_type_ids"), "1x8,4x128,8x256"),
            _STATIC_AND_DYNAMIC,
            ("WordSim353", wordsim),
        ),
        Case(
            "smollm2",
            SMOLLM2 / "model.onnx",
            _text("wiki_calib.txt", 64),
            _text("wiki_eval.txt", 4),
            _each(("input_ids", "attention_mask"), "1x32,1x256,4x512"),
            ("fp8", "fp8-attention", "int8", "fp8-dynamic", "int8-dynamic"),
            ("perplexity", perplexity),
        ),
        Case(
            "ppocr",
            OUT / "ppocr_rec/model.onnx",
            ("--calib", str(OUT / "ppocr_rec/calib.npz")),
            ("--data", str(OUT / "ppocr_rec/heldout.npz")),
            ("x:1x3x48x32,4x3x48x320,8x3x48x640",),
            _STATIC_AND_DYNAMIC,
            ("character errors %", character_errors),
        ),
        Case(
            "sdxl-tiny",
            OUT / "sdxl-unet-tiny-fp16/model.onnx",
            ("--calib", str(OUT / "sdxl-unet-tiny-fp16/calib.npz"), "--batch", "2"),
            ("--data", str(OUT / "sdxl-unet-tiny-fp16/heldout.npz"), "--batch", "2"),
            (
                "sample:2x4x16x16",
                "timestep:2",
                "encoder_hidden_states:2x77x128",
                "text_embeds:2x64",
                "time_ids:2x6",
            ),
            ("fp8", "fp8-attention", "int8", "fp8-dynamic", "int8-dynamic"),
        ),
    )
}
