"""Multiple-choice accuracy of a causal language model, as MMLU is scored.

The prompt ends with `Answer:`; each letter is scored by the log-likelihood of its continuation,
` A` to ` D`, and the likeliest is the model's choice (the first at a tie). A continuation is every
token from where the four and the prompt part, so that it does not matter whether a tokenizer makes
` A` one token or two, or joins it with what stands before. Where the four share all tokens but the
last, the model runs once a question.

This is the convention of MMLU's own code and of lm-evaluation-harness: no special tokens, no
normalisation by length, letters rather than the text of the choices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.evaluate.language import LanguageModel, language_model, open_tokenizer
from onnxq.evaluate.likelihood import log_softmax
from onnxq.evaluate.metrics import jsonable
from onnxq.evaluate.questions import LETTERS, Question, prompt, read_shots, read_tasks
from onnxq.evaluate.runners import Device
from onnxq.evaluate.shares import wilson
from onnxq.progress import Progress, silent

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Choices:
    """Accuracy over `questions` questions, and how near the model is to its reference.

    Attributes:
        correct: right choices; a question whose logits are NaN or +inf (`broken` of them) has none.
        low, high: 95 % interval of the accuracy (Wilson 1927).
        confidence: mean probability, of the four letters', that the right one gets.
        reference_correct: of the reference; None without one, and so are the next four.
        difference: accuracy less the reference's, and difference_error its standard error, from
            paired questions: much smaller than that of either accuracy.
        agreement: share of questions at which both choose alike, right or wrong.
        divergence: mean KL(reference || model) over the four letters, in nats.
        subjects: subject -> (questions, correct, correct of the reference or None).
        notes: how the models were asked and run.
    """

    questions: int
    correct: int
    low: float
    high: float
    confidence: float
    broken: int = 0
    reference_correct: int | None = None
    difference: float | None = None
    difference_error: float | None = None
    agreement: float | None = None
    divergence: float | None = None
    subjects: dict[str, tuple[int, int, int | None]] | None = None
    notes: tuple[str, ...] = ()

    @property
    def accuracy(self) -> float:
        """Share of right choices."""
        return self.correct / self.questions

    def as_dict(self) -> dict[str, Any]:
        """For JSON; NaN and infinities are strings."""
        values = {"accuracy": self.accuracy, **asdict(self)}
        return {k: jsonable(v) if isinstance(v, float) else v for k, v in values.items()}

    def lines(self) -> list[str]:
        """The figures as plain text."""
        lines = [
            f"accuracy  {_percent(self.accuracy)} ({self.correct} of {self.questions}), "
            f"95 % interval {_percent(self.low)} to {_percent(self.high)}; "
            f"right letter's probability {self.confidence:.4f} of the four"
        ]
        if self.broken:
            lines.append(
                f"the logits of {self.broken} questions are NaN or infinite: counted wrong"
            )
        if self.reference_correct is not None:
            assert self.difference is not None and self.difference_error is not None
            lines += [
                f"reference {_percent(self.reference_correct / self.questions)} "
                f"({self.reference_correct} of {self.questions}), difference "
                f"{100 * self.difference:+.2f} +- {100 * self.difference_error:.2f} points",
                f"same choice at {_percent(self.agreement or 0.0)} of questions, "
                f"KL(reference || model) {self.divergence:.5f} nats over the four letters",
            ]
        return lines + [f"note: {note}" for note in self.notes]


def choice(
    model: Path,
    tasks: Path,
    tokenizer: Path,
    *,
    shots: Path | None = None,
    limit: int | None = None,
    special_tokens: bool = False,
    reference: Path | None = None,
    device: Device = "auto",
    progress: Progress = silent,
) -> Choices:
    """Accuracy of `model` on multiple-choice questions, and its distance from `reference`.

    Args:
        model: an ONNX causal language model, as `perplexity` takes it.
        tasks: a CSV in MMLU's format, or a folder of them.
        tokenizer: a tokenizer.json.
        shots: solved examples: a file for all questions, or a folder with a file a subject. A
            question is never among its own examples.
        limit: the first so many questions of each file.
        special_tokens: let the tokenizer add its own, such as a first token that Gemma needs.

    Raises:
        OnnxqError: unreadable files, rows that are no questions, or a model of another kind.
    """
    if limit is not None and limit < 1:
        raise OnnxqError("a limit of no questions", "give --limit 1 or more, or leave it out")
    questions = read_tasks(tasks, limit)
    examples = read_shots(shots, questions)
    encoder = open_tokenizer(tokenizer)
    asked = [_encoded(encoder, q, examples[q.subject], special_tokens) for q in questions]
    with ExitStack() as stack:
        ours, notes = stack.enter_context(language_model(model, device))
        theirs = None
        if reference is not None:
            theirs, said = stack.enter_context(language_model(reference, device))
            notes += [f"reference: {note}" for note in said]
        found, expected = _run(ours, theirs, asked, progress)
    counts = sorted({len(examples[q.subject]) for q in questions})
    notes.insert(0, _convention("/".join(map(str, counts)), special_tokens))
    return _summary(questions, found, expected, notes)


@dataclass(frozen=True)
class _Asked:
    """A question in tokens: prompt and continuation of each letter, which begins at `start`."""

    whole: tuple[tuple[int, ...], ...]
    start: int


def _encoded(encoder: Any, question: Question, shots: Sequence[Question], special: bool) -> _Asked:
    others = [shot for shot in shots if shot != question]
    context = prompt(question, others)
    texts = [context, *(f"{context} {letter}" for letter in LETTERS)]
    rows = [tuple(e.ids) for e in encoder.encode_batch(texts, add_special_tokens=special)]
    start = _shared(rows)
    whole = tuple(rows[1:])
    if start < 1 or len(set(whole)) < len(LETTERS) or any(len(row) <= start for row in whole):
        raise OnnxqError(
            f"the tokenizer does not tell the answers ' A' to ' D' apart: {question.text[:60]!r}",
            "is it the tokenizer of this model?",
        )
    return _Asked(whole, start)


def _shared(rows: Sequence[tuple[int, ...]]) -> int:
    """How many tokens all rows begin with."""
    alike = (len(set(column)) == 1 for column in zip(*rows, strict=False))
    return sum(itertools.takewhile(bool, alike))


def _run(
    ours: LanguageModel, theirs: LanguageModel | None, asked: Sequence[_Asked], progress: Progress
) -> tuple[Doubles, Doubles | None]:
    """Log-likelihoods [questions, letters] of the model, and of the reference."""
    found, expected = [], []
    for index, one in enumerate(asked):
        progress("questions", index, len(asked))
        found.append(_likelihoods(ours, one))
        if theirs is not None:
            expected.append(_likelihoods(theirs, one))
    progress("questions", len(asked), len(asked))
    return np.array(found), np.array(expected) if theirs is not None else None


def _likelihoods(model: LanguageModel, asked: _Asked) -> list[float]:
    """ln p(continuation | prompt) of each letter."""
    known: dict[tuple[int, ...], Doubles] = {}
    found = []
    for row in asked.whole:
        fed = row[:-1]
        if fed not in known:
            with np.errstate(invalid="ignore", over="ignore"):
                logits = model.logits(np.array(fed, np.int64), pad=True)[asked.start - 1 :]
                known[fed] = log_softmax(logits)
        targets = np.array(row[asked.start :])
        found.append(float(known[fed][np.arange(len(targets)), targets].sum()))
    return found


def _summary(
    questions: Sequence[Question], found: Doubles, expected: Doubles | None, notes: Sequence[str]
) -> Choices:
    answers = np.array([question.answer for question in questions])
    right, broken = _right(found, answers)
    shares = np.exp(log_softmax(found))
    low, high = wilson(int(right.sum()), len(answers))
    rest: dict[str, Any] = {}
    theirs = None
    if expected is not None:
        theirs, _ = _right(expected, answers)
        gained = right.astype(np.float64) - theirs
        rest = {
            "reference_correct": int(theirs.sum()),
            "difference": float(gained.mean()),
            "difference_error": float(gained.std(ddof=1) / math.sqrt(len(gained)))
            if len(gained) > 1
            else math.nan,
            "agreement": _agreement(_chosen(found), _chosen(expected)),
            "divergence": _divergence(expected, found),
        }
    return Choices(
        len(answers),
        int(right.sum()),
        low,
        high,
        float(shares[np.arange(len(answers)), answers].mean()),
        broken,
        **rest,
        subjects=_by_subject(questions, right, theirs),
        notes=tuple(notes),
    )


def _right(scores: Doubles, answers: NDArray[Any]) -> tuple[NDArray[np.bool_], int]:
    return _chosen(scores) == answers, int((_chosen(scores) < 0).sum())


def _chosen(scores: Doubles) -> NDArray[Any]:
    """The likeliest letter of each question; -1 where the scores are NaN."""
    return np.where(np.isnan(scores).any(axis=1), -1, scores.argmax(axis=1))


def _agreement(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    return float(((ours == theirs) & (ours >= 0)).mean())


def _divergence(reference: Doubles, model: Doubles) -> float:
    """Mean KL(reference || model) over the letters, in nats; a term of probability 0 counts 0."""
    with np.errstate(invalid="ignore"):
        theirs, ours = log_softmax(reference), log_softmax(model)
        probability = np.exp(theirs)
        terms = np.where(probability == 0, 0.0, probability * (theirs - ours))
    return float(terms.sum(axis=1).mean())


def _by_subject(
    questions: Sequence[Question], right: NDArray[np.bool_], theirs: NDArray[np.bool_] | None
) -> dict[str, tuple[int, int, int | None]]:
    found = {}
    for subject in sorted({question.subject for question in questions}):
        rows = np.array([question.subject == subject for question in questions])
        reference = None if theirs is None else int(theirs[rows].sum())
        found[subject] = (int(rows.sum()), int(right[rows].sum()), reference)
    return found


def _convention(shots: str, special_tokens: bool) -> str:
    tokens = "the tokenizer's special tokens" if special_tokens else "no special tokens"
    return (
        f"MMLU's prompt with {shots} examples, {tokens}; scored by the log-likelihood of "
        "' A' to ' D' after 'Answer:'; 25 % is chance"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
