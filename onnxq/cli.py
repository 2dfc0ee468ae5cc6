"""The command line: click verbs, a few lines each; the only place that prints or exits.

Exit codes: 0 done, 1 a check failed, 2 bad input or usage.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import onnxq
from onnxq.errors import OnnxqError
from onnxq.gpus import DEFAULT_TARGET

if TYPE_CHECKING:
    from onnxq.results import Result
    from onnxq.samples import Data

Command = Callable[..., Any]


class _Output(click.Path):
    """A file to write: what cannot be written is said before the work, not behind it."""

    def convert(self, *given: Any) -> Any:
        from onnxq.files import refuse_unwritable

        path: Any = super().convert(*given)
        refuse_unwritable(path)
        return path


class _Verbs(click.Group):
    """Turns an OnnxqError or OSError into one line and exit code 2, and Ctrl-C into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxqError as error:
            _say(f"onnxq: error: {error}", err=True)
            ctx.exit(2)
        except OSError as error:  # a path that cannot even be looked at
            if error.errno == errno.EPIPE:
                raise  # whoever read the output has enough: click ends quietly
            _say(f"onnxq: error: {error.strerror or error}: {error.filename}", err=True)
            ctx.exit(2)
        except MemoryError:
            _say("onnxq: error: out of memory; free some, or give smaller samples", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            _say("onnxq: interrupted; every file is the old one or the new one, whole", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # as a user meets them, not by alphabet


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(onnxq.__version__, prog_name="onnxq")
@click.option("--quiet", "-q", is_flag=True, help="No progress; results and errors only.")
@click.pass_context
def main(ctx: click.Context, quiet: bool) -> None:
    """Quantize ONNX models for TensorRT, and prove what the compiler makes of them."""
    from onnxq.terminal import progress_line

    ctx.obj = progress_line(quiet)


def _data_options(flag: str, what: str) -> Callable[[Command], Command]:
    """The ways to give samples, the same on every verb that takes them."""
    options = [
        click.option(
            flag,
            "data_path",
            metavar="PATH",
            help=f"{what}: npz, folder of npy or npz, Polygraphy JSON, or a loader script.",
        ),
        click.option("--text", type=click.Path(path_type=Path), help="Text for a language model."),
        click.option("--tokenizer", type=click.Path(path_type=Path), help="Its tokenizer.json."),
        click.option("--seq-len", type=click.IntRange(2), help="Tokens a window.  [default: 512]"),
        click.option(
            "--samples",
            type=click.IntRange(1),
            help="How many windows of text, or random samples.  [default: 64, 8]",
        ),
        click.option(
            "--random-calib" if flag == "--calib" else "--random-data",
            "random",
            is_flag=False,
            flag_value=0,
            type=int,
            metavar="[SEED]",
            help="Random data instead: for trying things out, not for accuracy.",
        ),
        click.option("--batch", type=click.IntRange(1), help="Rows fed at a time.  [default: 1]"),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where ONNX Runtime runs.",
        ),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _data(options: dict[str, Any]) -> Data:
    from onnxq.samples import Data

    given = ("text", "tokenizer", "seq_len", "samples", "random", "batch")
    return Data(path=options.pop("data_path"), **{name: options.pop(name) for name in given})


_MODEL = click.argument("model", type=click.Path(path_type=Path))
_TARGET = click.option(
    "--target", default=DEFAULT_TARGET, show_default=True, metavar="SM", help="Compute capability."
)
_REPORT = click.option("--report", type=_Output(path_type=Path), help="Write the report as JSON.")
_RECIPE = click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="A preset (`onnxq recipes` lists them) or a YAML file.  "
    "[default: fp8/int8 with data, else their dynamic forms]",
)
_CHANGES = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Another value of a field of the recipe, such as block_size=32 or activations=fp8.",
)
_KEPT = ("keep_worst", "keep_flops", "snr")
_RULES = click.option(
    "--rule",
    "rules",
    multiple=True,
    metavar="RULE",
    help="Override: 'leave|quantize node=|weight=|module=|op=PATTERN'; * and ? are wildcards.",
)
_MEMORY = click.option(
    "--memory",
    metavar="SIZE",
    help="What calibration may take, such as 8GB: a larger model runs in segments.",
)


