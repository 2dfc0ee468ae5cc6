"""Noise schedules of diffusion models, and DDIM's deterministic step through them.

A schedule is read from the `scheduler_config.json` that diffusers keeps with a model, whichever
scheduler it names: betas, prediction type and spacing of timesteps mean the same to all of them.
Sampling is DDIM's with eta 0 (Song et al. 2021, arXiv 2010.02502, equation 12), so that the same
noise gives the same sample.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.files import refuse_unreadable

Array = NDArray[Any]

CONFIG = "scheduler_config.json"
BETAS = ("scaled_linear", "linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
SDXL: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "set_alpha_to_one": False,
}
"""Stable Diffusion XL's, and what is taken where nothing is said; Stable Diffusion 1 and 2 share
its betas."""

_MOST_STEPS = 100_000
_LARGEST_BETA = 0.999  # of the cosine schedule (Nichol and Dhariwal 2021, arXiv 2102.09672)


@dataclass(frozen=True)
class Schedule:
    """Signal left at each training timestep, and how a sampler walks down them.

    Attributes:
        alphas: cumulative products of 1 - beta, float64 [training timesteps], falling.
        prediction: what the model gives: `epsilon` (the noise), `v_prediction` or `sample`.
        spacing: which timesteps a sampler of fewer steps visits; `offset` is added (leading).
        last: the alpha behind the last step.
        clip: the largest magnitude of a sample while it is denoised; None: any.
        source: where it was read, for people.
    """

    alphas: NDArray[np.float64]
    prediction: str = "epsilon"
    spacing: str = "leading"
    offset: int = 0
    last: float = 1.0
    clip: float | None = None
    source: str = ""

    def timesteps(self, count: int) -> list[int]:
        """The `count` timesteps a sampler visits, from the noisiest down.

        Raises:
            OnnxqError: more than the model was trained on.
        """
        trained = len(self.alphas)
        if not 1 <= count <= trained:
            raise OnnxqError(f"{count} steps of the {trained} that the model was trained on")
        visited: Array
        if self.spacing == "linspace":
            visited = np.linspace(0, trained - 1, count).round()[::-1]
        elif self.spacing == "trailing":
            visited = np.round(np.arange(trained, 0, -trained / count)) - 1
        else:
            visited = (np.arange(count) * float(trained // count))[::-1] + self.offset
        return [min(int(t), trained - 1) for t in visited[:count]]

    def step(self, predicted: Array, timestep: int, sample: Array, count: int) -> Array:
        """The sample one step of `count` further, float32, from what the model predicted for it."""
        alpha = float(self.alphas[timestep])
        before = timestep - len(self.alphas) // count
        alpha_before = float(self.alphas[before]) if before >= 0 else self.last
        signal, noise = math.sqrt(alpha), math.sqrt(1 - alpha)
        if self.prediction == "epsilon":
            clean, added = (sample - noise * predicted) / signal, predicted
        elif self.prediction == "v_prediction":
            clean = signal * sample - noise * predicted
            added = signal * predicted + noise * sample
        else:
            clean, added = predicted, (sample - signal * predicted) / noise
        if self.clip is not None:
            clean = clean.clip(-self.clip, self.clip)
        found = math.sqrt(alpha_before) * clean + math.sqrt(1 - alpha_before) * added
        return np.asarray(found, np.float32)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all but the alphas."""
        return {
            "source": self.source,
            "trained_timesteps": len(self.alphas),
            "prediction": self.prediction,
            "spacing": self.spacing,
            "clip": self.clip,
        }


def find_schedule(
    given: Path | None, model: Path, betas: str | None = None, prediction: str | None = None
) -> Schedule:
    """The schedule of a model.

    Args:
        given: a scheduler_config.json, or the folder that holds one; None: the one beside the
            model, or in `../scheduler` as a diffusers pipeline has it; else SDXL's.
        betas, prediction: in place of what the file says.

    Raises:
        OnnxqError: unreadable, or no schedule that DDIM can walk.
    """
    path = _config(given, model)
    config, source = (SDXL, "SDXL's") if path is None else (_read(path), str(path))
    changes = {"beta_schedule": betas, "prediction_type": prediction}
    changed = {name: value for name, value in changes.items() if value is not None}
    if changed:
        source += ", with " + " and ".join(changed.values())
    return schedule({**config, **changed}, source)


