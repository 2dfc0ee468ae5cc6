from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluate_models import write
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from onnxq.errors import OnnxqError
from onnxq.evaluate.likelihood import score
from onnxq.evaluate.perplexity import Perplexity, perplexity, text_windows

WORDS = ["a", "b", "c", "d", "e"]
BIGRAM = "agraph (int64[B,S] input_ids) => ({}[B,S,5] logits) {{ logits = Gather(t, input_ids) }}"
TEXT = "a b c d e d c b a a c e b d"  # 14 tokens: 3 windows of 4, two dropped
IDS = [[0, 1, 2, 3], [4, 3, 2, 1], [0, 0, 2, 4]]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    words = models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="a")
    built = Tokenizer(words)
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(single="b $A", special_tokens=[("b", 1)])
    built.enable_truncation(3)  # as in many a tokenizer.json; must not cut the text
    built.enable_padding(length=20)
    built.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def bigram(path: Path, table: np.ndarray) -> Path:
    """A language model whose logits depend on the token before alone: row of a 5 x 5 table."""
    kind = {"float32": "float", "float16": "float16"}[table.dtype.name]
    return write(path, BIGRAM.format(kind), t=table)


def table(seed: int = 0) -> np.ndarray:
    return (3 * np.random.default_rng(seed).standard_normal((5, 5))).astype(np.float32)


def by_hand(logits: np.ndarray, windows: list[list[int]]) -> list[float]:
    """-ln softmax(logits[before])[token], token by token, in plain Python."""
    found = []
    for ids in windows:
        for before, token in itertools.pairwise(ids):
            row = [float(value) for value in logits[before]]
            found.append(math.log(sum(math.exp(value) for value in row)) - row[token])
    return found


def test_the_text_is_cut_into_whole_windows(text: Path, tokenizer: Path) -> None:
    assert text_windows(text, tokenizer, 4).tolist() == IDS