@main.command()
@_MODEL
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="[default: <model>.<recipe>.onnx beside the model]",
)
@_RECIPE
@_TARGET
@_data_options("--calib", "Calibration data")
@click.option(
    "--precision",
    type=click.Choice(["fp16", "bf16", "keep"]),
    default="fp16",
    show_default=True,
    help="What an FP32 model becomes where it is not quantized.",
)
@click.option(
    "--io",
    type=click.Choice(["keep", "fp16"]),
    default="keep",
    show_default=True,
    help="Types of the model's inputs and outputs.",
)
@click.option(
    "--calibrator",
    metavar="NAME",
    help="max, percentile:99.99, entropy, mse, mse:2, output or steps.",
)
@_RULES
@_CHANGES
@click.option(
    "--keep-worst",
    type=click.IntRange(1),
    metavar="N",
    help="Leave up to N layers as they are: those that cost the model's outputs most.",
)
@click.option(
    "--keep-flops", metavar="SHARE", help="The same, up to a share of multiplications, as in 10%."
)
@click.option(
    "--snr", type=float, metavar="DB", help="The same, only until the outputs have DB decibels."
)
@_MEMORY
@click.option("--save-calib", type=_Output(path_type=Path), help="Keep the calibration table.")
@click.option(
    "--load-calib",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Use saved tables; several are merged.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Keep finished layers beside the output, and go on from those of a run that was stopped.",
)
@click.option(
    "--recipe-from",
    type=click.Path(path_type=Path),
    help="Do what was done to this model of onnxq's; static scales need data again.",
)
@click.option("--requantize", is_flag=True, help="Take out the quantization MODEL has, then go on.")
@_REPORT
@click.pass_obj
def quantize(
    progress: Any, /, model: Path, memory: str | None, report: Path | None, **options: Any
) -> None:
    """Write a quantized copy of MODEL."""
    from onnxq import api
    from onnxq.terminal import kept_changes, parse_size, quantized_lines

    data = _data(options)
    options["changes"] += kept_changes(*(options.pop(n) for n in _KEPT))
    result = api.quantize(
        model,
        calib=data if data.given else None,
        memory=parse_size(memory),
        announce=_say,
        progress=progress,
        **options,
    )
    _finish(progress, result, quantized_lines(result), report)


@main.command()
@_MODEL
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="[default: <model>.sparse24.onnx beside the model]",
)
@click.option("--pattern", metavar="N:M|SHARE", help="N of each M weights stay.  [default: 2:4]")
@click.option(
    "--method",
    type=click.Choice(["magnitude", "wanda", "sparsegpt"]),
    help="Magnitude needs no data.  [default: sparsegpt with data, else magnitude]",
)
@click.option("--least-squares", is_flag=True, help="Fit the weights that stay to the outputs.")
@click.option("--sequential", is_flag=True, help="Layer by layer, behind those pruned already.")
@_data_options("--calib", "Calibration data")
@_RULES
@_MEMORY
@click.option("--check", is_flag=True, help="Prove the zeros of MODEL instead; exit 1 if any miss.")
@_REPORT
@click.pass_obj
def prune(
    progress: Any,
    /,
    model: Path,
    pattern: str | None,
    memory: str | None,
    check: bool,
    report: Path | None,
    **options: Any,
) -> None:
    """Write a copy of MODEL with zeros in its weights, which keep their type."""
    from onnxq import api
    from onnxq.terminal import checked_lines, parse_size, quantized_lines

    data = _data(options)
    if check:
        found = api.check_zeros(model, pattern=pattern, progress=progress)
        _finish(progress, found, checked_lines(found), report)
        return
    result = api.prune(
        model,
        pattern=pattern or api.DEFAULT_PATTERN,
        calib=data,
        memory=parse_size(memory),
        announce=_say,
        progress=progress,
        **options,
    )
    _finish(progress, result, quantized_lines(result), report)


