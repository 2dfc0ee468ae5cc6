"""Compiled layers: what the compiler made of a network, read from what it says about it.

Two sources, one result. Without a GPU an engine cannot be opened again, so the source is the
builder's log: at VERBOSE, with DETAILED profiling verbosity, tensorrt-rtx prints one message that
starts with `Layers:` and has one line a layer. On a GPU the engine inspector gives JSON.

The log is text written for people and may change with any release, so the reader is exact: a line
it cannot read to the end is an error that names the release the reader was written for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from onnxq.errors import OnnxqError

KNOWN_RELEASE = "1.7.1"
"""The tensorrt-rtx release whose log text this module reads."""

_HEADER = "Layers:"
_ORIGIN = "[ONNX Layer: "
_SEPARATOR = re.compile(r"[\x1e\x1f]")
_TAIL = (
    r"StreamId: -?\d+(?:, \w+: [-\d ]+)*"
    r"(?:, JumpTarget(?:Then|Else)?: .*?){0,2}"  # of If and Loop; their values are layers' names
    r", Metadata: (?P<origins>.*)"
)
_LINE = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*)\], "
    r"Constants: \[(?P<constants>.*)\], Outputs: \[(?P<outputs>.*)\], "
    r"TacticName: (?P<tactic>.*), " + _TAIL,
    re.DOTALL,
)
# Layers outside a compiled group, such as a shape that is copied to the GPU.
_OUTSIDE = re.compile(
    r"Name: (?P<name>.*), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*)\], "
    r"(?P<constants>)Outputs: \[(?P<outputs>.*)\], ParameterType: .*, " + _TAIL,
    re.DOTALL,
)
_NEXT_LINE = re.compile(r"\n(?=Name: )")
_TENSOR = re.compile(
    r" ?\{ Name: (?P<name>.*?), (?:Location: \w+, )?Dimensions: \[(?P<dims>[-\d,]*)\], "
    r"(?:Strides: \[[^\]]*\], StrideOrder: \[[^\]]*\], )?"
    r"Datatype: (?P<dtype>[^,}]+), Format: .*? \}(?:,|$)",
    re.DOTALL,
)
_PROFILE = re.compile(r"\[profile (\d+)\]")
_GROUP = re.compile(r"_myl(\d+)_\d+$")

_DTYPES = {
    "fp32": "fp32",
    "fp16": "fp16",
    "float": "fp32",
    "half": "fp16",
    "bfloat16": "bf16",
    "bf16": "bf16",
    "fp8": "fp8",
    "e4m3": "fp8",
    "int8": "int8",
    "uint8": "uint8",
    "int4": "int4",
    "fp4": "fp4",
    "e2m1": "fp4",
    "fp4e2m1": "fp4",
    "e8m0": "e8m0",
    "fp8ue8m0": "e8m0",
    "int32": "int32",
    "int64": "int64",
    "bool": "bool",
}
_BITS = {"fp32": 32, "int32": 32, "fp16": 16, "bf16": 16, "int64": 64, "int4": 4, "fp4": 4}


@dataclass(frozen=True)
class Tensor:
    """One operand of a layer. `dims` has -1 where the size is dynamic; `dtype` is our word.

    `name` is the compiler's, so that the layer that made an operand can be found.
    """

    name: str
    dims: tuple[int, ...]
    dtype: str

    @property
    def elements(self) -> int:
        """How many values; 0 while a dimension is dynamic."""
        count = 1
        for dim in self.dims:
            count *= max(dim, 0)
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the values, sub-byte formats packed."""
        return (self.elements * _BITS.get(self.dtype, 8) + 7) // 8


