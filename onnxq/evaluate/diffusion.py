"""Samples of a quantized diffusion model against the original's from the same noise.

Both models walk down the same timesteps from the same noise under the same conditions, by DDIM
without randomness, so that what differs in the end is what quantization did, all steps together.
The original goes first and its samples at every step wait on disk: one model is in memory at a
time. Sample i starts from the standard normal numbers of numpy's default_rng(seed + i).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.evaluate.conditions import Conditions, read_conditions
from onnxq.evaluate.denoiser import Denoiser, Ports, denoiser
from onnxq.evaluate.matching import Classifier, Match, match
from onnxq.evaluate.metrics import FloatError, jsonable
from onnxq.evaluate.picture import refuse_picture, side_by_side
from onnxq.evaluate.runners import Device
from onnxq.evaluate.schedule import Schedule
from onnxq.evaluate.spool import Spool, spool
from onnxq.evaluate.tables import decibels
from onnxq.progress import Progress, silent

Array = NDArray[Any]
Doubles = NDArray[np.float64]

GUIDANCE = 5.0
"""What diffusers' SDXL pipeline takes; where there is nothing to lead away from, none is."""

_SHOWN_STEPS = 5


@dataclass(frozen=True)
class Diffusion:
    """How far `samples` samples are from the original's.

    Attributes:
        psnr: mean over the samples of each one's peak signal-to-noise ratio in dB, over those that
            differ at all (`exact` do not); inf if none does, NaN if any is NaN or infinite
            (`broken` are).
        psnr_error: its standard error, from the spread of the samples; NaN for one.
        worst, worst_sample: the least of them, in dB, and whose it is.
        peak: what the ratio is of: the largest less the smallest value of the original's samples.
        by_step: for each step its timestep and the SNR in dB of the samples behind it, over all
            samples; None where they are NaN or infinite.
        schedule: what was sampled by.
        match: what a classifier makes of the samples, if there was one.
        each: the ratio of each sample in dB, so that two candidates can be held against each other
            sample by sample.
        notes: how the models were run.
    """

    samples: int
    steps: int
    guidance: float | None
    psnr: float
    psnr_error: float
    worst: float
    worst_sample: int
    peak: float
    exact: int = 0
    broken: int = 0
    by_step: tuple[tuple[int, float | None], ...] = ()
    schedule: dict[str, Any] = field(default_factory=dict)
    match: Match | None = None
    each: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON; NaN and infinities are strings."""
        values = {k: jsonable(v) if isinstance(v, float) else v for k, v in asdict(self).items()}
        values["by_step"] = [
            {"timestep": timestep, "snr_db": jsonable(snr)} for timestep, snr in self.by_step
        ]
        values["each"] = [jsonable(ratio) for ratio in self.each]
        values["match"] = None if self.match is None else self.match.as_dict()
        return values

    def lines(self) -> list[str]:
        """The figures as plain text."""
        guided = "" if self.guidance is None else f", guidance {self.guidance:g}"
        lines = [
            f"{self.samples} sample{'s' * (self.samples != 1)} from the same noise, "
            f"{self.steps} steps of DDIM{guided}, {self.schedule.get('prediction', '')}",
            self._psnr_line(),
        ]
        if 0 < self.exact < self.samples:
            lines.append(f"{self.exact} of {self.samples} samples are exactly the original's")
        shown = _spread(self.by_step, _SHOWN_STEPS)
        lines.append(
            "SNR dB behind timestep "
            + ", ".join(f"{timestep}: {decibels(snr)}" for timestep, snr in shown)
        )
        if self.match is not None:
            lines += self.match.lines()
        return lines + [f"note: {note}" for note in self.notes]

    def _psnr_line(self) -> str:
        if self.broken:
            return f"PSNR none: {self.broken} of {self.samples} samples are NaN or infinite"
        if math.isinf(self.psnr):
            return "PSNR exact: every sample is the original's"
        error = f" +- {self.psnr_error:.2f}" if math.isfinite(self.psnr_error) else ""
        return (
            f"PSNR {self.psnr:.2f}{error} dB mean, {self.worst:.2f} dB worst "
            f"(sample {self.worst_sample}), of a range of {self.peak:.4g}"
        )


def diffusion(
    model: Path,
    reference: Path,
    schedule: Schedule,
    *,
    conditions: Path | None = None,
    steps: int = 20,
    samples: int | None = None,
    seed: int = 0,
    guidance: float | None = None,
    size: tuple[int, ...] | None = None,
    classifier: Path | None = None,
    batch: int = 1,
    picture: Path | None = None,
    device: Device = "auto",
    progress: Progress = silent,
) -> Diffusion:
    """Sample from `model` and from `reference`, and measure how far apart the samples are.

    Args:
        model: a diffusion model in ONNX: sample [batch, ...], timestep, and conditions -> what
            `schedule` says it predicts, in the sample's shape.
        reference: the original, with inputs of the same names.
        conditions: see `onnxq.evaluate.conditions`.
        samples: how many; they take the conditions in turn. None: one of each.
        guidance: w of negative + w (wanted - negative), classifier-free (Ho and Salimans 2022,
            arXiv 2207.12598); None: 5 where the conditions hold negative ones; 1: none.
        size: of a sample without its rows, where neither model nor conditions say it.
        classifier: an ONNX model, samples in, a score for each class out.
        batch: samples at a time; with guidance the models are fed twice as many rows.
        picture: a PNG to write, both models' samples one above the other.

    Raises:
        OnnxqError: unreadable files, models of another kind, conditions that do not fit, or an
            original whose samples are NaN.
    """
    from onnxq.graph.model import Model

    timesteps = schedule.timesteps(steps)
    ports = [Ports(Model.load(path).inputs(), path) for path in (reference, model)]
    if ports[0].others.keys() != ports[1].others.keys():
        raise OnnxqError(
            f"{model} takes {', '.join(ports[1].others) or 'no conditions'}, {reference} takes "
            f"{', '.join(ports[0].others) or 'none'}",
            "only models of the same inputs can be compared",
        )
    asked = read_conditions(conditions, list(ports[0].others))
    plan = _Plan(
        asked,
        schedule,
        timesteps,
        count=samples or asked.count,
        seed=seed,
        guidance=_guidance(guidance, asked),
        size=ports[1].size(ports[0].size(size or asked.size)),
        batch=batch,
        progress=progress,
    )
    if picture is not None:
        refuse_picture(picture, plan.size)
    judge = None if classifier is None else Classifier(classifier, asked, device)
    with spool() as kept:
        with denoiser(reference, device) as (original, said):
            expected = plan.run(original, kept)
            notes = [f"reference: {note}" for note in said]
        if not np.isfinite(expected).all():
            raise OnnxqError(
                f"the samples of {reference} are NaN or infinite",
                "is the schedule the model's own? give --scheduler scheduler_config.json",
            )
        with denoiser(model, device) as (candidate, said):
            found, errors = plan.compare(candidate, kept)
    if picture is not None:
        side_by_side(expected, found, picture)
    return _summary(
        plan,
        expected,
        found,
        errors,
        None if judge is None else match(judge, found, expected, plan.labels()),
        (f"schedule: {schedule.source}", *said, *notes),
    )


@dataclass(frozen=True)
class _Plan:
    """What is sampled, the same for both models."""

    conditions: Conditions
    schedule: Schedule
    timesteps: Sequence[int]
    count: int
    seed: int
    guidance: float | None
    size: tuple[int, ...]
    batch: int
    progress: Progress

    def run(self, model: Denoiser, kept: Spool) -> Array:
        """The samples of the original, those of every step left in `kept`."""
        found = []
        for index, rows in self._batches("original"):
            steps = {str(i): now for i, now in enumerate(self._denoised(model, rows))}
            kept.put("original", index, steps)
            found.append(steps[str(len(steps) - 1)])
        return np.concatenate(found)

    def compare(self, model: Denoiser, kept: Spool) -> tuple[Array, list[FloatError]]:
        """The samples of the other, and how far they were from the original's at every step."""
        found, errors = [], [FloatError() for _ in self.timesteps]
        for index, rows in self._batches("candidate"):
            expected = kept.get("original", index)
            for step, now in enumerate(self._denoised(model, rows)):
                errors[step].add(expected[str(step)], now)
            found.append(now)
        return np.concatenate(found), errors

    def labels(self) -> NDArray[np.int64]:
        """The class that each sample should be of."""
        assert self.conditions.labels is not None
        return self.conditions.labels[np.arange(self.count) % self.conditions.count]

    def _batches(self, label: str) -> Iterator[tuple[int, NDArray[np.int64]]]:
        for index, start in enumerate(range(0, self.count, self.batch)):
            self.progress(f"samples of the {label}", start, self.count)
            yield index, np.arange(start, min(start + self.batch, self.count))
        self.progress(f"samples of the {label}", self.count, self.count)

    def _denoised(self, model: Denoiser, rows: NDArray[np.int64]) -> Iterator[Array]:
        """The samples behind each step."""
        fed = self.conditions.rows(rows, self.guidance is not None)
        now = np.stack([self._noise(int(row)) for row in rows])
        with np.errstate(over="ignore", invalid="ignore"):
            for timestep in self.timesteps:
                if self.guidance is None:
                    predicted = model.predict(now, timestep, fed)
                else:
                    both = model.predict(np.concatenate([now, now]), timestep, fed)
                    negative, wanted = np.split(both, 2)
                    predicted = negative + self.guidance * (wanted - negative)
                now = self.schedule.step(predicted, timestep, now, len(self.timesteps))
                yield now

    def _noise(self, sample: int) -> Array:
        generator = np.random.default_rng(self.seed + sample)
        return generator.standard_normal(self.size).astype(np.float32)


