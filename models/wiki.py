"""Wikipedia text and two word-similarity lists, from the test data of the gensim wheel.

    python -m models.wiki [--out DIR] [--force]

writes into models/out/wiki/

    wiki_calib.txt   0.65 MB: articles 0, 4, 8, ... of the extract
    wiki_eval.txt    1.9 MB: all the other articles
    wordsim353.tsv   WordSim353 (Finkelstein et al. 2002): word, word, human score 0-10
    simlex999.txt    SimLex-999 (Hill et al. 2014): the same, tab separated

The text is plain paragraphs of at least 80 characters, one blank line between them, each article
under ` = Title = `. No article is in both files, so what is measured on wiki_eval was not seen when
calibrating on wiki_calib.

Licenses: Wikipedia text CC BY-SA 3.0; gensim LGPL-2.1.
"""

from __future__ import annotations

import argparse
import bz2
import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from models import packages
from models.files import OUT, finished, shown, size, staged

FOLDER = OUT / "wiki"
CALIB, EVAL = FOLDER / "wiki_calib.txt", FOLDER / "wiki_eval.txt"
WORDSIM353, SIMLEX999 = FOLDER / "wordsim353.tsv", FOLDER / "simlex999.txt"

DATA = "gensim/test/test_data/"
_DUMP = DATA + "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"

# What to remove from wiki markup, and how often: nested forms need several rounds, innermost first.
_REMOVE: tuple[tuple[int, str, int], ...] = (
    (1, r"<!--.*?-->", re.S),
    (1, r"<ref[^>/]*/>", 0),
    (1, r"<ref.*?</ref>", re.S),
    (1, r"<(math|gallery|timeline|table|div|code|source|sup|sub)[^>]*>.*?</\1>", re.S | re.I),
    (8, r"\{\{[^{}]*\}\}", 0),
    (3, r"\{\|[^{}]*?\|\}", re.S),
    (
        3,
        r"\[\[(?:File|Image|Category|[a-z\-]{2,12}):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]",
        0,
    ),
)
_REPLACE: tuple[tuple[str, str], ...] = (
    (r"\[\[[^\[\]|]*\|([^\[\]]*)\]\]", r"\1"),  # [[target|shown]]
    (r"\[\[([^\[\]]*)\]\]", r"\1"),  # [[target]]
    (r"\[https?://\S+ ?([^\]]*)\]", r"\1"),
    (r"'{2,}", ""),  # ''italic'', '''bold'''
    (r"<[^>]+>", ""),
    (r"&\w+;", " "),
)


class Article(NamedTuple):
    title: str
    paragraphs: list[str]

    def __str__(self) -> str:
        return f" = {self.title} = \n\n" + "\n\n".join(self.paragraphs)


def paragraphs(markup: str) -> list[str]:
    """The running text of a wiki page, one string a paragraph, without markup, lists and tables."""
    text = html.unescape(markup)
    for rounds, pattern, flags in _REMOVE:
        for _ in range(rounds):
            text = re.sub(pattern, "", text, flags=flags)
    for pattern, replacement in _REPLACE:
        text = re.sub(pattern, replacement, text)
    found = []
    for line in map(str.strip, text.split("\n")):
        if len(line) < 80 or line[0] in "|!*#:;{}=<":
            continue
        line = re.sub(r"\(\s*[;,]?\s*\)", "", line)  # brackets left empty by a removed template
        line = re.sub(r"\s+", " ", line)
        found.append(re.sub(r" ([,.;])", r"\1", line))
    return found


def articles(dump: str, at_least: int = 2000) -> Iterator[Article]:
    """The articles of a MediaWiki XML dump with `at_least` characters of running text."""
    for page in re.findall(r"<page>(.*?)</page>", dump, re.S):
        title = re.search(r"<title>(.*?)</title>", page)
        text = re.search(r"<text[^>]*>(.*?)</text>", page, re.S)
        if not title or not text or "<redirect" in page or ":" in title[1]:
            continue
        found = paragraphs(html.unescape(text[1]))
        if sum(map(len, found)) > at_least:
            yield Article(title[1], found)


def split(items: list[Article]) -> tuple[list[Article], list[Article]]:
    """(calibration, evaluation): every fourth article calibrates, the others evaluate."""
    return items[0::4], [item for index, item in enumerate(items) if index % 4]


def text(path: Path) -> str:
    """The content of CALIB or EVAL, which is built first if it is missing."""
    if path.parent == FOLDER and not path.exists():
        build()
    return path.read_text(encoding="utf-8")


def build(folder: Path = FOLDER) -> None:
    """Write the four files into `folder`."""
    dump = bz2.decompress(packages.extract(packages.GENSIM, _DUMP).read_bytes()).decode()
    calibration, evaluation = split(list(articles(dump)))
    with staged(folder) as stage:
        for name, part in ((CALIB.name, calibration), (EVAL.name, evaluation)):
            (stage / name).write_text("\n\n".join(map(str, part)), encoding="utf-8")
            print(f"{shown(folder / name)}: {len(part)} articles, {size(stage / name)}")
        for name in (WORDSIM353.name, SIMLEX999.name):
            source = packages.extract(packages.GENSIM, DATA + name)
            (stage / name).write_bytes(source.read_bytes())
            print(f"{shown(folder / name)}: {size(stage / name)}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.wiki", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="rebuild what is there")
    options = parser.parse_args()
    targets = [options.out / path.name for path in (CALIB, EVAL, WORDSIM353, SIMLEX999)]
    if not finished(*targets, force=options.force):
        build(options.out)


if __name__ == "__main__":
    packages.script(main)
