"""Optimization profiles: which shapes of its inputs an engine must take.

A profile gives each input with dynamic dimensions three shapes: the smallest, the one to be
fastest at, the largest. On the command line: `--shapes NAME:MIN[,OPT,MAX]`, once per input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from onnxq.errors import OnnxqError

Shape = tuple[int, ...]

_FORM = "write NAME:MIN[,OPT,MAX] with dimensions joined by x, such as input_ids:1x1,1x256,4x512"
_DIMS = re.compile(r"\d+(x\d+)*")


@dataclass(frozen=True)
class ShapeRange:
    """The shapes one input may have: `minimum <= optimum <= maximum`, dimension by dimension."""

    name: str
    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __str__(self) -> str:
        shapes = [format_shape(s) for s in (self.minimum, self.optimum, self.maximum)]
        return f"{self.name}:{','.join(shapes if len(set(shapes)) > 1 else shapes[:1])}"


Profile = tuple[ShapeRange, ...]


@dataclass(frozen=True)
class EngineInput:
    """An input as the compiler sees it: -1 for a dynamic dimension."""

    name: str
    dims: Shape
    dtype: str = ""


def parse_shapes(specs: Sequence[str]) -> Profile:
    """One profile from `NAME:MIN[,OPT,MAX]` texts, one per input, split at the last colon.

    `NAME:` alone is a scalar. One shape means that shape only.

    Raises:
        OnnxqError: a text is not of that form, an input is named twice, or MIN > OPT > MAX.
    """
    profile = tuple(_parse_one(spec) for spec in specs)
    names = [entry.name for entry in profile]
    for name in names:
        if names.count(name) > 1:
            raise OnnxqError(
                f"--shapes names the input {name!r} twice in one profile",
                "give several profiles as several lists of shapes",
            )
    return profile


def profile_from_samples(observed: Mapping[str, Sequence[Shape]]) -> Profile:
    """One profile from shapes seen in data: minimum, median and maximum of each dimension.

    Raises:
        OnnxqError: an input was seen with different ranks, or not at all.
    """
    return tuple(_range_of(name, shapes) for name, shapes in observed.items())


def profile_from_ranges(
    observed: Mapping[str, tuple[Shape, Shape, Shape]],
) -> Profile:
    """The profile that spans the smallest, middle and largest shape of each input."""
    return tuple(ShapeRange(name, *(tuple(s) for s in shapes)) for name, shapes in observed.items())


def split_profiles(
    shapes: Sequence[str] | Sequence[Sequence[str]],
) -> list[list[str]]:
    """Lists of `--shapes` texts, one a profile: an input named again begins the next one.

    Raises:
        OnnxqError: a profile lacks an input that another names.
    """
    profiles: dict[int, dict[str, str]] = {}
    if any(not isinstance(entry, str) for entry in shapes):
        return [list(entry) for entry in shapes]
    for text in map(str, shapes):
        name = text.rpartition(":")[0]
        index = sum(name in profile for profile in profiles.values())
        profiles.setdefault(index, {})[name] = text
    names = [set(profile) for profile in profiles.values()]
    for other in names[1:]:
        if other != names[0]:
            missing = sorted(names[0] ^ other)[0]
            raise OnnxqError(
                f"--shapes gives {missing!r} for some profiles and not for others",
                "give every input once for each profile",
            )
    return [list(profile.values()) for profile in profiles.values()]


def resolve(profile: Profile, inputs: Sequence[EngineInput]) -> Profile:
    """The profile in full: checked against the model's inputs, fixed inputs left out.

    Raises:
        OnnxqError: an unknown input, a wrong rank, a fixed dimension contradicted, or a dynamic
            input that the profile does not name.
    """
    given = {entry.name: entry for entry in profile}
    known = {entry.name: entry for entry in inputs}
    for name in given:
        if name not in known:
            raise OnnxqError(
                f"--shapes names {name!r}, which is no input of the model",
                f"its inputs: {_list_inputs(inputs)}",
            )
    resolved = []
    for entry in inputs:
        if entry.name in given:
            _check(given[entry.name], entry)
            resolved.append(given[entry.name])
        elif -1 in entry.dims:
            raise OnnxqError(
                f"input {entry.name!r} has dynamic dimensions {format_dims(entry.dims)} "
                "and no shapes were given for it",
                f"add --shapes {entry.name}:MIN,OPT,MAX; the inputs: {_list_inputs(inputs)}",
            )
    return tuple(entry for entry in resolved if -1 in known[entry.name].dims)


def format_shape(shape: Shape) -> str:
    """`(1, 256)` as `1x256`."""
    return "x".join(str(dim) for dim in shape)


def format_dims(dims: Shape) -> str:
    """`(1, -1)` as `[1, ?]`."""
    return "[" + ", ".join("?" if dim < 0 else str(dim) for dim in dims) + "]"


def _parse_one(spec: str) -> ShapeRange:
    name, colon, text = spec.rpartition(":")
    if not colon or not name:
        raise OnnxqError(f"cannot read --shapes {spec!r}", _FORM)
    shapes = [_parse_shape(part, spec) for part in text.split(",")]
    if len(shapes) == 1:
        shapes = shapes * 3
    if len(shapes) != 3:
        raise OnnxqError(f"--shapes {spec!r} has {len(shapes)} shapes; one or three are due", _FORM)
    entry = ShapeRange(name, *shapes)
    if len({len(shape) for shape in shapes}) > 1:
        raise OnnxqError(f"--shapes {spec!r}: the three shapes differ in rank", _FORM)
    for low, middle, high in zip(*shapes, strict=True):
        if not low <= middle <= high:
            raise OnnxqError(
                f"--shapes {spec!r}: {low}, {middle}, {high} do not rise from MIN over OPT to MAX",
                _FORM,
            )
    return entry


def _parse_shape(text: str, spec: str) -> Shape:
    text = text.strip().lower()
    if not text:
        return ()
    if not _DIMS.fullmatch(text):
        raise OnnxqError(f"cannot read the shape {text!r} in --shapes {spec!r}", _FORM)
    return tuple(int(dim) for dim in text.split("x"))


def _range_of(name: str, shapes: Sequence[Shape]) -> ShapeRange:
    if not shapes:
        raise OnnxqError(f"no shape was seen for input {name!r}", "give --shapes instead")
    if len({len(shape) for shape in shapes}) > 1:
        raise OnnxqError(
            f"input {name!r} was seen with different ranks", "give --shapes instead of data"
        )
    columns = [sorted(column) for column in zip(*shapes, strict=True)]
    return ShapeRange(
        name,
        tuple(column[0] for column in columns),
        tuple(column[len(column) // 2] for column in columns),
        tuple(column[-1] for column in columns),
    )


def _check(given: ShapeRange, entry: EngineInput) -> None:
    for shape in (given.minimum, given.optimum, given.maximum):
        if len(shape) != len(entry.dims):
            raise OnnxqError(
                f"--shapes gives {given.name!r} the shape {format_shape(shape) or 'scalar'} of "
                f"{len(shape)} dimensions; the model has {format_dims(entry.dims)}"
            )
        for dim, fixed in zip(shape, entry.dims, strict=True):
            if fixed not in (-1, dim):
                raise OnnxqError(
                    f"--shapes gives {given.name!r} the shape {format_shape(shape)}; the model "
                    f"fixes {format_dims(entry.dims)}"
                )


def _list_inputs(inputs: Sequence[EngineInput]) -> str:
    return ", ".join(f"{entry.name} {format_dims(entry.dims)}" for entry in inputs)