@dataclass(frozen=True)
class EngineLayer:
    """One compiled layer: a kernel, and the names of the ONNX nodes that went into it.

    `kind` is the compiler's word (gemm, correlation, kgen, runtime_fusion, ...), `profile` the
    optimization profile it was compiled for.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    onnx_nodes: tuple[str, ...]
    profile: int = 0


def layers_from_log(messages: list[str]) -> list[EngineLayer]:
    """Read the builder's log messages of one build.

    Raises:
        OnnxqError: there is no `Layers:` message, or a line of it cannot be read.
    """
    layers: list[EngineLayer] = []
    found = False
    for message in messages:
        if message.startswith(_HEADER):
            found = True
            body = message[len(_HEADER) :].split("\nI/O Tensors:")[0]
            # Not splitlines(): names may hold line breaks, and origins have control characters.
            lines = _NEXT_LINE.split(body.strip("\n"))
            layers.extend(_read_line(line) for line in lines if line.strip())
    if not found:
        raise _unreadable("the compiler's log has no list of layers")
    return _with_profiles(layers)


def layers_from_inspector(text: str) -> list[EngineLayer]:
    """Read the JSON of TensorRT's engine inspector (profiling verbosity DETAILED).

    Raises:
        OnnxqError: not that JSON, or the engine was built without DETAILED verbosity.
    """
    try:
        entries = json.loads(text)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise OnnxqError(f"cannot read the engine inspector's JSON: {error}") from error
    if any(not isinstance(entry, dict) for entry in entries):
        raise OnnxqError(
            "the engine lists only its layers' names",
            "build it with profiling verbosity DETAILED",
        )
    return _with_profiles([_from_json(entry) for entry in entries])


def _read_line(line: str) -> EngineLayer:
    match = _LINE.fullmatch(line) or _OUTSIDE.fullmatch(line)
    if match is None:
        raise _unreadable(f"cannot read this line of the compiler's log: {line[:200]!r}")
    return EngineLayer(
        name=match["name"],
        kind=match["kind"],
        inputs=tuple(_read_tensors(match["inputs"], line)),
        constants=tuple(_read_tensors(match["constants"], line)),
        outputs=tuple(_read_tensors(match["outputs"], line)),
        onnx_nodes=_origins(match["origins"]),
    )


def _read_tensors(text: str, line: str) -> Iterator[Tensor]:
    position = 0
    while position < len(text):
        match = _TENSOR.match(text, position)
        if match is None:
            raise _unreadable(
                f"cannot read an operand, {text[position : position + 120]!r}, of {line[:80]!r}"
            )
        dims = tuple(int(dim) for dim in match["dims"].split(",") if dim)
        yield Tensor(match["name"], dims, dtype_word(match["dtype"]))
        position = match.end()


def _origins(metadata: str) -> tuple[str, ...]:
    """Node names out of `[ONNX Layer: a]<separator>[ONNX Layer: b]`.

    The separator is a control character, so names may hold brackets, commas and spaces.
    """
    names = []
    for piece in _SEPARATOR.split(metadata.strip()):
        if not piece:
            continue
        if not piece.startswith(_ORIGIN) or not piece.endswith("]"):
            raise _unreadable(f"cannot read which ONNX node a layer came from: {piece[:120]!r}")
        names.append(piece[len(_ORIGIN) : -1])
    return tuple(dict.fromkeys(names))


def dtype_word(text: str) -> str:
    """Our word for the compiler's: `fp16` for `Half` or `Row major linear FP16 format`.

    An unknown word comes back in lower case.
    """
    words = re.findall(r"\w+", text.lower())
    return next((_DTYPES[word] for word in words if word in _DTYPES), text.strip().lower())


def _with_profiles(layers: list[EngineLayer]) -> list[EngineLayer]:
    """Fill in `profile`: the compiler marks some names of a group `[profile N]`, not all.

    A group is one subgraph compiled for one profile; its layers' names end in `_myl<group>_<n>`.
    """
    profile_of: dict[str, int] = {}
    for layer in layers:
        names = [layer.name, *(t.name for t in layer.inputs + layer.outputs)]
        for name in names:
            if mark := _PROFILE.search(name):
                profile_of.setdefault(_group(layer.name), int(mark[1]))
    return [replace(layer, profile=profile_of.get(_group(layer.name), 0)) for layer in layers]


def _group(name: str) -> str:
    match = _GROUP.search(name)
    return match[1] if match else name


def _from_json(entry: dict[str, Any]) -> EngineLayer:
    def tensors(key: str) -> tuple[Tensor, ...]:
        return tuple(
            Tensor(
                str(tensor.get("Name", "")),
                tuple(tensor.get("Dimensions", ())),
                dtype_word(str(tensor.get("Datatype", tensor.get("Format/Datatype", "")))),
            )
            for tensor in entry.get(key, ())
        )

    return EngineLayer(
        name=str(entry.get("Name", "")),
        kind=str(entry.get("LayerType", "")),
        inputs=tensors("Inputs"),
        constants=tensors("Constants"),
        outputs=tensors("Outputs"),
        onnx_nodes=_origins(str(entry.get("Metadata", ""))),
    )


def _unreadable(what: str) -> OnnxqError:
    return OnnxqError(
        what,
        f"onnxq reads the log of tensorrt-rtx {KNOWN_RELEASE}: "
        f"pip install 'tensorrt-rtx=={KNOWN_RELEASE}.*'",
    )
