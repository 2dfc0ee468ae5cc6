"""Perplexity of a causal language model on a text, and how far it is from its original.

The text is tokenized once, whole, with no special tokens, and cut into consecutive windows
(512 tokens, stride 512; what does not fill the last one is dropped). Every token but a window's
first is scored: perplexity = exp(mean of -ln p(token | those before it in the window)).
Windows run one at a time, so the logits in memory are those of one window (100 MB for 512 tokens
of a vocabulary of 49152), times two with a reference.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.evaluate.language import LanguageModel, language_model, open_tokenizer
from onnxq.evaluate.likelihood import WindowScores, score
from onnxq.evaluate.metrics import jsonable
from onnxq.evaluate.runners import Device
from onnxq.files import refuse_unreadable
from onnxq.progress import Progress, silent

Array = NDArray[Any]


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over `tokens` scored tokens in `windows` windows.

    Attributes:
        value: NaN if any token's logits are NaN or +inf (`broken` of them), inf if a token that
            occurs has probability 0.
        error: standard error of `value`, from the spread of the windows' means (tokens of one
            window depend on each other); NaN for a single window.
        reference: the reference's perplexity; None without one, and so are the next four.
        ratio: value / reference, and ratio_error its standard error, from paired windows: much
            smaller than that of either perplexity.
        divergence: mean KL(reference || model), nats per token.
        agreement: share of tokens at which both put the same token first.
        notes: how the models were run.
    """

    value: float
    error: float
    tokens: int
    windows: int
    broken: int = 0
    reference: float | None = None
    ratio: float | None = None
    ratio_error: float | None = None
    divergence: float | None = None
    agreement: float | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON; NaN and infinities are strings."""
        return {
            name: jsonable(value) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }

    def lines(self) -> list[str]:
        """The figures as plain text."""
        over = f"{self.tokens} tokens in {self.windows} window{'s' * (self.windows != 1)}"
        if self.broken:
            return [
                f"perplexity: none, the logits of {self.broken} of {over} are NaN or infinite",
                *(f"note: {note}" for note in self.notes),
            ]
        lines = [f"perplexity {self.value:.3f}{_plus_minus(self.error)}, {over}"]
        if self.reference is not None and self.ratio is not None and self.ratio_error is not None:
            if math.isnan(self.reference):
                return [*lines, "reference  none, its logits are NaN or infinite"]
            lines += [
                f"reference  {self.reference:.3f}, ratio {self.ratio:.4f}"
                + _plus_minus(self.ratio_error, 4),
                f"KL(reference || model) {self.divergence:.5f} nats a token, "
                f"same first choice at {100 * (self.agreement or 0.0):.2f} % of tokens",
            ]
        return lines + [f"note: {note}" for note in self.notes]


def perplexity(
    model: Path,
    text: Path,
    tokenizer: Path,
    *,
    window: int = 512,
    limit: int | None = None,
    reference: Path | None = None,
    device: Device = "auto",
    progress: Progress = silent,
) -> Perplexity:
    """Perplexity of `model` on `text`, and its distance from `reference` in the same pass.

    Args:
        model: an ONNX causal language model: input_ids [batch, sequence] -> logits
            [batch, sequence, vocabulary]; attention_mask, position_ids and an empty
            past_key_values are given where it asks for them.
        text: UTF-8.
        tokenizer: a tokenizer.json.
        window: tokens a window.
        limit: the first so many windows; None = all.

    Raises:
        OnnxqError: unreadable files, less text than one window, or a model of another kind.
    """
    if window < 2 or (limit is not None and limit < 1):
        raise OnnxqError("perplexity needs windows of 2 tokens or more, and at least one window")
    windows = text_windows(text, tokenizer, window)[:limit]
    with ExitStack() as stack:
        ours, notes = stack.enter_context(language_model(model, device))
        theirs = None
        if reference is not None:
            theirs, said = stack.enter_context(language_model(reference, device))
            notes += [f"reference: {note}" for note in said]
        scored = _scores(ours, theirs, windows, progress)
    return _summary(scored, notes)


def text_windows(text: Path, tokenizer: Path, window: int) -> NDArray[np.int64]:
    """Token ids [windows, window] of the whole text.

    Raises:
        OnnxqError: a file cannot be read, or the text is shorter than one window.
    """
    refuse_unreadable(text, "the text", "a UTF-8 file")
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise OnnxqError(f"cannot read the text {text}: {error}", "a UTF-8 file") from error
    encoder = open_tokenizer(tokenizer)
    ids = encoder.encode(content, add_special_tokens=False).ids
    count = len(ids) // window
    if not count:
        raise OnnxqError(f"{text} has {len(ids)} tokens, less than one window of {window}")
    return np.array(ids[: count * window], np.int64).reshape(count, window)


def _scores(
    ours: LanguageModel,
    theirs: LanguageModel | None,
    windows: NDArray[np.int64],
    progress: Progress,
) -> list[WindowScores]:
    found = []
    for index, tokens in enumerate(windows):
        progress("perplexity", index, len(windows))
        expected = theirs.logits(tokens) if theirs else None
        actual = ours.logits(tokens)
        if expected is not None and expected.shape != actual.shape:
            raise OnnxqError(
                f"the logits are {list(actual.shape)}, the reference's {list(expected.shape)}",
                "model and reference must share one vocabulary",
            )
        found.append(score(actual, tokens, expected))
    progress("perplexity", len(windows), len(windows))
    return found


def _summary(scored: list[WindowScores], notes: list[str]) -> Perplexity:
    surprisal = np.stack([one.surprisal for one in scored])  # [windows, tokens]
    broken = int(np.isnan(surprisal).sum())
    value, error = _exponential(surprisal)
    counts = {"tokens": surprisal.size, "windows": len(scored), "broken": broken}
    first = [one.reference_surprisal for one in scored if one.reference_surprisal is not None]
    if not first:
        return Perplexity(value, error, **counts, notes=tuple(notes))
    reference = np.stack(first)
    with np.errstate(invalid="ignore"):  # infinite on both sides
        ratio, ratio_error = _exponential(surprisal - reference)
    return Perplexity(
        value,
        error,
        **counts,
        reference=_exponential(reference)[0],
        ratio=ratio,
        ratio_error=ratio_error,
        divergence=float(np.mean([one.divergence for one in scored])),
        agreement=float(np.mean([one.agreement for one in scored])),
        notes=tuple(notes),
    )


def _exponential(values: NDArray[np.float64]) -> tuple[float, float]:
    """exp of the mean of values [windows, tokens], and its standard error over the windows."""
    means = values.mean(axis=1)
    with np.errstate(over="ignore", invalid="ignore"):
        value = float(np.exp(means.mean()))
        if len(means) < 2:
            return value, math.nan
        return value, value * float(means.std(ddof=1)) / math.sqrt(len(means))


def _plus_minus(error: float, decimals: int = 3) -> str:
    return f" +- {error:.{decimals}f}" if math.isfinite(error) else ""
