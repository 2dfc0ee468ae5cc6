"""Compile a model in a process of its own and read what it became."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxq
from onnxq import files
from onnxq.engine import commands, kernels
from onnxq.engine.backends import Backend, choose, parse_targets
from onnxq.engine.child import compile_all
from onnxq.engine.coverage import Coverage, WeightedNode
from onnxq.engine.layers import EngineLayer
from onnxq.engine.matching import cover
from onnxq.engine.protocol import Outcome, Request
from onnxq.engine.shapes import EngineInput, Profile, parse_shapes
from onnxq.errors import OnnxqError
from onnxq.gpus import DEFAULT_TARGET
from onnxq.progress import Progress, silent

Shapes = Sequence[str] | Sequence[Sequence[str]] | Sequence[Profile]


@dataclass(frozen=True)
class BuildResult:
    """A compiled engine: what it was made from and for, its layers, and how the nodes fared.

    `engine` is None when nothing was written. `targets` is empty for the GPU at hand. Sizes are
    in bytes, times in seconds. `model_sha256` covers the model file, not its external data.
    `sparsity` is what the compiler said of kernels that skip zeros, where `sparse` allowed them.
    """

    engine: Path | None
    engine_bytes: int
    model: Path
    model_sha256: str
    backend: str
    versions: dict[str, str]
    targets: tuple[str, ...]
    profiles: tuple[Profile, ...]
    inputs: tuple[EngineInput, ...]
    outputs: tuple[EngineInput, ...]
    parse_seconds: float
    compile_seconds: float
    warnings: tuple[str, ...]
    layers: tuple[EngineLayer, ...]
    coverage: Coverage
    sparse: bool = False
    sparsity: tuple[str, ...] = ()

    def commands(self) -> list[str]:
        """Command lines that build and check the same engine on the machine with the GPU."""
        engine = self.engine or self.model.with_suffix(".plan")
        lines = commands.trtexec_commands(self.model, engine, self.profiles, self.sparse)
        lines.append(commands.polygraphy_convert(self.model, engine, self.profiles, self.sparse))
        lines.append(commands.polygraphy_run(self.model, self.profiles))
        return lines


def build(
    model: Path,
    output: Path | None = None,
    *,
    target: str = DEFAULT_TARGET,
    shapes: Shapes = (),
    nodes: Iterable[WeightedNode] = (),
    backend: str | None = None,
    memory_limit: int | None = None,
    workspace: int | None = None,
    sparse: bool = False,
    progress: Progress = silent,
) -> BuildResult:
    """Compile `model` for `target`; write the engine and its sidecar `<output>.json`.

    Args:
        output: the engine to write; None compiles and writes nothing.
        target: one name, or several joined by commas (`sm89,sm120`): one engine for all of them.
            Backend `tensorrt` compiles for the GPU at hand and does not look at it.
        shapes: `NAME:MIN[,OPT,MAX]` texts, or several lists of them (one profile a list), or
            profiles.
        nodes: the multiplications of the model and what each is meant to run in, for coverage.
        backend: `tensorrt_rtx` or `tensorrt`; by default the first that is installed.
        memory_limit: bytes of memory the compile may take; None for no limit.
        workspace: bytes of GPU memory one layer may use while it runs; None for no limit.
        sparse: whether kernels may skip zeros where two of every four weights are zero.

    Raises:
        OnnxqError: the model cannot be imported or compiled, or its layers cannot be read;
            nothing is written then, and an existing `output` is as it was.
    """
    chosen = choose(backend)
    targets = tuple(entry.name for entry in parse_targets(target, chosen))
    if not model.is_file():
        raise OnnxqError(f"no such model file: {model}")
    plain = Request(str(model.resolve()), None, targets, read_shapes(shapes), workspace, sparse)

    def run(engine: Path | None) -> BuildResult:
        request = dataclasses.replace(plain, engine=str(engine.resolve()) if engine else None)
        answer = compile_all([request], chosen, memory_limit=memory_limit, progress=progress)[0]
        if isinstance(answer, OnnxqError):
            raise answer
        return _result(model, output, chosen, targets, answer, nodes, sparse)

    if output is None:
        return run(None)
    if output.resolve() == model.resolve():
        raise OnnxqError(f"the engine would overwrite its model: {model}")
    sidecar = output.with_name(output.name + ".json")
    with files.replacing(output, sidecar) as (engine_path, sidecar_path):
        result = run(engine_path)
        sidecar_path.write_text(json.dumps(describe(result), indent=2) + "\n")
    return result


def read_shapes(shapes: Shapes) -> tuple[Profile, ...]:
    """The `shapes` argument of `build` as profiles: none, one, or one for each list."""
    texts = [entry for entry in shapes if isinstance(entry, str)]
    if texts:
        if len(texts) < len(shapes):
            raise OnnxqError(
                "shapes mix texts and lists", "give one list of texts, or a list of such lists"
            )
        return (parse_shapes(texts),)
    return tuple(_read_profile(entry) for entry in shapes if not isinstance(entry, str))


def describe(result: BuildResult) -> dict[str, Any]:
    """The sidecar's content: what the engine is, made from what, for what, and how it fared."""
    return {
        "versions": result.versions,
        "backend": result.backend,
        "targets": list(result.targets) or "the GPU at hand",
        "model": result.model.name,
        "model_sha256": result.model_sha256,
        "profiles": [[str(entry) for entry in profile] for profile in result.profiles],
        "inputs": [dataclasses.asdict(entry) for entry in result.inputs],
        "outputs": [dataclasses.asdict(entry) for entry in result.outputs],
        "engine_bytes": result.engine_bytes,
        "weight_bytes": kernels.weight_bytes(result.layers),
        "parse_seconds": result.parse_seconds,
        "compile_seconds": result.compile_seconds,
        "layers": len(result.layers),
        "coverage": result.coverage.to_json(),
        "warnings": list(result.warnings),
        "sparse": result.sparse,
        "sparsity": list(result.sparsity),
        "commands": result.commands(),
    }


def _read_profile(entry: Sequence[str] | Profile) -> Profile:
    texts = [part for part in entry if isinstance(part, str)]
    return parse_shapes(texts) + tuple(part for part in entry if not isinstance(part, str))


def _result(
    model: Path,
    output: Path | None,
    backend: Backend,
    targets: tuple[str, ...],
    outcome: Outcome,
    nodes: Iterable[WeightedNode],
    sparse: bool,
) -> BuildResult:
    layers = tuple(backend.layers(list(outcome.log), list(outcome.inspected)))
    return BuildResult(
        engine=output,
        engine_bytes=outcome.engine_bytes,
        model=model,
        model_sha256=files.sha256(model),
        backend=backend.name,
        versions={"onnxq": onnxq.__version__, backend.name: outcome.version},
        targets=targets,
        profiles=outcome.profiles,
        inputs=outcome.inputs,
        outputs=outcome.outputs,
        parse_seconds=outcome.parse_seconds,
        compile_seconds=outcome.compile_seconds,
        warnings=outcome.warnings,
        layers=layers,
        coverage=cover(layers, nodes, outcome.profiles),
        sparse=sparse,
        sparsity=outcome.sparsity,
    )
