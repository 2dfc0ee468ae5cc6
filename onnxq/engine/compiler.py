"""One compile, inside the compile's own process: model file in, engine and layer source out."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from onnxq.engine.backends import Backend
from onnxq.engine.layers import dtype_word
from onnxq.engine.protocol import Outcome, Request
from onnxq.engine.shapes import EngineInput, Profile, resolve
from onnxq.errors import OnnxqError

_SHOWN_ERRORS = 3
_LONGEST = 600
_NO_DRIVER = " [checkMacros.cpp::catchCudaError"
"""What follows is about the missing GPU, which is never the reason here."""
_POSITIONS = re.compile(
    r"\S+: Error Code \d+: |^\w+\.cpp:\d+: |^ *\(foreignNode\) |\[\S+:\d+: \w+\] |"
    r"\.? In \w+ at /\S+:\d+"
)
_SPARSITY = "(Sparsity) "
"""How many layers it found that could skip zeros, and how many it chose to let: on a GPU alone."""
_NOISE = re.compile(r"has Int64 binding")
"""Warnings that ask for nothing: the parser says this of every INT64 input."""


class Log:
    """The log of one process: TensorRT keeps the first logger it was given, so there is one.

    Keeps warnings, errors, what it says of sparse kernels and what starts with `Layers:`; the rest
    (tens of thousands of lines for a large model) is dropped as it comes.
    """

    def __init__(self, trt: Any) -> None:
        self.layers: list[str] = []
        self.warnings: list[str] = []
        self.errors: list[str] = []
        self.sparsity: list[str] = []
        outer = self

        class Logger(trt.ILogger):  # type: ignore[misc]  # a class of an untyped module
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                if message.startswith("Layers:"):
                    outer.layers.append(message)
                elif message.startswith(_SPARSITY):
                    outer.sparsity.append(_plain(message.removeprefix(_SPARSITY)))
                elif severity <= trt.ILogger.ERROR:
                    outer.errors.append(message)
                elif severity == trt.ILogger.WARNING and not _NOISE.search(message):
                    outer.warnings.append(_plain(message))

        self.logger = Logger()

    def clear(self) -> None:
        """Forget what the previous compile said."""
        for kept in (self.layers, self.warnings, self.errors, self.sparsity):
            kept.clear()


def compile_model(
    request: Request, backend: Backend, trt: Any, log: Log, stage: Callable[[str], None]
) -> Outcome:
    """Compile one model.

    Raises:
        OnnxqError: the model cannot be imported, the shapes do not fit it, or the compiler gave up.
    """
    log.clear()
    started = time.monotonic()
    stage("parse")
    builder = trt.Builder(log.logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(request.model):
        raise _import_error(request.model, parser, log)
    inputs = _describe(network.num_inputs, network.get_input)
    outputs = _describe(network.num_outputs, network.get_output)
    profiles = tuple(resolve(profile, inputs) for profile in request.profiles or ((),))
    config = _configure(trt, builder, request, backend, profiles)
    parsed = time.monotonic()

    stage("compile")
    made = backend.compile(
        trt, builder, network, config, Path(request.engine) if request.engine else None
    )
    if made is None:
        raise _compile_error(request, log)
    engine_bytes, inspected = made
    return Outcome(
        version=str(trt.__version__),
        inputs=inputs,
        outputs=outputs,
        profiles=profiles,
        parse_seconds=round(parsed - started, 3),
        compile_seconds=round(time.monotonic() - parsed, 3),
        engine_bytes=engine_bytes,
        log=tuple(log.layers),
        inspected=tuple(inspected),
        warnings=tuple(dict.fromkeys(log.warnings)),
        sparsity=tuple(dict.fromkeys(log.sparsity)),
    )


def _network_flags(trt: Any) -> int:
    # TensorRT 10 takes the file's types only when asked to; later ones know nothing else.
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _describe(count: int, get: Callable[[int], Any]) -> tuple[EngineInput, ...]:
    tensors = [get(index) for index in range(count)]
    return tuple(
        EngineInput(t.name, tuple(t.shape), dtype_word(str(t.dtype).rpartition(".")[2]))
        for t in tensors
    )


def _configure(
    trt: Any, builder: Any, request: Request, backend: Backend, profiles: Sequence[Profile]
) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if request.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace)
    if request.sparse:
        config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
    for profile in profiles:
        if profile:
            made = builder.create_optimization_profile()
            for entry in profile:
                made.set_shape(entry.name, entry.minimum, entry.optimum, entry.maximum)
            config.add_optimization_profile(made)
    backend.set_targets(trt, config, request.targets)
    return config


def _import_error(model: str, parser: Any, log: Log) -> OnnxqError:
    unread = next((_plain(e) for e in log.errors if "Failed to open file" in e), "")
    if unread:
        return OnnxqError(f"TensorRT cannot read the external data of {model}: {unread}")
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if not errors:
        said = log.errors[-1] if log.errors else "no reason given"
        return OnnxqError(f"TensorRT cannot read {model}: {said}")
    first = errors[0]
    node, operator = _call(first, "node_name"), _call(first, "node_operator")
    where = f"node {node!r} ({operator})" if node else model
    said = _plain(first.desc())
    if said == "false":  # an operator that is known, and refused whatever its attributes
        said = "it does not support this operator"
    more = f"; {len(errors) - 1} more" if len(errors) > 1 else ""
    hint = "give every node a name of its own" if "already in use" in said else ""
    return OnnxqError(f"TensorRT cannot import {where}: {said}{more}", hint)


def _call(error: Any, method: str) -> str:
    found = getattr(error, method, None)
    return str(found()) if found else ""


def _compile_error(request: Request, log: Log) -> OnnxqError:
    said = "; ".join(_plain(message) for message in log.errors[-_SHOWN_ERRORS:])
    hint = ""
    if "HW-specific datatypes: fp8" in said:
        hint = "FP8 needs sm89 or later; quantize to int8 for this target"
    return OnnxqError(f"TensorRT cannot compile {request.model}: {said or 'no reason given'}", hint)


def _plain(message: str) -> str:
    """The message on one line, not too long, without the compiler's own source positions."""
    text = " ".join(message.split())
    text = _POSITIONS.sub("", text.split(_NO_DRIVER)[0]).strip()
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
