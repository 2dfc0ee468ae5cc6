"""Text and a tokenizer as language-model feeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxq.calibrate.session import InputSpec
from onnxq.calibrate.text import text_samples
from onnxq.errors import OnnxqError

tokenizers = pytest.importorskip("tokenizers")

I64 = np.dtype(np.int64)
IDS = InputSpec("input_ids", I64, ("batch", "seq"))
MASK = InputSpec("attention_mask", I64, ("batch", "seq"))


def tokenizer(folder: Path, template: str | None = None) -> Path:
    """Words are their numbers: `w7` -> 7; 100 [CLS], 101 [SEP]."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {f"w{i}": i for i in range(100)} | {"[CLS]": 100, "[SEP]": 101, "a": 102, "?": 103}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        special = [("[CLS]", 100), ("[SEP]", 101)]
        made.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    made.enable_truncation(4)  # as many published tokenizers have it
    made.enable_padding(length=9)
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def text(folder: Path, words: int) -> Path:
    path = folder / "text.txt"
    path.write_text(" ".join(f"w{i % 100}" for i in range(words)))
    return path


def test_windows_are_consecutive_and_whole(tmp_path: Path) -> None:
    samples = text_samples(
        text(tmp_path, 50), tokenizer(tmp_path), [IDS, MASK], seq_len=8, samples=5
    )
    feeds = list(samples)
    assert np.array_equal(np.concatenate([f["input_ids"] for f in feeds]).ravel(), np.arange(40))
    assert all(f["attention_mask"].all() and f["input_ids"].shape == (1, 8) for f in feeds)
    assert (len(samples), samples.count, samples.notes) == (5, 5, [])


@pytest.mark.parametrize(
    "template, expected",
    [
        ("[CLS] $A [SEP]", [[100, 0, 1, 101], [100, 2, 3, 101]]),
        ("[CLS] $A", [[100, 0, 1, 2], [100, 3, 4, 5]]),
    ],
)
def test_special_tokens_go_around_every_window(
    tmp_path: Path, template: str, expected: list[list[int]]
) -> None:
    samples = text_samples(
        text(tmp_path, 50), tokenizer(tmp_path, template), [IDS], seq_len=4, samples=2, batch=2
    )
    (feed,) = samples
    assert feed["input_ids"].tolist() == expected


def test_all_inputs_of_a_decoder_are_filled(tmp_path: Path) -> None:
    inputs = [
        InputSpec("input_ids", np.dtype(np.int32), ("batch", "seq")),
        MASK,
        InputSpec("position_ids", I64, ("batch", "seq")),
        InputSpec("token_type_ids", I64, ("batch", "seq")),
        InputSpec("past_key_values.0.key", np.dtype(np.float16), ("batch", 3, "past", 64)),
    ]
    samples = text_samples(
        text(tmp_path, 50), tokenizer(tmp_path), inputs, seq_len=5, samples=3, batch=2
    )
    first, last = samples
    assert first["input_ids"].dtype == np.int32
    assert first["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert not first["token_type_ids"].any()
    assert first["past_key_values.0.key"].shape == (2, 3, 0, 64)
    assert first["past_key_values.0.key"].dtype == np.float16
    assert last["input_ids"].shape == (1, 5)


def test_what_the_model_fixes_is_followed(tmp_path: Path) -> None:
    fixed = InputSpec("input_ids", I64, (2, 6))
    samples = text_samples(text(tmp_path, 50), tokenizer(tmp_path), [fixed], samples=5)
    assert [feed["input_ids"].shape for feed in samples] == [(2, 6)] * 2
    assert "the last 1 windows do not fill a batch of 2" in samples.notes[0]
    with pytest.raises(OnnxqError, match="fixes dimension 1 at 6"):
        text_samples(text(tmp_path, 50), tokenizer(tmp_path), [fixed], seq_len=8)


def test_a_short_text_is_said_and_a_too_short_one_refused(tmp_path: Path) -> None:
    samples = text_samples(text(tmp_path, 50), tokenizer(tmp_path), [IDS], seq_len=16, samples=64)
    assert len(samples) == 3 and "3 windows, not the 64" in samples.notes[0]
    with pytest.raises(OnnxqError, match="too short: 0 windows of 512"):
        text_samples(text(tmp_path, 50), tokenizer(tmp_path), [IDS])


def test_a_long_text_is_not_tokenized_beyond_need_and_gives_the_same(tmp_path: Path) -> None:
    long = text(tmp_path, 200_000)
    samples = text_samples(long, tokenizer(tmp_path), [IDS], seq_len=10, samples=20)
    assert np.concatenate([f["input_ids"] for f in samples]).ravel().tolist() == [
        i % 100 for i in range(200)
    ]


def test_bad_input_is_one_clear_line(tmp_path: Path) -> None:
    good_text, good = text(tmp_path, 50), tokenizer(tmp_path)
    bad = tmp_path / "bad.bin"
    bad.write_bytes(b"\xff\xfe\x00")
    pixels = InputSpec("pixel_values", np.dtype(np.float32), ("batch", 3, 8, 8))
    cases = [
        ((tmp_path / "none.txt", good, [IDS]), "cannot read the text .*none.txt: No such file"),
        ((bad, good, [IDS]), "cannot be read as text"),
        ((good_text, tmp_path / "none.json", [IDS]), "cannot read the tokenizer .*: No such file"),
        ((tmp_path, good, [IDS]), "cannot read the text .*: it is not a file"),
        ((good_text, bad, [IDS]), "cannot be read as a tokenizer"),
        ((good_text, good, [pixels]), "no input 'input_ids'"),
        ((good_text, good, [IDS, pixels]), "text does not say what the input pixel_values"),
    ]
    for (a, b, inputs), message in cases:
        with pytest.raises(OnnxqError, match=message) as error:
            text_samples(a, b, inputs, seq_len=4)
        assert "\n" not in str(error.value)
    for options in ({"samples": 0}, {"seq_len": 1}):
        with pytest.raises(OnnxqError, match="are no data"):
            text_samples(good_text, good, [IDS], **options)
