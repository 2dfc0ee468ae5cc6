"""The models of the benchmark: where they lie, their data, shapes and yardstick."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxq.samples import Data

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
        shared: options that name the calibration data of onnxq and its peers alike, side by side;
            empty: the model takes no part in that.
        four: options that name the calibration data of those with INT4 weights, likewise, and
            `heldout_four` what they are judged by; `block`: the length of their blocks.
        tokens: of a language model, the input whose tokens the first output predicts.
        batch: rows of a held-out step.
    """

    name: str
    model: Path
    calib: tuple[str, ...]
    heldout: tuple[str, ...]
    shapes: tuple[str, ...]
    recipes: tuple[str, ...]
    yardstick: tuple[str, Callable[[Path], float]] | None = None
    shared: tuple[str, ...] = ()
    four: tuple[str, ...] = ()
    heldout_four: tuple[str, ...] = ()
    block: int = 64
    tokens: str = ""
    batch: int = 1


def data(options: tuple[str, ...]) -> Data:
    """The samples that options of the command line name."""
    from onnxq.samples import Data

    given = dict(zip(options[::2], options[1::2], strict=True))
    count = {
        name: int(given[flag])
        for flag, name in (("--samples", "samples"), ("--seq-len", "seq_len"), ("--batch", "batch"))
        if flag in given
    }
    return Data(
        path=given.get("--calib", given.get("--data")),
        text=given.get("--text"),
        tokenizer=given.get("--tokenizer"),
        **count,
    )


def _text(name: str, samples: int, folder: Path = SMOLLM2) -> tuple[str, ...]:
    tokenizer = str(folder / "tokenizer.json")
    return ("--text", str(WIKI / name), "--tokenizer", tokenizer, "--samples", str(samples))


def _short(folder: Path) -> tuple[str, ...]:
    """16 windows of 64 tokens: what the peers are run on."""
    return (*_text("wiki_calib.txt", 16, folder), "--seq-len", "64")


def _each(names: tuple[str, ...], shape: str) -> tuple[str, ...]:
    return tuple(f"{name}:{shape}" for name in names)


def perplexity(model: Path, windows: int = 16) -> float:
    """Of the first windows of the evaluation text."""
    from onnxq.evaluate.perplexity import perplexity as measure

    return measure(model, WIKI / "wiki_eval.txt", SMOLLM2 / "tokenizer.json", limit=windows).value


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
            (*_STATIC_AND_DYNAMIC, "fp8-gptq", "int4-rtn", "int4-gptq", "int4-best"),
            ("WordSim353", wordsim),
            shared=_short(OUT / "minilm"),
            four=("--calib", str(OUT / "minilm/calib.npz")),
            heldout_four=("--data", str(OUT / "minilm/heldout.npz")),
            block=32,
        ),
        Case(
            "smollm2",
            SMOLLM2 / "model.onnx",
            _text("wiki_calib.txt", 64),
            _text("wiki_eval.txt", 4),
            _each(("input_ids", "attention_mask"), "1x32,1x256,4x512"),
            (
                "fp8-gptq",
                "fp8",
                "fp8-attention",
                "int8",
                "fp8-dynamic",
                "int8-dynamic",
                "int4-rtn",
                "int4-gptq",
                "int4-best",
                "w4a8-gptq",
            ),
            ("perplexity", perplexity),
            shared=_short(SMOLLM2),
            # ModelOpt's AWQ runs all of it again for each of 210 weights.
            four=(*_text("wiki_calib.txt", 4), "--seq-len", "128"),
            heldout_four=_text("wiki_eval.txt", 16),
            tokens="input_ids",
        ),
        Case(
            "ppocr",
            OUT / "ppocr_rec/model.onnx",
            ("--calib", str(OUT / "ppocr_rec/calib.npz")),
            ("--data", str(OUT / "ppocr_rec/heldout.npz")),
            ("x:1x3x48x32,4x3x48x320,8x3x48x640",),
            _STATIC_AND_DYNAMIC,
            ("character errors %", character_errors),
            shared=("--calib", str(OUT / "ppocr_rec/calib.npz")),
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
