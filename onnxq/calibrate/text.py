"""Language-model samples out of a text file and a tokenizer.json.

The text is tokenized once, whole, and cut into consecutive windows. Where the tokenizer's own
template puts special tokens around a text ([CLS] ... [SEP], a leading BOS), it puts them around
every window, which then holds that many fewer tokens of the text.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.data import Samples
from onnxq.calibrate.session import InputSpec, one_line
from onnxq.errors import OnnxqError, missing_package
from onnxq.files import refuse_unreadable
from onnxq.progress import Progress, silent

Array = NDArray[Any]
Ids = NDArray[np.int64]

DEFAULT_LENGTH = 512
_PAST = ("past_key_values", "past_key", "past_value", "past.")
# Characters tokenized for each token wanted, at first: more than any script's text needs, and a
# text of gigabytes is not tokenized for 64 windows.
_CHARACTERS_PER_TOKEN = 16
_INTERRUPTS = (KeyboardInterrupt, SystemExit, GeneratorExit)


def text_samples(
    text: Path,
    tokenizer: Path,
    inputs: Sequence[InputSpec],
    *,
    seq_len: int | None = None,
    samples: int = 64,
    batch: int | None = None,
    progress: Progress = silent,
) -> Samples:
    """The first `samples` windows of `text` as feeds.

    The inputs that are filled: `input_ids`; `attention_mask` (ones); `position_ids` (0, 1, ...);
    `token_type_ids` (zeros); `past_key_values.*` (empty).

    Args:
        seq_len: tokens a window; None: what the model's `input_ids` fixes, or else 512.
        batch: windows a step; None: what the model fixes, or else 1.

    Raises:
        OnnxqError: a file is missing or unreadable, the text is too short for one window, or the
            model has an input that text does not fill.
    """
    by_name = {spec.name: spec for spec in inputs}
    if "input_ids" not in by_name:
        raise OnnxqError(
            f"the model has no input 'input_ids' to give text to: {'; '.join(map(str, inputs))}",
            "give its calibration data as arrays",
        )
    fixed_batch, fixed_length = (_fixed(by_name["input_ids"], axis) for axis in (0, 1))
    length = seq_len or fixed_length or DEFAULT_LENGTH
    rows = batch or fixed_batch or 1
    if samples < 1 or length < 2:
        raise OnnxqError(
            f"{samples} samples of {length} tokens are no data", "give 1 or more, of 2 or more"
        )
    windows = _windows(text, _tokenizer(tokenizer), length, samples)
    if len(windows) < max(1, fixed_batch or 1):
        raise OnnxqError(
            f"{text} is too short: {len(windows)} windows of {length} tokens",
            "give a longer text or a smaller --seq-len",
        )
    source = _TextSource(windows, inputs, rows, drop=fixed_batch is not None)
    source.description = f"{len(windows)} windows of {length} tokens of {text} ({tokenizer.name})"
    if len(windows) < samples:
        source.notes.append(f"{text} gives {len(windows)} windows, not the {samples} asked for")
    return Samples(source, inputs, progress)


class _TextSource:
    """Windows [n, length] as steps of `rows`; `drop` leaves a last step of fewer rows out."""

    def __init__(self, ids: Ids, inputs: Sequence[InputSpec], rows: int, drop: bool) -> None:
        self.inputs, self.rows = inputs, rows
        self.ids = ids[: len(ids) // rows * rows] if drop else ids
        self.samples = len(self.ids)
        self.description = ""
        self.notes: list[str] = []
        if left := len(ids) - len(self.ids):
            self.notes.append(f"the last {left} windows do not fill a batch of {rows}")

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        for start in range(0, len(self.ids), self.rows):
            ids = self.ids[start : start + self.rows]
            yield {spec.name: _filled(spec, ids).astype(spec.dtype) for spec in self.inputs}

    def label(self, step: int) -> str:
        return f"window {step * self.rows}"


def _filled(spec: InputSpec, ids: Ids) -> Array:
    """What an input of a language model gets beside the token ids [B, S]."""
    if spec.name == "input_ids":
        return ids
    if spec.name == "attention_mask" and len(spec.shape) == 2:
        return np.ones_like(ids)
    if spec.name == "position_ids":
        return np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    if spec.name == "token_type_ids":
        return np.zeros_like(ids)
    if spec.name.startswith(_PAST) and len(spec.shape) >= 3:
        return np.zeros(_empty_past(spec, len(ids)), np.float32)
    raise OnnxqError(
        f"text does not say what the input {spec} gets",
        "give the calibration data as arrays (.npz), all inputs in it",
    )


def _empty_past(spec: InputSpec, batch: int) -> tuple[int, ...]:
    """[B, heads, 0, head size]: the dimension before the last is the tokens of the past."""
    shape = [batch if axis == 0 else dim for axis, dim in enumerate(spec.shape)]
    shape[-2] = 0
    if not all(isinstance(dim, int) for dim in shape):
        raise OnnxqError(
            f"the input {spec} leaves more open than the batch and the length of the past",
            "give the calibration data as arrays (.npz), all inputs in it",
        )
    return tuple(dim for dim in shape if isinstance(dim, int))


def _windows(path: Path, tokenizer: Any, length: int, samples: int) -> Ids:
    """Ids [windows, length]: the first `samples`, fewer when the text ends before."""
    before, after = _template(tokenizer)
    inner = length - len(before) - len(after)
    if inner < 1:
        raise OnnxqError(
            f"a window of {length} tokens has no room beside the tokenizer's special tokens",
            "give a larger --seq-len",
        )
    wanted = inner * samples
    size = wanted * _CHARACTERS_PER_TOKEN
    while True:
        text = _beginning(path, size)
        ids = _encoded(tokenizer, text).ids
        # A cut text's last word may be tokenized otherwise than in the whole: keep away from it.
        if len(ids) > wanted + inner or len(text) < size:
            break
        size *= 2
    count = min(len(ids) // inner, samples)
    windows = np.asarray(ids[: count * inner], np.int64).reshape(count, inner)
    ends = (np.tile(np.asarray(part, np.int64), (count, 1)) for part in (before, after))
    return np.concatenate([next(ends), windows, next(ends)], axis=1)


def _template(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    encoding = _encoded(tokenizer, "a", special=True)
    special = list(encoding.special_tokens_mask)
    if 0 not in special:
        return [], []
    first, last = special.index(0), len(special) - special[::-1].index(0)
    return encoding.ids[:first], encoding.ids[last:]


def _fixed(spec: InputSpec, axis: int) -> int | None:
    dim = spec.shape[axis] if len(spec.shape) > axis else None
    return dim if isinstance(dim, int) else None


def _beginning(path: Path, size: int) -> str:
    """The first `size` characters, or all there are."""
    hint = "give a UTF-8 text file"
    refuse_unreadable(path, "the text", hint)
    try:
        with path.open(encoding="utf-8") as stream:
            return stream.read(size)
    except (OSError, UnicodeDecodeError) as error:
        raise OnnxqError(f"{path} cannot be read as text: {one_line(error)}", hint) from error


def _encoded(tokenizer: Any, text: str, special: bool = False) -> Any:
    try:
        return tokenizer.encode(text, add_special_tokens=special)
    except _INTERRUPTS:
        raise
    except BaseException as error:  # tokenizers raises plain Exception; its panics are none
        raise OnnxqError(
            f"the tokenizer fails on the text: {one_line(error)}",
            "give the tokenizer.json that belongs to the model",
        ) from error


def _tokenizer(path: Path) -> Any:
    """The tokenizer without its own truncation and padding, which would cut the text short."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise missing_package("tokenizers", "calibrating with text") from error
    hint = "give the tokenizer.json that belongs to the model"
    refuse_unreadable(path, "the tokenizer", hint)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except _INTERRUPTS:
        raise
    except BaseException as error:  # tokenizers raises plain Exception; its panics are none
        raise OnnxqError(
            f"{path} cannot be read as a tokenizer: {one_line(error)}", hint
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
