"""Optimization profiles: read from texts and data, checked against the model's inputs."""

from __future__ import annotations

import pytest

from onnxq.engine.build import read_shapes
from onnxq.engine.shapes import (
    EngineInput,
    ShapeRange,
    parse_shapes,
    profile_from_samples,
    resolve,
)
from onnxq.errors import OnnxqError

INPUTS = (
    EngineInput("input_ids", (-1, -1), "int64"),
    EngineInput("image", (1, 3, -1, -1), "fp32"),
    EngineInput("timestep", (), "fp32"),
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x:1x2,3x4,5x6", ShapeRange("x", (1, 2), (3, 4), (5, 6))),
        ("x:2x3", ShapeRange("x", (2, 3), (2, 3), (2, 3))),
        ("x:7", ShapeRange("x", (7,), (7,), (7,))),
        ("timestep:", ShapeRange("timestep", (), (), ())),
        ("model/in:0:1x2", ShapeRange("model/in:0", (1, 2), (1, 2), (1, 2))),
        ("a b,c:1X2", ShapeRange("a b,c", (1, 2), (1, 2), (1, 2))),
        ("past:1x0x64,1x8x64,1x16x64", ShapeRange("past", (1, 0, 64), (1, 8, 64), (1, 16, 64))),
    ],
)
def test_a_text_becomes_a_range(text: str, expected: ShapeRange) -> None:
    assert parse_shapes([text]) == (expected,)
    assert parse_shapes([str(expected)]) == (expected,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x", "cannot read --shapes 'x'"),
        (":1x2", "cannot read --shapes"),
        ("x:1x2,3x4", "2 shapes"),
        ("x:1x2,3x4,5x6,7x8", "4 shapes"),
        ("x:1xb", "cannot read the shape '1xb'"),
        ("x:-1x2", "cannot read the shape"),
        ("x:1x2,3,4x5", "differ in rank"),
        ("x:4x2,3x4,5x6", "4, 3, 5 do not rise"),
        ("x:1x2,6x4,5x6", "1, 6, 5 do not rise"),
    ],
)
def test_a_wrong_text_is_said(text: str, message: str) -> None:
    with pytest.raises(OnnxqError, match=message):
        parse_shapes([text])


def test_an_input_named_twice_is_said() -> None:
    with pytest.raises(OnnxqError, match="'x' twice"):
        parse_shapes(["x:1", "y:1", "x:2"])


def test_resolving_drops_what_is_fixed() -> None:
    profile = parse_shapes(["input_ids:1x1,1x256,4x512", "image:1x3x64x64", "timestep:"])
    assert [entry.name for entry in resolve(profile, INPUTS)] == ["input_ids", "image"]


@pytest.mark.parametrize(
    ("texts", "message", "also"),
    [
        (["ids:1x1", "image:1x3x8x8"], "'ids', which is no input", "input_ids [?, ?]"),
        (["input_ids:1x1"], "'image' has dynamic dimensions [1, 3, ?, ?]", "--shapes image:"),
        (["input_ids:1", "image:1x3x8x8"], "of 1 dimensions; the model has [?, ?]", ""),
        (["input_ids:1x1", "image:1x4x8x8"], "1x4x8x8; the model fixes [1, 3, ?, ?]", ""),
        (
            ["input_ids:1x1", "image:1x3x8x8,1x3x8x8,2x3x8x8"],
            "2x3x8x8; the model fixes",
            "",
        ),
    ],
)
def test_a_profile_that_does_not_fit_is_said(texts: list[str], message: str, also: str) -> None:
    with pytest.raises(OnnxqError) as caught:
        resolve(parse_shapes(texts), INPUTS)
    assert message in str(caught.value)
    assert also in str(caught.value)


def test_a_profile_from_data_spans_what_was_seen() -> None:
    seen = {"x": [(1, 40), (4, 12), (2, 30)], "t": [(), (), ()]}
    assert profile_from_samples(seen) == (
        ShapeRange("x", (1, 12), (2, 30), (4, 40)),
        ShapeRange("t", (), (), ()),
    )
    with pytest.raises(OnnxqError, match="different ranks"):
        profile_from_samples({"x": [(1, 2), (1,)]})
    with pytest.raises(OnnxqError, match="no shape"):
        profile_from_samples({"x": []})


def test_shapes_may_be_texts_lists_of_texts_or_profiles() -> None:
    one = parse_shapes(["x:1,2,3"])
    two = parse_shapes(["x:5"])
    assert read_shapes(()) == ()
    assert read_shapes(["x:1,2,3"]) == (one,)
    assert read_shapes([["x:1,2,3"], ["x:5"]]) == (one, two)
    assert read_shapes([one, ["x:5"]]) == (one, two)  # type: ignore[list-item]
    with pytest.raises(OnnxqError, match="mix"):
        read_shapes(["x:1,2,3", ["x:5"]])  # type: ignore[list-item]
