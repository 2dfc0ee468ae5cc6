"""The two compilers behind one interface, each used only inside the compile's own process.

`tensorrt_rtx` compiles ahead of time for any of its targets, on a machine with no GPU, and what it
made is read from its log. `tensorrt` compiles for the GPU at hand and is read through its engine
inspector. Their Python API is the same otherwise, so `compiler.py` serves both.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from onnxq.engine.layers import EngineLayer, layers_from_inspector, layers_from_log
from onnxq.errors import OnnxqError, missing_package
from onnxq.gpus import TARGETS, Target, target


class Backend(Protocol):
    """What differs between the compilers. `Any` stands for objects of their Python modules."""

    name: str
    """Its name on our side, which is also its Python module's."""

    ahead_of_time: bool
    """Whether it compiles for a target other than the GPU at hand."""

    def set_targets(self, trt: Any, config: Any, targets: Sequence[str]) -> None:
        """Tell the builder's config which GPUs to compile for."""
        ...

    def compile(
        self, trt: Any, builder: Any, network: Any, config: Any, engine: Path | None
    ) -> tuple[int, list[str]] | None:
        """Compile, write the engine if asked to; its size in bytes and the inspector's texts.

        None when the compiler gave up (its log says why).
        """
        ...

    def layers(self, log: list[str], inspected: list[str]) -> list[EngineLayer]:
        """The compiled layers, from the builder's log or from what `compile` inspected."""
        ...


class TensorRTRTX:
    """TensorRT for RTX: compiles with no GPU and no driver, several targets in one engine."""

    name = "tensorrt_rtx"
    ahead_of_time = True

    def set_targets(self, trt: Any, config: Any, targets: Sequence[str]) -> None:
        config.num_compute_capabilities = len(targets)
        for index, name in enumerate(targets):
            config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)

    def compile(
        self, trt: Any, builder: Any, network: Any, config: Any, engine: Path | None
    ) -> tuple[int, list[str]] | None:
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            return None
        _write(plan, engine)
        return int(plan.nbytes), []

    def layers(self, log: list[str], inspected: list[str]) -> list[EngineLayer]:
        return layers_from_log(log)


class TensorRT:
    """TensorRT proper: needs the GPU it compiles for, and opens the engine to inspect it."""

    name = "tensorrt"
    ahead_of_time = False

    def set_targets(self, trt: Any, config: Any, targets: Sequence[str]) -> None:
        """The GPU at hand: nothing to set."""

    def compile(
        self, trt: Any, builder: Any, network: Any, config: Any, engine: Path | None
    ) -> tuple[int, list[str]] | None:
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            return None
        _write(plan, engine)
        opened = trt.Runtime(builder.logger).deserialize_cuda_engine(plan)
        if opened is None:
            raise OnnxqError("TensorRT cannot open the engine that it has just built")
        inspector = opened.create_engine_inspector()
        text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return int(plan.nbytes), [text]

    def layers(self, log: list[str], inspected: list[str]) -> list[EngineLayer]:
        return [layer for text in inspected for layer in layers_from_inspector(text)]


BACKENDS: dict[str, Backend] = {b.name: b for b in (TensorRTRTX(), TensorRT())}


def choose(name: str | None) -> Backend:
    """The named backend, or the first one installed.

    Raises:
        OnnxqError: an unknown name, or the package is not installed.
    """
    if name is not None and name not in BACKENDS:
        raise OnnxqError(f"unknown backend {name!r}", f"choose one of: {', '.join(BACKENDS)}")
    for backend in [BACKENDS[name]] if name else BACKENDS.values():
        if importlib.util.find_spec(backend.name) is not None:
            return backend
    raise missing_package(name or "tensorrt_rtx", "compiling")


def load_module(backend: Backend) -> Any:
    """Import the backend's Python module; only the compile's own process does that."""
    try:
        return importlib.import_module(backend.name)
    except ImportError as error:
        raise missing_package(backend.name, "compiling") from error


def parse_targets(text: str, backend: Backend) -> tuple[Target, ...]:
    """`sm89` or `sm89,sm120` as targets this backend compiles for.

    Raises:
        OnnxqError: an unknown target, or one that cannot be compiled for without its GPU.
    """
    if not backend.ahead_of_time:
        return ()
    targets = tuple(dict.fromkeys(target(part.strip()) for part in text.split(",")))
    for entry in targets:
        if not entry.tensorrt:
            raise OnnxqError(
                f"there is nothing to build for {entry.name}: it runs the model as it is",
                "leave out the build, or name the GPU's target",
            )
        if not entry.ahead_of_time:
            offered = ", ".join(name for name, row in TARGETS.items() if row.ahead_of_time)
            raise OnnxqError(
                f"{backend.name} cannot compile for {entry.name} ({entry.architecture})",
                f"ahead of time it compiles for: {offered}; for {entry.name} use trtexec on a "
                "machine with that GPU",
            )
    return targets


def _write(plan: Any, engine: Path | None) -> None:
    # The file is there, empty. If the caller was killed, its next run has removed it: no new one.
    if engine is not None:
        with engine.open("r+b") as stream:
            stream.write(plan)
