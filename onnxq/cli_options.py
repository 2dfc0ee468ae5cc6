"""What the verbs of the command line share: options, how they are read, and how each ends."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxq.errors import OnnxqError
from onnxq.gpus import DEFAULT_TARGET

if TYPE_CHECKING:
    from onnxq.results import Result
    from onnxq.samples import Data

Command = Callable[..., Any]
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class Output(click.Path):
    """A file to write: what cannot be written is said before the work, not behind it."""

    def convert(self, *given: Any) -> Any:
        from onnxq.files import refuse_unwritable

        path: Any = super().convert(*given)
        refuse_unwritable(path)
        return path


def data_options(flag: str, what: str) -> Callable[[Command], Command]:
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


def given_data(options: dict[str, Any]) -> Data:
    from onnxq.samples import Data

    given = ("text", "tokenizer", "seq_len", "samples", "random", "batch")
    return Data(path=options.pop("data_path"), **{name: options.pop(name) for name in given})


MODEL = click.argument("model", type=click.Path(path_type=Path))
TARGET = click.option(
    "--target", default=DEFAULT_TARGET, show_default=True, metavar="SM", help="Compute capability."
)
REPORT = click.option(
    "--report",
    type=Output(path_type=Path),
    help="Write the report as JSON, or as a page to read (.html).",
)
RECIPE = click.option(
    "--recipe",
    metavar="NAME|FILE",
    help="A preset (`onnxq recipes` lists them) or a YAML file.  "
    "[default: fp8/int8 with data, else their dynamic forms]",
)
CHANGES = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="FIELD=VALUE",
    help="Another value of a field of the recipe, such as block_size=32 or activations=fp8.",
)
RULES = click.option(
    "--rule",
    "rules",
    multiple=True,
    metavar="RULE",
    help="Override: 'leave|quantize node=|weight=|module=|op=PATTERN'; * and ? are wildcards.",
)
MEMORY = click.option(
    "--memory",
    metavar="SIZE",
    help="What calibration may take, such as 8GB: a larger model runs in segments.",
)


def parse_size(text: str | None) -> int | None:
    """Read `2GB`, `512MiB` or a number of bytes."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmg]i?)?b?\s*", text.lower())
    try:
        size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    except ValueError:
        size = 0
    if size <= 0:
        raise OnnxqError(f"cannot read the size {text!r}", "write it as 2GB or 512MiB")
    return size


def parse_dims(text: str | None) -> tuple[int, ...] | None:
    """Read `4x128x128`."""
    if text is None:
        return None
    if not re.fullmatch(r"[1-9][0-9]{0,8}(x[1-9][0-9]{0,8})*", text):
        raise OnnxqError(f"cannot read the size {text!r}", "write it as 4x128x128")
    return tuple(map(int, text.split("x")))


def parse_share(text: str) -> float:
    """Read `0.5%` or `0.005`."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*(%?)\s*", text)
    if match is None:
        raise OnnxqError(f"cannot read the share {text!r}", "write it as 0.5% or 0.005")
    return float(match[1]) / (100 if match[2] else 1)


def kept_changes(worst: int | None, flops: str | None, snr: float | None) -> tuple[str, ...]:
    """The bounds on what is left for its error, as fields of a recipe."""
    share = None if flops is None else parse_share(flops)
    given = {"keep_worst": worst, "keep_flops": share, "snr": snr}
    return tuple(f"{name}={value}" for name, value in given.items() if value is not None)


def say(line: str, err: bool = False) -> None:
    """Print a line; what a name in the model holds must not move the terminal's cursor."""
    from onnxq.terminal import printable

    click.echo(printable(line), err=err)


def finish(progress: Any, result: Result, lines: list[str], report: Path | None) -> None:
    """Print, save the report, and exit with 1 if a check failed."""
    progress.close()
    for line in lines:
        say(line)
    if report is not None:
        result.save(report)
    if not result.passed:
        sys.exit(1)