@main.command()
@_MODEL
@_RECIPE
@_TARGET
@_RULES
@_CHANGES
@_REPORT
@click.pass_obj
def inspect(progress: Any, /, model: Path, report: Path | None, **options: Any) -> None:
    """Show what a recipe would do with each site of MODEL, and why."""
    from onnxq import api
    from onnxq.terminal import inspected_lines

    result = api.inspect(model, **options)
    _finish(progress, result, inspected_lines(result), report)


@main.command()
@_MODEL
@_TARGET
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option(
    "--ignore",
    multiple=True,
    metavar="RULE|SEVERITY",
    help="Leave out a rule's findings, or all 'portability' (other severities likewise).",
)
@click.option("--fix", is_flag=True, help="Cure what can be cured safely, into another file.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="With --fix: what to write.  [default: <model>.fixed.onnx]",
)
@_REPORT
@click.pass_obj
def lint(progress: Any, /, model: Path, as_json: bool, report: Path | None, **options: Any) -> None:
    """Tell what TensorRT will refuse, slow down or compute wrongly in MODEL; exit 1 if anything."""
    import json

    from onnxq import api
    from onnxq.terminal import linted_lines

    result = api.lint(model, progress=progress, **options)
    text = json.dumps(result.as_dict(), indent=2).splitlines()
    _finish(progress, result, text if as_json else linted_lines(result), report)


@main.command()
def recipes() -> None:
    """List the presets."""
    from onnxq.terminal import recipe_lines

    for line in recipe_lines():
        click.echo(line)


@main.command()
@_MODEL
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: <model>.plan]")
@_TARGET
@click.option(
    "--shapes",
    multiple=True,
    metavar="NAME:MIN[,OPT,MAX]",
    help="Once per dynamic input, such as input_ids:1x1,1x256,4x512; names again: a next profile.",
)
@_data_options("--data", "Instead of --shapes, samples whose shapes make the profile")
@click.option(
    "--backend",
    type=click.Choice(["tensorrt_rtx", "tensorrt"]),
    help="[default: tensorrt_rtx, ahead of time, no GPU needed]",
)
@click.option(
    "--sparse/--dense",
    default=None,
    help="Whether kernels may skip zeros.  [default: where onnxq put in 2:4 zeros]",
)
@click.option("--strict", is_flag=True, help="Exit 1 if a quantized layer did not end in 8 bits.")
@click.option(
    "--gpu",
    "cards",
    multiple=True,
    metavar="NAME",
    help="Predict a run on it, such as l40s.  [default: all of the target, if shapes are fixed]",
)
@click.option(
    "--beside",
    type=click.Path(path_type=Path),
    metavar="ORIGINAL",
    help="The model before it was quantized: its time in FP16 is predicted too.",
)
@_REPORT
@click.pass_obj
def build(progress: Any, /, model: Path, report: Path | None, **options: Any) -> None:
    """Compile MODEL into a TensorRT engine and show what each layer became."""
    from onnxq import api
    from onnxq.terminal import built_lines

    options.pop("device")
    result = api.build(model, data=_data(options), progress=progress, **options)
    _finish(progress, result, built_lines(result), report)


@main.command()
@_MODEL
@click.argument("candidate", type=click.Path(path_type=Path))
@_data_options("--data", "Samples the calibration never saw")
@click.option("--min-snr", type=float, metavar="DB", help="Fail below this signal-to-noise ratio.")
@click.option("--min-cosine", type=float, help="Fail below this cosine.")
@click.option("--max-abs-error", type=float, help="Fail above this absolute error.")
@click.option("--fp16/--no-fp16", default=True, help="Also measure the plain FP16 conversion.")
@click.option("--per-layer", is_flag=True, help="Show where the error enters.")
@click.option("--save-outputs", type=_Output(path_type=Path), help="As Polygraphy's JSON.")
@_REPORT
@click.pass_obj
def compare(
    progress: Any, /, model: Path, candidate: Path, report: Path | None, **options: Any
) -> None:
    """Run MODEL, its FP16 conversion and CANDIDATE on the same data, side by side."""
    from onnxq import api
    from onnxq.terminal import compared_lines

    result = api.compare(model, candidate, data=_data(options), progress=progress, **options)
    _finish(progress, result, compared_lines(result), report)


