"""`onnxq.evaluate_diffusion`, as the command line and Python callers reach it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxq.progress import Progress, silent
from onnxq.report import Report
from onnxq.results import Sampled

if TYPE_CHECKING:
    from onnxq.calibrate.session import Device

PathLike = str | Path


def evaluate_diffusion(
    model: PathLike,
    reference: PathLike,
    *,
    conditions: PathLike | None = None,
    scheduler: PathLike | None = None,
    betas: str | None = None,
    prediction: str | None = None,
    steps: int = 20,
    samples: int | None = None,
    seed: int = 0,
    guidance: float | None = None,
    size: tuple[int, ...] | None = None,
    classifier: PathLike | None = None,
    batch: int = 1,
    min_psnr: float | None = None,
    picture: PathLike | None = None,
    device: Device = "auto",
    progress: Progress = silent,
) -> Sampled:
    """Sample from a quantized diffusion model and from its original, from the same noise.

    Args:
        conditions: what is asked for: an .npz with an array for each input beside sample and
            timestep, or captures of a pipeline; see `onnxq.evaluate.conditions`.
        scheduler: scheduler_config.json; default: the one beside the original or in ../scheduler,
            else SDXL's. `betas` and `prediction` take the place of what it says.
        steps, samples, seed, guidance, size, batch, picture: see
            `onnxq.evaluate.diffusion.diffusion`.
        classifier: an ONNX model, samples in, scores of classes out, for the share of samples of
            the class that was asked for.
        min_psnr: decibels below which the mean PSNR fails the check.

    Raises:
        OnnxqError: see `onnxq.evaluate.diffusion.diffusion`.
    """
    from onnxq.evaluate.diffusion import diffusion
    from onnxq.evaluate.schedule import find_schedule

    candidate, original = Path(model), Path(reference)
    given = None if scheduler is None else Path(scheduler)
    found = diffusion(
        candidate,
        original,
        find_schedule(given, original, betas, prediction),
        conditions=None if conditions is None else Path(conditions),
        steps=steps,
        samples=samples,
        seed=seed,
        guidance=guidance,
        size=size,
        classifier=None if classifier is None else Path(classifier),
        batch=batch,
        picture=None if picture is None else Path(picture),
        device=device,
        progress=progress,
    )
    facts = {"model": candidate, "reference": original, "seed": seed, **found.as_dict()}
    notes = list(facts.pop("notes"))
    report = Report(f"samples of {candidate.name} against {original.name}", facts, notes)
    return Sampled(report, min_psnr is None or found.psnr >= min_psnr, found)
