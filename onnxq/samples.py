"""Where samples come from, as a user names it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onnxq.errors import OnnxqError
from onnxq.progress import Progress, silent

if TYPE_CHECKING:
    from onnxq.calibrate.data import Samples
    from onnxq.calibrate.session import InputSpec


@dataclass(frozen=True)
class Data:
    """One of `path`, `text` with `tokenizer`, or `random`.

    Attributes:
        path: npz, folder of npy or npz, Polygraphy's JSON, or a loader script.
        text: UTF-8 text for a language model; `tokenizer` is its tokenizer.json.
        seq_len: tokens a window of text.
        samples: how many windows of text, or random samples.
        random: seed of random data, None for none.
        batch: rows fed at a time where the model leaves the batch open.
    """

    path: str | Path | None = None
    text: str | Path | None = None
    tokenizer: str | Path | None = None
    seq_len: int | None = None
    samples: int | None = None
    random: int | None = None
    batch: int | None = None

    @classmethod
    def of(cls, given: Data | str | Path | None) -> Data:
        """`given` itself, or the data at that path."""
        return given if isinstance(given, Data) else cls(path=given)

    @property
    def given(self) -> bool:
        """Whether there is any."""
        return self.path is not None or self.text is not None or self.random is not None

    def open(self, inputs: Sequence[InputSpec], progress: Progress = silent) -> Samples:
        """The samples, checked against the model's inputs.

        Raises:
            OnnxqError: they do not fit, cannot be read, or more than one source is named.
        """
        from onnxq.calibrate.data import open_samples
        from onnxq.calibrate.random_data import random_samples
        from onnxq.calibrate.text import text_samples

        if sum(source is not None for source in (self.path, self.text, self.random)) != 1:
            raise OnnxqError("data from more than one source", "give a path, a text or random data")
        if self.text is None and self.tokenizer is not None:
            raise OnnxqError("a tokenizer without text", "give --text FILE")
        count = {} if self.samples is None else {"samples": self.samples}
        if self.path is not None:
            return open_samples(self.path, inputs, batch=self.batch, progress=progress)
        if self.random is not None:
            return random_samples(inputs, seed=self.random, progress=progress, **count)
        assert self.text is not None
        if self.tokenizer is None:
            raise OnnxqError("text needs its tokenizer", "give --tokenizer tokenizer.json")
        return text_samples(
            Path(self.text),
            Path(self.tokenizer),
            inputs,
            seq_len=self.seq_len,
            batch=self.batch,
            progress=progress,
            **count,
        )
