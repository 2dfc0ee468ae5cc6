"""What a compiled model should gain on GPUs that are not at hand: two plans, a card at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxq.errors import OnnxqError
from onnxq.gpus import GPUS, TARGETS, Gpu, gpu
from onnxq.gpus import target as find_target
from onnxq.progress import Progress, silent

if TYPE_CHECKING:
    from onnxq.engine.build import BuildResult
    from onnxq.engine.roofline import Assumptions, Share, Work


@dataclass(frozen=True)
class CardTime:
    """One run on a card. Times in seconds; `before` is the original's, None without one.

    `shares` and `shares_before` say where it goes, by kind of kernel and format.
    """

    card: str
    seconds: float
    shares: tuple[Share, ...]
    before: float | None = None
    shares_before: tuple[Share, ...] = ()

    @property
    def speed_up(self) -> float | None:
        """How many times as fast as the original."""
        return None if self.before is None else self.before / self.seconds


@dataclass(frozen=True)
class Prediction:
    """Times on some cards under one set of assumptions, for inputs of `shapes`."""

    assumed: Assumptions
    shapes: tuple[str, ...]
    times: tuple[CardTime, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for the report."""
        from onnxq.report import plain

        cards = [{**plain(time), "speed_up": time.speed_up} for time in self.times]
        return {"assumed": plain(self.assumed), "shapes": list(self.shapes), "cards": cards}

    def lines(self) -> list[str]:
        """A line a card, where the time of the first goes, and the assumptions."""
        lines = []
        for time in self.times:
            line = f"predicted on {time.card}: {_ms(time.seconds)}"
            if time.before is not None:
                line += f", FP16 {_ms(time.before)}: {time.speed_up:.2f} x"
            lines.append(line)
        first = self.times[0]
        lines.append(f"  of these on {first.card}:")
        for title, shares in (("", first.shares), ("FP16: ", first.shares_before)):
            lines += [f"    {title}{_described(share)}" for share in shares]
        lines.append(f"  assumed: {self.assumed}; no cache")
        return lines


def find_cards(names: Iterable[str], target: str) -> list[Gpu]:
    """The GPUs named; without names those that `target` names, or all of its compute capability.

    Raises:
        OnnxqError: an unknown GPU, or one that engines for `target` do not run on.
    """
    parts = [part.strip() for part in target.split(",")]
    compiled = [find_target(part).name for part in parts]
    named = [gpu(name) for name in names]
    for card in named:
        if card.sm not in compiled:
            raise OnnxqError(
                f"{card.name} is {card.sm}, and the engine is for {', '.join(compiled)}",
                f"compile for it: --target {card.sm}",
            )
    found = named or [gpu(part) for part in parts if part.lower() not in TARGETS]
    return found or [card for card in GPUS.values() if card.sm in compiled]


def predict(
    built: BuildResult,
    cards: Sequence[Gpu],
    *,
    beside: Path | None = None,
    again: bool = False,
    progress: Progress = silent,
) -> Prediction | None:
    """Predict a run of a compiled model, and of its original in FP16, at the optimum shapes.

    Args:
        cards: where.
        beside: the original; in FP32 it is converted as `quantize` would do.
        again: an engine of dynamic shapes, whose layers do not say how large anything is, is
            compiled once more, at the optimum of its first profile. So it is with `beside`.

    Returns:
        None where no card is known, or the shapes are dynamic.

    Raises:
        OnnxqError: the original does not compile.
    """
    from onnxq.engine.roofline import Assumptions, seconds, shares, work

    plan = work(built.layers)
    if not cards or (plan is None and not again and beside is None):
        return None
    fixed, assumed = _optimum(built), Assumptions()
    plan = plan or _compiled(built.model, fixed, built, progress)
    before = _original(beside, fixed, built, progress) if beside is not None else None
    times = []
    for card in cards:
        time = CardTime(card.name, seconds(plan, card, assumed), tuple(shares(plan, card, assumed)))
        if before is not None:
            parts = tuple(shares(before, card, assumed))
            time = replace(time, before=seconds(before, card, assumed), shares_before=parts)
        times.append(time)
    return Prediction(assumed, tuple(fixed), tuple(times))


def _optimum(built: BuildResult) -> list[str]:
    """The optimum shapes of the first profile, as `--shapes` has them."""
    from onnxq.engine.shapes import format_shape

    profile = built.profiles[0] if built.profiles else ()
    return [f"{entry.name}:{format_shape(entry.optimum)}" for entry in profile]


def _original(model: Path, fixed: list[str], built: BuildResult, progress: Progress) -> list[Work]:
    from onnxq.base import write_fp16
    from onnxq.files import scratch

    with scratch() as folder:
        return _compiled(write_fp16(model, folder) or model, fixed, built, progress)


def _compiled(model: Path, fixed: list[str], built: BuildResult, progress: Progress) -> list[Work]:
    from onnxq.engine.build import build
    from onnxq.engine.roofline import work

    again = build(
        model,
        target=",".join(built.targets) or "sm89",
        shapes=fixed,
        backend=built.backend,
        progress=progress,
    )
    plan = work(again.layers)
    if plan is None:
        raise OnnxqError(
            f"some shapes inside {model} are dynamic, however large its inputs are",
            "there is nothing to predict from: leave out --gpu and --beside",
        )
    return plan


def _described(share: Share) -> str:
    name = f"{share.kind} {share.dtype}".strip()
    flops = f" {_si(share.flops)}FLOP," if share.flops else ""
    return f"{name}: {share.kernels} kernels,{flops} {_si(share.nbytes)}B, {_ms(share.seconds)}"


def _si(number: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number / 1e3:.3g} k"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
