"""The reader of compiled layers, on recorded texts and on broken ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from onnxq.engine.layers import (
    EngineLayer,
    Tensor,
    layers_from_inspector,
    layers_from_log,
)
from onnxq.errors import OnnxqError

GOLDEN = Path(__file__).parent / "golden"
RECORDED = sorted(p.name.removesuffix(".log.txt") for p in GOLDEN.glob("*.log.txt"))


def recorded(name: str) -> str:
    return (GOLDEN / f"{name}.log.txt").read_text()


def plain(layers: list[EngineLayer]) -> str:
    """One line a layer, for the golden files."""

    def operands(tensors: tuple[Tensor, ...]) -> str:
        return " ".join(f"{t.dtype}[{','.join(map(str, t.dims))}]" for t in tensors) or "-"

    return "".join(
        f"{x.profile} {x.kind}: {operands(x.inputs)} | {operands(x.constants)} -> "
        f"{operands(x.outputs)} of {' & '.join(x.onnx_nodes) or '-'}\n"
        for x in layers
    )


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_log_reads_as_it_did(name: str) -> None:
    """Set ONNXQ_UPDATE_GOLDEN=1 to write the expected texts anew, and look at the difference."""
    read = plain(layers_from_log(["something else", recorded(name)]))
    expected = GOLDEN / f"{name}.txt"
    if os.environ.get("ONNXQ_UPDATE_GOLDEN"):
        expected.write_text(read)
    assert read == expected.read_text()


def test_a_merged_gemm_names_all_its_nodes_and_profiles_are_told_apart() -> None:
    layers = layers_from_log([recorded("projections_two_profiles")])
    gemms = [layer for layer in layers if layer.kind == "gemm"]
    assert [layer.profile for layer in gemms] == [0, 1]
    for gemm in gemms:
        assert {"/product_0", "/product_1"} <= set(gemm.onnx_nodes)
    # Kernels after a gemm carry no mark of their own: their group does.
    assert {x.profile for x in layers if "/y0" in x.onnx_nodes or "mul" in str(x.onnx_nodes)} == {
        0,
        1,
    }


def test_names_may_hold_commas_brackets_colons_and_spaces() -> None:
    (gemm,) = [x for x in layers_from_log([recorded("awkward_names")]) if x.kind == "gemm"]
    assert gemm.onnx_nodes[0] == "/layers.0/q, k [proj] : MatMul]"
    assert [t.dtype for t in gemm.inputs] == ["int8"]


def test_control_flow_is_read_around_its_jumps() -> None:
    """The lines of If name the layers it jumps to, and those may be called anything."""
    layers = layers_from_log([recorded("if_between_products")])
    assert {"cjmp", "jmp"} <= {x.kind for x in layers}
    products = {n for x in layers if x.kind == "gemm" for n in x.onnx_nodes}
    assert {"before", "after"} <= products


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda text: text.replace("Layers:", "Layer list:"), "no list of layers"),
        (lambda text: text.replace("LayerType:", "Type:"), "cannot read this line"),
        (lambda text: text.replace("Datatype:", "DType:"), "cannot read an operand"),
        (lambda text: text.replace("[ONNX Layer: ", "[Origin: "), "cannot read which ONNX node"),
        (lambda text: text[: text.index("gemm") + 60], "cannot read this line"),
    ],
)
def test_a_changed_log_is_an_error_naming_the_known_release(break_it, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(OnnxqError, match=message) as caught:
        layers_from_log([break_it(recorded("projections_two_profiles"))])
    assert "1.7.1" in caught.value.hint


def test_no_message_at_all_is_an_error() -> None:
    with pytest.raises(OnnxqError, match="no list of layers"):
        layers_from_log([])


def test_sizes_count_packed_codes() -> None:
    assert Tensor("w", (64, 96), "int4").nbytes == 64 * 96 // 2
    assert Tensor("w", (3,), "int4").nbytes == 2
    assert Tensor("w", (64, 96), "fp8").nbytes == 64 * 96
    assert Tensor("w", (2, 3), "fp16").nbytes == 12
    assert Tensor("s", (), "fp32").nbytes == 4
    assert Tensor("x", (-1, 64), "fp16").nbytes == 0


def test_the_inspectors_json_reads_alike() -> None:
    tensor = {"Name": "x", "Dimensions": [1, 64], "Format/Datatype": "FP8"}
    half = {"Name": "y", "Dimensions": [1, 96], "Format/Datatype": "Row major linear FP16"}
    entry = {
        "Name": "b/MatMul+a/MatMul_myl0_2",
        "LayerType": "gemm",
        "Inputs": [tensor],
        "Constants": [{"Name": "w", "Dimensions": [64, 96], "Format/Datatype": "FP8"}],
        "Outputs": [half],
        "Metadata": "[ONNX Layer: b/MatMul]\x1e[ONNX Layer: a/MatMul]",
    }
    (layer,) = layers_from_inspector(json.dumps({"Layers": [entry], "Bindings": []}))
    assert layer.onnx_nodes == ("b/MatMul", "a/MatMul")
    assert layer.kind == "gemm"
    assert layer.inputs == (Tensor("x", (1, 64), "fp8"),)
    assert layer.constants[0].dtype == "fp8"
    assert layer.outputs == (Tensor("y", (1, 96), "fp16"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "inspector"),
        ('{"Bindings": []}', "inspector"),
        ('{"Layers": ["a", "b"]}', "only its layers' names"),
    ],
)
def test_an_inspectors_text_without_layers_is_an_error(text: str, message: str) -> None:
    with pytest.raises(OnnxqError, match=message):
        layers_from_inspector(text)


def test_a_layer_outside_a_compiled_group() -> None:
    """As the compiler prints it for torch's legacy exports: parameters, but no constants."""
    line = (
        "Name: [ShapeHostToDeviceCopy 0], LayerType: ShapeHostToDevice, Inputs: [], Outputs: "
        "[ { Name: /Gather_3_output_0, Location: Device, Dimensions: [1], Datatype: Int64, "
        "Format: Format not available due to dynamic shapes }], ParameterType: ShapeH2D, "
        "shapeValues0: [-5], TacticValue: 0x0000000000000000, StreamId: 0, Metadata: "
    )
    (layer,) = layers_from_log(["Layers:\n" + line])
    assert (layer.name, layer.kind) == ("[ShapeHostToDeviceCopy 0]", "ShapeHostToDevice")
    assert [(t.name, t.dims, t.dtype) for t in layer.outputs] == [
        ("/Gather_3_output_0", (1,), "int64")
    ]
    assert not layer.inputs and not layer.constants and not layer.onnx_nodes
