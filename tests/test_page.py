"""The report as a page: what a reader of HTML finds in it, and that names cannot break it."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from onnxq.page import change
from onnxq.report import Edit, Report

STEPS = [900.0, 500.0, 100.0]
LAYERS = {
    "flat": {"module": "", "peaks": [3.0, 3.0, 2.0], "means": [2.0, 2.0, 2.0], "covered": 3.0},
    "<b>": {"module": "up.0.conv", "peaks": [1.0, 2.0, 8.0], "means": [1, 2, 4], "covered": 2.0},
    "silent": {"module": "", "peaks": [0.0] * 3, "means": [0.0] * 3, "covered": 0.0},
}


class Reader(HTMLParser):
    """Texts, and the attributes of what is drawn; fails where a tag is not closed by its own."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.drawn: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "meta":
            self.open.append(tag)
        if tag in ("polyline", "line", "script"):
            self.drawn.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    report = Report("recipe <i>&", {"seconds": 1.5, "sites": {"conv": 3}}, ["a <script> note"])
    report.facts["amax_by_step"] = {"steps": STEPS, "layers": LAYERS}
    report.extend([Edit("emit", "quantize", "</table><script>", "why")])
    report.save(tmp_path / "r.html")
    reader = Reader()
    reader.feed((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert not reader.open
    return reader


def test_all_that_was_reported_is_there_as_text(read: Reader) -> None:
    said = "\n".join(read.texts)
    for text in ("recipe <i>&", "a <script> note", "</table><script>", "why", '"conv": 3', "1.5"):
        assert text in said, text
    assert not any(tag == "script" for tag, _ in read.drawn)


def test_the_layer_that_changes_most_comes_first(read: Reader) -> None:
    places = [read.texts.index(name) for name in ("up.0.conv", "flat", "silent")]
    assert places == sorted(places)
    assert "1 to 8, 2" in read.texts and "900: 1, 500: 2, 100: 8" in read.texts


def test_what_is_drawn(read: Reader) -> None:
    """Of the first layer, in pixels of 44: 8 is the top, at 2; 0 the bottom, at 42."""
    (_, line), (_, mean), (_, peak) = read.drawn[:3]
    assert (line["y1"], line["y2"]) == ("32.0", "32.0")
    assert mean == {"class": "mean", "points": "0.0,37.0 160.0,32.0 320.0,22.0"}
    assert peak == {"points": "0.0,37.0 160.0,32.0 320.0,2.0"}
    assert [tag for tag, _ in read.drawn].count("line") == 2  # none for a layer of zeros


def test_change() -> None:
    assert change([2.0, 0.0, 8.0]) == 4.0  # silence is no quieter step
    assert change([0.0, 0.0]) == 1.0


def test_any_other_name_gets_json(tmp_path: Path) -> None:
    Report("t", notes=["n"]).save(tmp_path / "r.htm.json")
    assert json.loads((tmp_path / "r.htm.json").read_text())["notes"] == ["n"]
