"""The backend for TensorRT proper, which needs a GPU: what it asks of the module, on a stand-in."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from onnxq.engine.backends import BACKENDS, choose, parse_targets
from onnxq.engine.compiler import Log, compile_model
from onnxq.engine.protocol import Request
from onnxq.engine.shapes import parse_shapes
from onnxq.errors import OnnxqError

LAYER = {
    "Name": "a_myl0_1",
    "LayerType": "gemm",
    "Inputs": [{"Name": "x", "Dimensions": [-1, 64], "Format/Datatype": "FP8"}],
    "Constants": [{"Name": "w", "Dimensions": [64, 8], "Format/Datatype": "FP8"}],
    "Outputs": [{"Name": "y", "Dimensions": [-1, 8], "Format/Datatype": "Half"}],
    "Metadata": "[ONNX Layer: a]\x1e[ONNX Layer: dq]",
}


class Plan(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class StandIn:
    """TensorRT 10's Python module as far as a build touches it; remembers what it was asked."""

    __version__ = "10.13.0"

    def __init__(
        self,
        *,
        parses: bool = True,
        builds: bool = True,
        typed: bool = True,
        tells: bool = True,
    ) -> None:
        self.asked: dict[str, Any] = {}
        asked = self.asked
        tensor = SimpleNamespace(name="x", shape=(-1, 64), dtype="DataType.HALF")
        network = SimpleNamespace(
            num_inputs=1, num_outputs=1, get_input=lambda i: tensor, get_output=lambda i: tensor
        )
        error = SimpleNamespace(
            desc=lambda: "no importer", node_name=lambda: "odd", node_operator=lambda: "Strange"
        )

        class ILogger:
            ERROR, WARNING = 1, 2

        class Profile:
            def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
                asked.setdefault("shapes", []).append((name, *shapes))

        class Builder:
            def __init__(self, logger: Any) -> None:
                self.logger = logger

            def create_network(self, flags: int) -> Any:
                asked["flags"] = flags
                return network

            def create_builder_config(self) -> Any:
                asked["config"] = SimpleNamespace(
                    add_optimization_profile=lambda p: asked.setdefault("profiles", []).append(p),
                    set_memory_pool_limit=lambda pool, size: asked.update(pool=(pool, size)),
                    set_flag=lambda flag: asked.setdefault("flags set", []).append(flag),
                )
                return asked["config"]

            def create_optimization_profile(self) -> Profile:
                return Profile()

            def build_serialized_network(self, net: Any, config: Any) -> Plan | None:
                if "flags set" in asked:
                    for said in ("Found 2 layer(s) eligible", "Chose 1 layer(s)"):
                        self.logger.log(4, f"(Sparsity) {said} to use sparse tactics: a")
                if not builds:
                    self.logger.log(ILogger.ERROR, "kernel: Error Code 9: no tactic")
                return Plan(b"plan") if builds else None

        class OnnxParser:
            num_errors = 1 if tells else 0

            def __init__(self, net: Any, logger: Any) -> None:
                self.logger = logger

            def parse_from_file(self, path: str) -> bool:
                if not parses and not tells:
                    self.logger.log(ILogger.ERROR, "truncated")
                return parses

            def get_error(self, index: int) -> Any:
                return error

        inspector = SimpleNamespace(
            get_engine_information=lambda form: json.dumps({"Layers": [LAYER]})
        )

        class Runtime:
            def __init__(self, logger: Any) -> None:
                pass

            def deserialize_cuda_engine(self, plan: Plan) -> Any:
                return SimpleNamespace(create_engine_inspector=lambda: inspector)

        self.ILogger, self.Builder, self.OnnxParser, self.Runtime = (
            ILogger,
            Builder,
            OnnxParser,
            Runtime,
        )
        self.NetworkDefinitionCreationFlag = (
            SimpleNamespace(STRONGLY_TYPED=1) if typed else SimpleNamespace()
        )
        self.ProfilingVerbosity = SimpleNamespace(DETAILED="detailed")
        self.BuilderFlag = SimpleNamespace(SPARSE_WEIGHTS="sparse")
        self.MemoryPoolType = SimpleNamespace(WORKSPACE="workspace")
        self.LayerInformationFormat = SimpleNamespace(JSON="json")


def compile_with(trt: StandIn, engine: Path | None = None, **more: Any) -> Any:
    profile = parse_shapes(["x:1x64,2x64,4x64"])
    request = Request("m.onnx", str(engine) if engine else None, (), (profile,), **more)
    return compile_model(request, BACKENDS["tensorrt"], trt, Log(trt), lambda word: None)


def test_it_builds_strongly_typed_and_detailed_and_reads_the_inspector(tmp_path: Path) -> None:
    trt = StandIn()
    (tmp_path / "m.plan").touch()
    outcome = compile_with(trt, tmp_path / "m.plan", workspace=1 << 30)
    assert trt.asked["flags"] == 1 << 1
    assert trt.asked["config"].profiling_verbosity == "detailed"
    assert trt.asked["shapes"] == [("x", (1, 64), (2, 64), (4, 64))]
    assert len(trt.asked["profiles"]) == 1
    assert trt.asked["pool"] == ("workspace", 1 << 30)
    assert (tmp_path / "m.plan").read_bytes() == b"plan"
    assert outcome.engine_bytes == 4
    assert outcome.inputs[0].dtype == "fp16"
    (layer,) = BACKENDS["tensorrt"].layers(list(outcome.log), list(outcome.inspected))
    assert layer.onnx_nodes == ("a", "dq")
    assert [t.dtype for t in layer.inputs + layer.constants] == ["fp8", "fp8"]


def test_sparse_kernels_are_allowed_where_asked_and_what_is_said_of_them_kept() -> None:
    trt = StandIn()
    outcome = compile_with(trt, sparse=True)
    assert trt.asked["flags set"] == ["sparse"]
    assert outcome.sparsity == (
        "Found 2 layer(s) eligible to use sparse tactics: a",
        "Chose 1 layer(s) to use sparse tactics: a",
    )
    trt = StandIn()
    assert compile_with(trt).sparsity == () and "flags set" not in trt.asked


def test_a_module_without_the_flag_is_strongly_typed_anyway() -> None:
    trt = StandIn(typed=False)
    compile_with(trt)
    assert trt.asked["flags"] == 0


def test_its_errors_read_like_the_others() -> None:
    with pytest.raises(OnnxqError, match=r"cannot import node 'odd' \(Strange\): no importer"):
        compile_with(StandIn(parses=False))
    with pytest.raises(OnnxqError, match=r"cannot read m\.onnx: truncated"):
        compile_with(StandIn(parses=False, tells=False))
    with pytest.raises(OnnxqError, match=r"cannot compile m\.onnx: no tactic"):
        compile_with(StandIn(builds=False))


def test_it_compiles_for_the_gpu_at_hand_whatever_the_target() -> None:
    assert parse_targets("sm90", BACKENDS["tensorrt"]) == ()


def test_the_first_installed_backend_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    present = {"tensorrt"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object() if name in present else None
    )
    assert choose(None).name == "tensorrt"
    present.add("tensorrt_rtx")
    assert choose(None).name == "tensorrt_rtx"
    present.clear()
    with pytest.raises(OnnxqError, match="tensorrt_rtx") as caught:
        choose(None)
    assert "onnxq[cpu]" in caught.value.hint
