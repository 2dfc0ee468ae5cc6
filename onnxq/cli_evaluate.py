"""The verbs of `onnxq evaluate`: what a model is worth on a task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.cli_options import MODEL, REPORT, finish, parse_dims, say

_REFERENCE = click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Model to measure KL and agreement against.",
)
_DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")


@click.group()
def evaluate() -> None:
    """Measure a model on a task."""


@evaluate.command()
@MODEL
@click.option("--text", type=click.Path(path_type=Path), required=True)
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens.")
@click.option("--limit", type=click.IntRange(1), help="Only the first windows.")
@_REFERENCE
@_DEVICE
@REPORT
@click.pass_obj
def perplexity(
    progress: Any, /, model: Path, text: Path, tokenizer: Path, report: Path | None, **options: Any
) -> None:
    """Perplexity of a language model on a text."""
    from onnxq.evaluate.perplexity import perplexity as measure

    found = measure(model, text, tokenizer, progress=progress, **options)
    _measured(progress, found, report)


@evaluate.command()
@MODEL
@click.option(
    "--tasks",
    type=click.Path(path_type=Path),
    required=True,
    help="Questions as MMLU has them (CSV: question, A, B, C, D, letter), or a folder of such.",
)
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option(
    "--shots",
    type=click.Path(path_type=Path),
    help="Solved examples to put first: a CSV, or a folder with one a subject.",
)
@click.option("--limit", type=click.IntRange(1), help="Only the first questions of each file.")
@click.option("--special-tokens", is_flag=True, help="Let the tokenizer add its own.")
@_REFERENCE
@_DEVICE
@REPORT
@click.pass_obj
def choice(
    progress: Any, /, model: Path, tasks: Path, tokenizer: Path, report: Path | None, **options: Any
) -> None:
    """Accuracy of a language model on multiple-choice questions."""
    from onnxq.evaluate.choice import choice as measure

    found = measure(model, tasks, tokenizer, progress=progress, **options)
    _measured(progress, found, report)


@evaluate.command()
@MODEL
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    required=True,
    help="The original, sampled from the same noise.",
)
@click.option(
    "--conditions",
    type=click.Path(path_type=Path),
    help="Inputs beside sample and timestep: npz, a condition a row, or captures of a pipeline.",
)
@click.option(
    "--scheduler",
    type=click.Path(path_type=Path),
    help="scheduler_config.json.  [default: beside the original or in ../scheduler, else SDXL's]",
)
@click.option(
    "--betas",
    type=click.Choice(["scaled_linear", "linear", "squaredcos_cap_v2"]),
    help="In place of the scheduler's.",
)
@click.option(
    "--prediction",
    type=click.Choice(["epsilon", "v_prediction", "sample"]),
    help="In place of the scheduler's.",
)
@click.option("--steps", type=click.IntRange(1), default=20, show_default=True, help="Of DDIM.")
@click.option("--samples", type=click.IntRange(1), help="[default: one of each condition]")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the first.")
@click.option(
    "--guidance",
    type=float,
    help="Scale of classifier-free guidance, 1: none.  [default: 5 if there is a negative]",
)
@click.option("--size", metavar="CxHxW", help="Of a sample, where the model leaves it open.")
@click.option(
    "--classifier",
    type=click.Path(path_type=Path),
    help="ONNX, samples in, scores out: how many samples are of the class asked for.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="At a time.")
@click.option("--min-psnr", type=float, metavar="DB", help="Fail below this mean PSNR.")
@click.option("--picture", type=click.Path(path_type=Path), help="PNG of the samples of both.")
@_DEVICE
@REPORT
@click.pass_obj
def diffusion(
    progress: Any, /, model: Path, size: str | None, report: Path | None, **options: Any
) -> None:
    """Samples of a diffusion model against its original's, from the same noise."""
    from onnxq import api
    from onnxq.terminal import sampled_lines

    result = api.evaluate_diffusion(model, size=parse_dims(size), progress=progress, **options)
    finish(progress, result, sampled_lines(result), report)


def _measured(progress: Any, found: Any, report: Path | None) -> None:
    """Print what was found, and save it."""
    from onnxq.files import write_json

    progress.close()
    for line in found.lines():
        say(line)
    if report is not None:
        write_json(report, found.as_dict())
