"""What a caller and the compile's own process say to each other, and how it is written as JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from onnxq.engine.shapes import EngineInput, Profile, ShapeRange
from onnxq.errors import OnnxqError


@dataclass(frozen=True)
class Request:
    """What to compile. Paths are absolute; `engine` None compiles and writes nothing.

    `workspace` is GPU memory in bytes that one layer may use while it runs, None for no limit.
    `sparse` lets the compiler use kernels that skip zeros where two of every four are.
    """

    model: str
    engine: str | None
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    workspace: int | None = None
    sparse: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a compile gave: sizes in bytes, times in seconds, the sources of the layer list."""

    version: str
    inputs: tuple[EngineInput, ...]
    outputs: tuple[EngineInput, ...]
    profiles: tuple[Profile, ...]
    parse_seconds: float
    compile_seconds: float
    engine_bytes: int
    log: tuple[str, ...]
    inspected: tuple[str, ...]
    warnings: tuple[str, ...]
    sparsity: tuple[str, ...] = ()


Answer = Outcome | OnnxqError
"""One request's outcome, or why there is none; an error of one does not stop the next."""


def request_to_json(request: Request) -> dict[str, Any]:
    return dataclasses.asdict(request)


def request_from_json(content: dict[str, Any]) -> Request:
    return Request(
        model=content["model"],
        engine=content["engine"],
        targets=tuple(content["targets"]),
        profiles=_profiles(content["profiles"]),
        workspace=content["workspace"],
        sparse=content["sparse"],
    )


def answer_to_json(answer: Answer) -> dict[str, Any]:
    if isinstance(answer, OnnxqError):
        return {"error": {"message": answer.message, "hint": answer.hint}}
    return {"outcome": dataclasses.asdict(answer)}


def answer_from_json(content: dict[str, Any]) -> Answer:
    if "error" in content:
        return OnnxqError(content["error"]["message"], content["error"]["hint"])
    outcome = content["outcome"]
    return Outcome(
        version=outcome["version"],
        inputs=_tensors(outcome["inputs"]),
        outputs=_tensors(outcome["outputs"]),
        profiles=_profiles(outcome["profiles"]),
        parse_seconds=outcome["parse_seconds"],
        compile_seconds=outcome["compile_seconds"],
        engine_bytes=outcome["engine_bytes"],
        log=tuple(outcome["log"]),
        inspected=tuple(outcome["inspected"]),
        warnings=tuple(outcome["warnings"]),
        sparsity=tuple(outcome["sparsity"]),
    )


def _tensors(content: list[dict[str, Any]]) -> tuple[EngineInput, ...]:
    return tuple(EngineInput(x["name"], tuple(x["dims"]), x["dtype"]) for x in content)


def _profiles(content: list[list[dict[str, Any]]]) -> tuple[Profile, ...]:
    return tuple(
        tuple(
            ShapeRange(x["name"], tuple(x["minimum"]), tuple(x["optimum"]), tuple(x["maximum"]))
            for x in profile
        )
        for profile in content
    )