def _guidance(given: float | None, asked: Conditions) -> float | None:
    """The guidance to sample with; None: none."""
    if given is not None and not (math.isfinite(given) and given >= 0):
        raise OnnxqError(f"a guidance of {given}", "1 is none, 5 to 8 are usual")
    if given == 1:
        return None
    if asked.negative is None:
        if given is not None:
            raise OnnxqError(
                "guidance needs what to lead away from, which the conditions lack",
                "give negative.<input> beside each input, captures of guided sampling, or "
                "--guidance 1",
            )
        return None
    return GUIDANCE if given is None else given


def _summary(
    plan: _Plan,
    expected: Array,
    found: Array,
    errors: Sequence[FloatError],
    matched: Match | None,
    notes: tuple[str, ...],
) -> Diffusion:
    peak = float(expected.max()) - float(expected.min())
    ratios = psnr(expected, found, peak)
    broken = np.isnan(ratios)
    differing = ratios[np.isfinite(ratios)]
    worst = int(np.argmax(broken)) if broken.any() else int(np.argmin(ratios))
    mean = math.inf if not len(differing) else float(differing.mean())
    spread = differing.std(ddof=1) / math.sqrt(len(differing)) if len(differing) > 1 else math.nan
    return Diffusion(
        plan.count,
        len(plan.timesteps),
        plan.guidance,
        math.nan if broken.any() else mean,
        math.nan if broken.any() else float(spread),
        float(ratios[worst]),
        worst,
        peak,
        exact=int(np.isposinf(ratios).sum()),
        broken=int(broken.sum()),
        by_step=tuple(zip(plan.timesteps, (e.snr for e in errors), strict=True)),
        schedule=plan.schedule.as_dict(),
        match=matched,
        each=tuple(map(float, ratios)),
        notes=tuple(dict.fromkeys(notes)),
    )


def psnr(expected: Array, found: Array, peak: float) -> Doubles:
    """Peak signal-to-noise ratio in dB of each sample [samples, ...]: 20 lg peak - 10 lg of the
    mean squared error. inf: equal; NaN: NaN or infinite elements."""
    axes = tuple(range(1, expected.ndim))
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        squared = np.square(found.astype(np.float64) - expected.astype(np.float64)).mean(axis=axes)
        ratios = 20 * np.log10(peak) - 10 * np.log10(squared)
    ratios[~np.isfinite(squared)] = math.nan
    ratios[squared == 0] = math.inf
    return np.asarray(ratios, np.float64)


def _spread(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of them, the first and the last among them."""
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)
    return [rows[index] for index in chosen]
