"""From logits to likelihood, Kullback-Leibler divergence and agreement, a few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Doubles = NDArray[np.float64]

# Logits in float64 at a time: 16 MB a temporary, whatever the vocabulary.
_PIECE = 1 << 21


@dataclass(frozen=True)
class WindowScores:
    """One value a scored token; [window - 1] each.

    Attributes:
        surprisal: -ln p(token | those before) by the model; NaN where its logits are NaN or +inf.
        reference_surprisal: the same by the reference; None without one.
        divergence: KL(reference || model) in nats over the vocabulary; None without a reference.
        agreement: whether both put the same token first; None without a reference.
    """

    surprisal: Doubles
    reference_surprisal: Doubles | None = None
    divergence: Doubles | None = None
    agreement: NDArray[np.bool_] | None = None


def score(logits: Array, tokens: Array, reference: Array | None = None) -> WindowScores:
    """Score each token but the first of one window.

    Args:
        logits: [window, vocabulary], any floating dtype; row i predicts token i + 1.
        tokens: [window] ids.
        reference: the reference's logits, as `logits`.
    """
    targets = tokens[1:]
    count = len(targets)
    surprisal, expected, divergence = (np.empty(count) for _ in range(3))
    agreement = np.empty(count, bool)
    step = max(1, _PIECE // logits.shape[-1])
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            chosen = np.arange(rows.stop - rows.start), targets[rows]
            ours = log_softmax(logits[rows])
            surprisal[rows] = -ours[chosen]
            if reference is not None:
                theirs = log_softmax(reference[rows])
                expected[rows] = -theirs[chosen]
                agreement[rows] = ours.argmax(axis=-1) == theirs.argmax(axis=-1)
                divergence[rows] = _divergence(theirs, ours)
    if reference is None:
        return WindowScores(surprisal)
    return WindowScores(surprisal, expected, divergence, agreement)


def log_softmax(logits: Array) -> Doubles:
    """ln softmax over the last axis in float64; a row with NaN or +inf becomes NaN.

    An element of -inf is a token ruled out: its probability is 0.
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def _divergence(reference: Doubles, model: Doubles) -> Doubles:
    """KL(reference || model), row by row; overwrites `model`. A term of probability 0 counts 0."""
    probability = np.exp(reference)
    np.subtract(reference, model, out=model)
    model[probability == 0.0] = 0.0
    found: Doubles = np.einsum("rv,rv->r", probability, model)
    return found
