"""What a weight shall come near to, and its zeros, before anything is rounded."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from onnxq.algorithms import STEPS
from onnxq.algorithms.alps import alps
from onnxq.algorithms.gptq import Sweep
from onnxq.algorithms.hessian import damped
from onnxq.algorithms.refit import refit
from onnxq.algorithms.sparsegpt import sparsegpt
from onnxq.algorithms.target import DAMP as PULL
from onnxq.algorithms.target import corrected_target
from onnxq.algorithms.wanda import magnitude_scores, wanda_scores
from onnxq.inputs import Moments, Parts
from onnxq.numerics import FloatArray
from onnxq.sparsity import Mask, Pattern
from onnxq.threads import Once

DAMP = 0.1
"""Added to the diagonal of H, as a share of its mean. Ten times GPTQ's: few rows say little about
where errors may go. On calibration data held back, MiniLM gains 0.3 dB over 0.01 where weights are
pruned, and as much in INT4; 0.03 and 0.3 are both worse there, 0.05 and 0.2 no better here."""

_DAMP_PATCHES = 0.01
"""The same where convolutions are rounded: on PP-OCR 0.1 costs `fp8-gptq` and INT8 1.1 dB."""

_DAMP_FEW = 0.3
"""What is added at least, by inputs for each row that was seen: 4 windows of 128 tokens are a third
of the inputs of SmolLM2's widest layers, and steps that trust them undo what GPTQ gains."""

MEANT = 0.25
"""Share of zeros from which on they are meant. A weight rounded to four bits has up to a fifth."""


@dataclass(frozen=True, eq=False)
class Draft:
    """A weight [K, N] on its way.

    Attributes:
        name: the steps so far, joined by `+`; '' for none.
        target: what its output is to come near to.
        values: what is to be stored, or rounded: `target`, with zeros where there are to be some.
        keep: the weights that may be other than zero; None: all.
        joint: whether rounding may choose the zeros anew.
    """

    name: str
    target: FloatArray
    values: FloatArray
    keep: Mask | None = None
    joint: bool = False

    def behind(self, step: str, **changes: Any) -> Draft:
        """The same after one more step."""
        name = f"{self.name}+{step}" if self.name else step
        return replace(self, name=name, **changes)


class Drafts:
    """Does the steps of a recipe that come before rounding."""

    def __init__(self, steps: tuple[str, ...], pattern: Pattern | None) -> None:
        self.steps, self.pattern = steps, pattern
        self._sweeps: WeakKeyDictionary[Moments, Once[Sweep]] = WeakKeyDictionary()
        self._lock = Lock()

    def of(self, W: FloatArray, parts: Parts, channels: int) -> Iterator[Draft]:
        """The drafts of a weight that may be stored, each with one step more.

        Args:
            W: [K, N].
            channels: how many inputs next to each other a pattern may lie within.
        """
        zero, pattern = W == 0, self._fitting(channels)
        has_it = pattern is not None and pattern.holds(zero, 0)
        keep = ~zero if has_it or zero.mean() >= MEANT else None
        pattern = None if has_it else pattern
        draft = Draft("", W, W, keep)
        if pattern is None:
            yield draft
        for name in self.steps:
            kind = STEPS[name][0]
            if kind == "target" and parts[0].cross is not parts[0].full:
                (target,) = by_part(_target, parts, W)
                values = target if keep is None else np.where(keep, target, 0)
                draft = draft.behind(name, target=target, values=values)
                if pattern is not None:
                    continue
            elif kind == "sparsify" and pattern is not None:
                thin = partial(self._thinned, name, pattern, channels)
                values, keep = by_part(thin, parts, draft.target)
                draft = draft.behind(name, values=values, keep=keep, joint=name == "sparsegpt")
            elif kind == "refit" and draft.keep is not None:
                (values,) = by_part(_refitted, parts, draft.target, draft.keep, draft.values)
                draft = draft.behind(name, values=values, joint=False)
            else:
                continue
            yield draft

    def _fitting(self, channels: int) -> Pattern | None:
        """The pattern, where inputs of so many channels can have it."""
        return None if self.pattern is None or self.pattern.obstacle(channels) else self.pattern

    def _thinned(
        self, name: str, pattern: Pattern, channels: int, moments: Moments, W: FloatArray
    ) -> tuple[FloatArray, Mask]:
        if name == "sparsegpt":
            return sparsegpt(self.sweep_of(moments, channels), W, pattern)
        H = moments.rounded
        if name == "alps":
            return alps(W, damped(H, DAMP), pattern)
        scores = magnitude_scores(W) if name == "magnitude" else wanda_scores(W, np.diag(H))
        keep = pattern.mask(scores)
        return np.where(keep, W, 0), keep

    def sweep_of(self, moments: Moments, channels: int) -> Sweep:
        """Layers that read one tensor alike share its factor."""
        with self._lock:
            make = partial(self._sweep, moments, channels)
            once = self._sweeps.setdefault(moments, Once(make))
        return once()

    def _sweep(self, moments: Moments, channels: int) -> Sweep:
        pattern = self._fitting(channels)
        damp, group = rounding_damp(moments), 1
        if pattern is not None:
            damp, group = DAMP, pattern.group
        return Sweep(moments.rounded, damp, act_order=group > 0, group=group or 1)


def rounding_damp(moments: Moments) -> float:
    """What is added to the diagonal where weights are rounded."""
    least = _DAMP_PATCHES if moments.patches else DAMP
    return max(least, _DAMP_FEW * len(moments.rounded) / moments.rows) if moments.rows else least


def by_part(
    work: Callable[..., Any], parts: Parts, *columns: FloatArray | None
) -> tuple[FloatArray, ...]:
    """What `work(moments, columns)` makes of each part of a layer, side by side again.

    Args:
        work: gives one array [K, n], or several.
        columns: arrays [K, N], of which each part gets its share; None stays None.
    """
    split = [[None] * len(parts) if c is None else np.hsplit(c, len(parts)) for c in columns]
    made = [work(*each) for each in zip(parts, *split, strict=True)]
    found = [each if isinstance(each, tuple) else (each,) for each in made]
    return tuple(a[0] if len(a) == 1 else np.hstack(a) for a in zip(*found, strict=True))


def _target(moments: Moments, W: FloatArray) -> FloatArray:
    pull = PULL * rounding_damp(moments) / rounding_damp(replace(moments, rows=0))
    return corrected_target(W, moments.rounded, moments.cross, pull)


def _refitted(moments: Moments, target: FloatArray, keep: Mask, start: FloatArray) -> FloatArray:
    return refit(target, keep, damped(moments.rounded, DAMP), start)