def schedule(config: Mapping[str, Any], source: str) -> Schedule:
    """A schedule from the fields of a scheduler_config.json; those it lacks are diffusers' defaults
    for DDIM, except that nothing is clipped unless it says so.

    Raises:
        OnnxqError: a field that is no schedule's.
    """
    known = _Fields(config, source)
    if config.get("thresholding"):
        raise OnnxqError(f"{source}: thresholding is not supported", "only clip_sample is")
    alphas = np.cumprod(1 - _betas(known), dtype=np.float64)
    prediction = known.choice("prediction_type", "epsilon", PREDICTIONS)
    if config.get("rescale_betas_zero_snr"):
        alphas = _without_signal(alphas)
        if prediction == "epsilon":
            raise OnnxqError(f"{source}: without signal at the last timestep no epsilon is defined")
    return Schedule(
        alphas,
        prediction,
        known.choice("timestep_spacing", "leading", SPACINGS),
        known.whole("steps_offset", 0, 0, len(alphas)),
        1.0 if config.get("set_alpha_to_one", True) else float(alphas[0]),
        known.number("clip_sample_range", 1.0, 1e9) if config.get("clip_sample") else None,
        source,
    )


class _Fields:
    """A configuration's fields, each checked as it is read."""

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source

    def choice(self, name: str, default: str, known: tuple[str, ...]) -> str:
        value = self.config.get(name, default)
        if value not in known:
            raise OnnxqError(f"{self.source}: {name} is {value!r}", f"known: {', '.join(known)}")
        return str(value)

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        value = self.config.get(name, default)
        if not isinstance(value, int) or not least <= value <= most:
            raise OnnxqError(f"{self.source}: {name} is {value!r}", f"from {least} to {most}")
        return value

    def number(self, name: str, default: float, most: float) -> float:
        value = self.config.get(name, default)
        if not isinstance(value, (int, float)) or not 0 < value < most:
            raise OnnxqError(f"{self.source}: {name} is {value!r}", f"above 0 and below {most:g}")
        return float(value)


def _betas(known: _Fields) -> NDArray[np.float64]:
    """Float64 [training timesteps]."""
    trained = known.config.get("trained_betas")
    if trained is not None:
        try:
            betas = np.asarray(trained, np.float64)
        except (TypeError, ValueError):
            betas = np.zeros(0)
        if betas.ndim != 1 or not 0 < betas.size <= _MOST_STEPS:
            raise OnnxqError(f"{known.source}: trained_betas is no list of numbers")
        if not ((betas > 0) & (betas < 1)).all():
            raise OnnxqError(f"{known.source}: trained_betas are not all between 0 and 1")
        return betas
    count = known.whole("num_train_timesteps", 1000, 1, _MOST_STEPS)
    kind = known.choice("beta_schedule", "linear", BETAS)
    if kind == "squaredcos_cap_v2":
        left = np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.asarray(np.minimum(1 - left[1:] / left[:-1], _LARGEST_BETA), np.float64)
    first = known.number("beta_start", 0.0001, 1)
    last = known.number("beta_end", 0.02, 1)
    if kind == "linear":
        return np.linspace(first, last, count)
    return np.square(np.linspace(math.sqrt(first), math.sqrt(last), count))


def _without_signal(alphas: NDArray[np.float64]) -> NDArray[np.float64]:
    """The last timestep is nothing but noise (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    roots = np.sqrt(alphas)
    scaled = (roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))
    return np.asarray(np.square(scaled), np.float64)


def _config(given: Path | None, model: Path) -> Path | None:
    if given is not None:
        return given / CONFIG if given.is_dir() else given
    places = (model.parent / CONFIG, model.parent.parent / "scheduler" / CONFIG)
    return next((path for path in places if path.is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    hint = "give the scheduler_config.json that diffusers saves with a model"
    refuse_unreadable(path, "the schedule", hint)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OnnxqError(f"cannot read the schedule {path}: {error}", hint) from error
    if not isinstance(config, dict):
        raise OnnxqError(f"{path} holds no schedule but a {type(config).__name__}", hint)
    return config
