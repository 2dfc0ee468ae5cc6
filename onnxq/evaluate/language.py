"""A causal language model in ONNX: one window of tokens in, its logits out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.session import InputSpec, open_session
from onnxq.errors import OnnxqError, missing_package
from onnxq.evaluate.runners import Device, runnable

Array = NDArray[Any]

_TOKENS = "input_ids"
_CACHE = "past"  # past_key_values.0.key, past.0.value, ...


class LanguageModel:
    """Gives `logits` for a window; fills in what else the graph asks for.

    attention_mask is all ones, position_ids counts from 0, token_type_ids is 0, and a key-value
    cache (any input whose name starts with "past") is empty.
    """

    def __init__(self, model: Path, device: Device = "auto", name: Path | None = None) -> None:
        """Open `model`.

        Args:
            name: the file that errors speak of, where `model` stands for it.

        Raises:
            OnnxqError: unreadable, no input_ids, or no output that can be logits.
        """
        self._path = name or model
        self._session = open_session(model, device=device)
        self._specs = {spec.name: spec for spec in self._session.inputs}
        if _TOKENS not in self._specs:
            raise OnnxqError(
                f"{model} has no input {_TOKENS!r}, so it is not a language model onnxq can score",
                f"its inputs are: {', '.join(self._specs)}",
            )
        self._output = self._logits_name()

    @property
    def notes(self) -> list[str]:
        """How the session had to be opened."""
        return list(self._session.notes)

    def logits(self, tokens: Array, *, pad: bool = False) -> Array:
        """Logits [window, vocabulary] for tokens [window].

        Args:
            pad: fill a model's fixed sequence behind the tokens, which causal attention never sees.

        Raises:
            OnnxqError: the model has a fixed batch or sequence that one window does not fit, an
                input of unknown meaning, or an output of another shape.
        """
        length, fixed = len(tokens), self._fixed_length()
        window = tokens
        if pad and fixed is not None and fixed > length:
            window = np.concatenate([tokens, np.zeros(fixed - length, tokens.dtype)])
        feed = {name: self._input(spec, window, length) for name, spec in self._specs.items()}
        (found,) = self._session.run([self._output], feed)
        if found.ndim != 3 or found.shape[:2] != (1, len(window)):
            raise OnnxqError(
                f"{self._path}: output {self._output!r} is {list(found.shape)}, "
                f"not [1, {len(window)}, vocabulary]",
                "only a model that gives logits for every token can be scored",
            )
        logits: Array = found[0, :length]
        return logits

    def _fixed_length(self) -> int | None:
        """Tokens of the model's sequence where that is fixed."""
        shape = self._specs[_TOKENS].shape
        return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else None

    def _logits_name(self) -> str:
        names = list(self._session.output_names)
        if "logits" in names:
            return "logits"
        others = [name for name in names if not name.startswith(("present", "past"))]
        if len(others) != 1:
            raise OnnxqError(
                f"{self._path} has no output 'logits' and no single other that could be it",
                f"its outputs are: {', '.join(names)}",
            )
        return str(others[0])

    def _input(self, spec: InputSpec, tokens: Array, length: int) -> Array:
        """An input for `tokens`, of which the first `length` count."""
        dtype, window = np.dtype(spec.dtype), tokens[np.newaxis]
        if spec.name.startswith(_CACHE):
            return np.zeros(_empty_cache(spec.shape), dtype)
        if spec.name == _TOKENS:
            value = window
        elif spec.name == "attention_mask":
            value = (np.arange(len(tokens)) < length)[np.newaxis]
        elif spec.name == "position_ids":
            value = np.arange(len(tokens))[np.newaxis]
        elif spec.name == "token_type_ids":
            value = np.zeros_like(window)
        elif spec.name == "use_cache_branch":
            return np.zeros([1], bool)
        else:
            raise OnnxqError(f"{self._path} has the input {spec.name!r}, of unknown meaning")
        self._check_fixed(spec, window.shape)
        return value.astype(dtype)

    def _check_fixed(self, spec: InputSpec, shape: tuple[int, ...]) -> None:
        fixed = len(spec.shape) == len(shape) and all(
            not isinstance(want, int) or want == got
            for want, got in zip(spec.shape, shape, strict=True)
        )
        if not fixed:
            raise OnnxqError(
                f"{self._path} takes {spec.name!r} as {list(spec.shape)}, "
                f"a window is {list(shape)}",
                "choose the window the model was exported for",
            )


@contextmanager
def language_model(
    path: Path, device: Device = "auto"
) -> Iterator[tuple[LanguageModel, list[str]]]:
    """The language model at `path`, and how it was run; simulated where ONNX Runtime lacks kernels.

    Raises:
        OnnxqError: as `LanguageModel`.
    """
    with runnable(path) as (usable, notes):
        model = LanguageModel(usable, device, name=path)
        yield model, [*notes, *model.notes]


def open_tokenizer(path: Path) -> Any:
    """A `tokenizers.Tokenizer` that neither truncates nor pads.

    Raises:
        OnnxqError: the package is missing, or the file is, or is no tokenizer.json.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise missing_package("tokenizers", "reading a text") from error
    if not path.is_file():
        raise OnnxqError(f"the tokenizer {path} does not exist", "a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises bare Exception
        raise OnnxqError(f"cannot read the tokenizer {path}: {error}") from error
    # A tokenizer.json may carry the truncation and padding of its training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _empty_cache(shape: Any) -> list[int]:
    """[batch, heads, past, size] with batch 1 and every other free dimension 0."""
    free = [dim if isinstance(dim, int) else 0 for dim in shape]
    return [1 if not isinstance(shape[0], int) else shape[0], *free[1:]]
