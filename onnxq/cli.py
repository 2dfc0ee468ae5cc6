"""The command line: click verbs, a few lines each; with `cli_options` the only place that prints or
exits.

Exit codes: 0 done, 1 a check failed, 2 bad input or usage.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import click

import onnxq
from onnxq.cli_evaluate import evaluate
from onnxq.cli_options import (
    CHANGES,
    MEMORY,
    MODEL,
    RECIPE,
    REPORT,
    RULES,
    TARGET,
    Output,
    data_options,
    finish,
    given_data,
    kept_changes,
    parse_share,
    parse_size,
    say,
)
from onnxq.errors import OnnxqError


class _Verbs(click.Group):
    """Turns an OnnxqError or OSError into one line and exit code 2, and Ctrl-C into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxqError as error:
            say(f"onnxq: error: {error}", err=True)
            ctx.exit(2)
        except OSError as error:  # a path that cannot even be looked at
            if error.errno == errno.EPIPE:
                raise  # whoever read the output has enough: click ends quietly
            say(f"onnxq: error: {error.strerror or error}: {error.filename}", err=True)
            ctx.exit(2)
        except MemoryError:
            say("onnxq: error: out of memory; free some, or give smaller samples", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            say("onnxq: interrupted; every file is the old one or the new one, whole", err=True)
            ctx.exit(130)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # as a user meets them, not by alphabet


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(onnxq.__version__, prog_name="onnxq")
@click.option("--quiet", "-q", is_flag=True, help="No progress; results and errors only.")
@click.pass_context
def main(ctx: click.Context, quiet: bool) -> None:
    """Quantize ONNX models for TensorRT, and prove what the compiler makes of them."""
    from onnxq.progress import progress_line

    ctx.obj = progress_line(quiet)


_KEPT = ("keep_worst", "keep_flops", "snr")


@main.command()
@MODEL
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="[default: <model>.<recipe>.onnx beside the model]",
)
@RECIPE
@TARGET
@data_options("--calib", "Calibration data")
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
@RULES
@CHANGES
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
@MEMORY
@click.option("--save-calib", type=Output(path_type=Path), help="Keep the calibration table.")
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
@REPORT
@click.pass_obj
def quantize(
    progress: Any, /, model: Path, memory: str | None, report: Path | None, **options: Any
) -> None:
    """Write a quantized copy of MODEL."""
    from onnxq import api
    from onnxq.terminal import quantized_lines

    data = given_data(options)
    options["changes"] += kept_changes(*(options.pop(n) for n in _KEPT))
    result = api.quantize(
        model,
        calib=data if data.given else None,
        memory=parse_size(memory),
        announce=say,
        progress=progress,
        **options,
    )
    finish(progress, result, quantized_lines(result), report)


@main.command()
@MODEL
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="[default: <model>.sparse24.onnx beside the model]",
)
@click.option("--pattern", metavar="N:M|SHARE", help="N of each M weights stay.  [default: 2:4]")
@click.option(
    "--method",
    type=click.Choice(["magnitude", "wanda", "sparsegpt", "alps"]),
    help="Magnitude needs no data.  [default: sparsegpt with data, else magnitude]",
)
@click.option("--least-squares", is_flag=True, help="Fit the weights that stay to the outputs.")
@click.option("--sequential", is_flag=True, help="Layer by layer, behind those pruned already.")
@data_options("--calib", "Calibration data")
@RULES
@MEMORY
@click.option("--check", is_flag=True, help="Prove the zeros of MODEL instead; exit 1 if any miss.")
@REPORT
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
    from onnxq.terminal import checked_lines, quantized_lines

    data = given_data(options)
    if check:
        found = api.check_zeros(model, pattern=pattern, progress=progress)
        finish(progress, found, checked_lines(found), report)
        return
    result = api.prune(
        model,
        pattern=pattern or api.DEFAULT_PATTERN,
        calib=data,
        memory=parse_size(memory),
        announce=say,
        progress=progress,
        **options,
    )
    finish(progress, result, quantized_lines(result), report)


@main.command()
@MODEL
@RECIPE
@TARGET
@RULES
@CHANGES
@REPORT
@click.pass_obj
def inspect(progress: Any, /, model: Path, report: Path | None, **options: Any) -> None:
    """Show what a recipe would do with each site of MODEL, and why."""
    from onnxq import api
    from onnxq.terminal import inspected_lines

    result = api.inspect(model, **options)
    finish(progress, result, inspected_lines(result), report)


@main.command()
@MODEL
@TARGET
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
@REPORT
@click.pass_obj
def lint(progress: Any, /, model: Path, as_json: bool, report: Path | None, **options: Any) -> None:
    """Tell what TensorRT will refuse, slow down or compute wrongly in MODEL; exit 1 if anything."""
    import json

    from onnxq import api
    from onnxq.terminal import linted_lines

    result = api.lint(model, progress=progress, **options)
    text = json.dumps(result.as_dict(), indent=2).splitlines()
    finish(progress, result, text if as_json else linted_lines(result), report)


@main.command()
def recipes() -> None:
    """List the presets."""
    from onnxq.terminal import recipe_lines

    for line in recipe_lines():
        click.echo(line)


@main.command()
@MODEL
@click.option("-o", "--output", type=click.Path(path_type=Path), help="[default: <model>.plan]")
@TARGET
@click.option(
    "--shapes",
    multiple=True,
    metavar="NAME:MIN[,OPT,MAX]",
    help="Once per dynamic input, such as input_ids:1x1,1x256,4x512; names again: a next profile.",
)
@data_options("--data", "Instead of --shapes, samples whose shapes make the profile")
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
@REPORT
@click.pass_obj
def build(progress: Any, /, model: Path, report: Path | None, **options: Any) -> None:
    """Compile MODEL into a TensorRT engine and show what each layer became."""
    from onnxq import api
    from onnxq.terminal import built_lines

    options.pop("device")
    result = api.build(model, data=given_data(options), progress=progress, **options)
    finish(progress, result, built_lines(result), report)


@main.command()
@MODEL
@click.argument("candidate", type=click.Path(path_type=Path))
@data_options("--data", "Samples the calibration never saw")
@click.option("--min-snr", type=float, metavar="DB", help="Fail below this signal-to-noise ratio.")
@click.option("--min-cosine", type=float, help="Fail below this cosine.")
@click.option("--max-abs-error", type=float, help="Fail above this absolute error.")
@click.option("--fp16/--no-fp16", default=True, help="Also measure the plain FP16 conversion.")
@click.option("--per-layer", is_flag=True, help="Show where the error enters.")
@click.option("--save-outputs", type=Output(path_type=Path), help="As Polygraphy's JSON.")
@REPORT
@click.pass_obj
def compare(
    progress: Any, /, model: Path, candidate: Path, report: Path | None, **options: Any
) -> None:
    """Run MODEL, its FP16 conversion and CANDIDATE on the same data, side by side."""
    from onnxq import api
    from onnxq.terminal import compared_lines

    result = api.compare(model, candidate, data=given_data(options), progress=progress, **options)
    finish(progress, result, compared_lines(result), report)


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
@REPORT
@click.pass_obj
def recommend(progress: Any, /, accuracy_budget: str, report: Path | None, **options: Any) -> None:
    """Name a recipe for a GPU and a use of MODEL, why, and the memory it needs."""
    from onnxq import api
    from onnxq.terminal import recommended_lines

    result = api.recommend(accuracy_budget=parse_share(accuracy_budget), **options)
    finish(progress, result, recommended_lines(result), report)


main.add_command(evaluate)


if __name__ == "__main__":
    main()