def test_equals_the_sum_by_hand(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    model = bigram(tmp_path / "m.onnx", table())
    found = perplexity(model, text, tokenizer, window=4)
    surprisal = by_hand(table(), IDS)
    assert (found.tokens, found.windows) == (9, 3)
    assert found.value == pytest.approx(math.exp(sum(surprisal) / 9), rel=1e-6)
    means = np.reshape(surprisal, (3, 3)).mean(axis=1)
    spread = math.sqrt(((means - means.mean()) ** 2).sum() / 2 / 3)
    assert found.error == pytest.approx(found.value * spread, rel=1e-5)
    two = perplexity(model, text, tokenizer, window=4, limit=2)
    assert two.value == pytest.approx(math.exp(np.mean(by_hand(table(), IDS[:2]))), rel=1e-6)


def test_uniform_logits_give_the_vocabulary(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    model = bigram(tmp_path / "m.onnx", np.full((5, 5), 80, np.float16))
    found = perplexity(model, text, tokenizer, window=4)
    assert found.value == pytest.approx(5.0, rel=1e-12) and found.error == pytest.approx(0.0)


def test_a_model_against_itself(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    model = bigram(tmp_path / "m.onnx", table())
    found = perplexity(model, text, tokenizer, window=4, reference=model)
    assert (found.divergence, found.agreement, found.ratio) == (0.0, 1.0, 1.0)
    assert found.ratio_error == 0.0 and found.reference == found.value


def test_divergence_and_agreement_by_hand(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    ours, theirs = table(0), table(1)
    found = perplexity(
        bigram(tmp_path / "m.onnx", ours),
        text,
        tokenizer,
        window=4,
        reference=bigram(tmp_path / "r.onnx", theirs),
    )
    divergence, agreement = [], []
    for before in [token for ids in IDS for token in ids[:-1]]:
        p = np.exp(theirs[before].astype(float)) / np.exp(theirs[before].astype(float)).sum()
        q = np.exp(ours[before].astype(float)) / np.exp(ours[before].astype(float)).sum()
        divergence.append(sum(p * np.log(p / q)))
        agreement.append(p.argmax() == q.argmax())
    assert found.divergence == pytest.approx(np.mean(divergence), rel=1e-9)
    assert found.agreement == np.mean(agreement) and 0 < found.agreement < 1
    expected = np.mean(by_hand(ours, IDS)) - np.mean(by_hand(theirs, IDS))
    assert found.ratio == pytest.approx(math.exp(expected), rel=1e-6)
    assert found.reference == pytest.approx(math.exp(np.mean(by_hand(theirs, IDS))), rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    logits = np.array([[60000, 60000, -60000]] * 2, np.float16)
    assert score(logits, np.array([0, 1])).surprisal == pytest.approx([math.log(2)], rel=1e-12)


def test_many_rows_go_in_pieces(monkeypatch: Any) -> None:
    rng = np.random.default_rng(0)
    logits, other = rng.standard_normal((2, 11, 5)).astype(np.float32)
    tokens = rng.integers(0, 5, 11)
    whole = score(logits, tokens, other)
    monkeypatch.setattr("onnxq.evaluate.likelihood._PIECE", 15)
    pieces = score(logits, tokens, other)
    for name in ("surprisal", "reference_surprisal", "divergence", "agreement"):
        np.testing.assert_array_equal(getattr(pieces, name), getattr(whole, name))


def test_nan_logits_are_said(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    broken = table()
    broken[3] = np.nan  # the token d predicts nothing: it stands before a scored token once
    found = perplexity(bigram(tmp_path / "m.onnx", broken), text, tokenizer, window=4)
    assert found.broken == 1 and math.isnan(found.value)
    assert "1 of 9 tokens" in found.lines()[0] and "NaN" in found.lines()[0]
    json.dumps(found.as_dict(), allow_nan=False)


def test_nan_in_the_reference_is_said(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    broken = table()
    broken[3] = np.nan
    good, bad = bigram(tmp_path / "m.onnx", table()), bigram(tmp_path / "r.onnx", broken)
    found = perplexity(good, text, tokenizer, window=4, reference=bad)
    assert found.broken == 0 and math.isfinite(found.value)
    assert any("reference" in line and "NaN" in line for line in found.lines())


def test_a_token_ruled_out_costs_everything(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    ruled_out = table()
    ruled_out[0, 1] = -np.inf  # a -> b occurs
    ruled_out[1, 0] = -np.inf  # b -> a does not, inside a window
    model = bigram(tmp_path / "m.onnx", ruled_out)
    found = perplexity(model, text, tokenizer, window=4, reference=model)
    assert found.value == math.inf and found.broken == 0 and found.divergence == 0.0
    ruled_out[0, 1] = 0.0
    model = bigram(tmp_path / "m.onnx", ruled_out)
    assert math.isfinite(perplexity(model, text, tokenizer, window=4).value)


def test_other_inputs_are_filled_in(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    # The first logit of each row grows by position * mask; a cache of length 0 stands in front.
    model = write(
        tmp_path / "m.onnx",
        """agraph (int64[B,S] input_ids, int64[B,T] attention_mask, int64[B,S] position_ids,
                   float[B,2,past,3] past_key_values_0_key)
           => (float[B,S,5] logits, float[B,2,total,3] present_0_key) {
            rows = Gather(t, input_ids)
            far = Cast<to = 1>(position_ids)
            seen = Cast<to = 1>(attention_mask)
            bonus = Mul(far, seen)
            axis = Constant<value = int64[1] {2}>()
            wide = Unsqueeze(bonus, axis)
            weighted = Mul(wide, only_first)
            logits = Add(rows, weighted)
            new = ConstantOfShape<value = float[1] {1}>(shape)
            present_0_key = Concat<axis = 2>(past_key_values_0_key, new)
        }""",
        t=table(),
        only_first=np.array([1, 0, 0, 0, 0], np.float32),
        shape=np.array([1, 2, 4, 3]),
    )
    surprisal = []
    for ids in IDS:
        for position in range(3):
            shifted = table()
            shifted[:, 0] += position
            surprisal += by_hand(shifted, [ids[position : position + 2]])
    found = perplexity(model, text, tokenizer, window=4)
    assert found.value == pytest.approx(math.exp(np.mean(surprisal)), rel=1e-6)


@pytest.mark.parametrize(
    ("graph", "message"),
    [
        ("agraph (float[B,S] x) => (float[B,S] y) { y = Neg(x) }", "no input 'input_ids'"),
        (
            """agraph (int64[1,9] input_ids) => (float[1,9,5] logits)
               { logits = Gather(t, input_ids) }""",
            r"\[1, 9\], a window is \[1, 4\]",
        ),
        (
            "agraph (int64[B,S] input_ids) => (int64[B,S] logits) { logits = Neg(input_ids) }",
            r"not \[1, 4, vocabulary\]",
        ),
        (
            """agraph (int64[B,S] input_ids, float[B] strange) => (float[B,S,5] logits)
               { logits = Gather(t, input_ids) }""",
            "'strange'",
        ),
    ],
)
def test_models_of_another_kind(
    tmp_path: Path, text: Path, tokenizer: Path, graph: str, message: str
) -> None:
    model = write(tmp_path / "m.onnx", graph, t=table())
    with pytest.raises(OnnxqError, match=message):
        perplexity(model, text, tokenizer, window=4)


def test_bad_text_and_tokenizer(tmp_path: Path, text: Path, tokenizer: Path) -> None:
    with pytest.raises(OnnxqError, match="14 tokens, less than one window of 512"):
        text_windows(text, tokenizer, 512)
    with pytest.raises(OnnxqError, match="cannot read the text"):
        text_windows(tmp_path / "none.txt", tokenizer, 4)
    with pytest.raises(OnnxqError, match="does not exist"):
        text_windows(text, tmp_path / "none.json", 4)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(OnnxqError, match="cannot read the tokenizer"):
        text_windows(text, tmp_path / "bad.json", 4)
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe\x00caf\xe9")
    with pytest.raises(OnnxqError, match="cannot read the text"):
        text_windows(tmp_path / "latin.txt", tokenizer, 4)


def test_the_table_shows_error_and_reference() -> None:
    found = Perplexity(20.0, 1.5, 9, 3, 0, 19.0, 1.0526, 0.001, 0.01, 0.95, ("a note",))
    assert found.lines() == [
        "perplexity 20.000 +- 1.500, 9 tokens in 3 windows",
        "reference  19.000, ratio 1.0526 +- 0.0010",
        "KL(reference || model) 0.01000 nats a token, same first choice at 95.00 % of tokens",
        "note: a note",
    ]