@main.command()
@click.argument("model", type=click.Path(path_type=Path), required=False)
@click.option("--gpu", required=True, metavar="NAME", help="Such as h100, l40s, rtx-5090.")
@click.option(
    "--workload",
    type=click.Choice(["online", "offline"]),
    required=True,
    help="Online: a user waits for each answer.",
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="At a time.")
@click.option(
    "--accuracy-budget",
    default="2%",
    show_default=True,
    metavar="SHARE",
    help="Loss that is acceptable, such as 0.5%.",
)
@click.option(
    "--seq-len", type=click.IntRange(1), default=2048, show_default=True, help="Of a request."
)
@click.option("--saturated", is_flag=True, help="The GPU's arithmetic is in full use already.")
@_REPORT
@click.pass_obj
def recommend(progress: Any, /, accuracy_budget: str, report: Path | None, **options: Any) -> None:
    """Name a recipe for a GPU and a use of MODEL, why, and the memory it needs."""
    from onnxq import api
    from onnxq.terminal import parse_share, recommended_lines

    result = api.recommend(accuracy_budget=parse_share(accuracy_budget), **options)
    _finish(progress, result, recommended_lines(result), report)


@main.group()
def evaluate() -> None:
    """Measure a model on a task."""


_REFERENCE = click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Model to measure KL and agreement against.",
)
_DEVICE = click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")


@evaluate.command()
@_MODEL
@click.option("--text", type=click.Path(path_type=Path), required=True)
@click.option("--tokenizer", type=click.Path(path_type=Path), required=True)
@click.option("--window", type=click.IntRange(2), default=512, show_default=True, help="Tokens.")
@click.option("--limit", type=click.IntRange(1), help="Only the first windows.")
@_REFERENCE
@_DEVICE
@_REPORT
@click.pass_obj
def perplexity(
    progress: Any, /, model: Path, text: Path, tokenizer: Path, report: Path | None, **options: Any
) -> None:
    """Perplexity of a language model on a text."""
    from onnxq.evaluate.perplexity import perplexity as measure
    from onnxq.files import write_json

    found = measure(model, text, tokenizer, progress=progress, **options)
    progress.close()
    for line in found.lines():
        _say(line)
    if report is not None:
        write_json(report, found.as_dict())


@evaluate.command()
@_MODEL
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
@_REPORT
@click.pass_obj
def choice(
    progress: Any, /, model: Path, tasks: Path, tokenizer: Path, report: Path | None, **options: Any
) -> None:
    """Accuracy of a language model on multiple-choice questions."""
    from onnxq.evaluate.choice import choice as measure
    from onnxq.files import write_json

    found = measure(model, tasks, tokenizer, progress=progress, **options)
    progress.close()
    for line in found.lines():
        _say(line)
    if report is not None:
        write_json(report, found.as_dict())


@evaluate.command()
@_MODEL
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
@_REPORT
@click.pass_obj
def diffusion(
    progress: Any, /, model: Path, size: str | None, report: Path | None, **options: Any
) -> None:
    """Samples of a diffusion model against its original's, from the same noise."""
    from onnxq import api
    from onnxq.terminal import parse_dims, sampled_lines

    result = api.evaluate_diffusion(model, size=parse_dims(size), progress=progress, **options)
    _finish(progress, result, sampled_lines(result), report)


def _say(line: str, err: bool = False) -> None:
    """Print a line; what a name in the model holds must not move the terminal's cursor."""
    from onnxq.terminal import printable

    click.echo(printable(line), err=err)


def _finish(progress: Any, result: Result, lines: list[str], report: Path | None) -> None:
    """Print, save the report, and exit with 1 if a check failed."""
    progress.close()
    for line in lines:
        _say(line)
    if report is not None:
        result.save(report)
    if not result.passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
