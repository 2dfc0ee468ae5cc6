"""How weights are divided into blocks, and which layers and targets have no place for a format."""

from __future__ import annotations

import numpy as np
import pytest
from core_graphs import Net, placed, reasons, recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.errors import OnnxqError
from onnxq.formats import PerBlock, PerChannel, PerTensor
from onnxq.recipe import Recipe
from onnxq.schemes import block_for, granularity
from onnxq.sites import find_sites

FP16 = np.dtype(np.float16)


def linear(k: int, n: int, **attrs: int) -> Net:
    net = Net(dtype=FP16)
    shape = (n, k) if attrs.get("transB") else (k, n)
    x = net.input("x", ["m", k])
    net.weight("w", *shape)
    net.output(net.op("Gemm" if attrs else "MatMul", x, "w", name="/fc", **attrs))
    return net


@given(length=st.integers(1, 4096), size=st.sampled_from([16, 32, 64, 128, 256]))
@settings(max_examples=300, deadline=None)
def test_a_block_divides_its_length_at_least_in_two(length: int, size: int) -> None:
    found = block_for(length, recipe("int4-rtn", block_size=size))
    fitting = [s for s in (256, 128, 64, 32, 16) if s <= size and length % s == 0 and length > s]
    assert found == (fitting[0] if fitting else 0)


@pytest.mark.parametrize(
    ("name", "length", "size"),
    [("nvfp4", 16, 16), ("nvfp4", 48, 16), ("nvfp4", 40, 0), ("mxfp8", 32, 32), ("mxfp8", 48, 0)],
)
def test_blocks_that_a_format_fixes(name: str, length: int, size: int) -> None:
    assert block_for(length, recipe(name)) == size


def test_where_the_scales_of_each_recipe_lie() -> None:
    for attrs, summed in (({}, 0), ({"transB": 1}, 1)):
        net = linear(96, 48, **attrs)
        (site,) = find_sites(net.loaded(21))
        assert granularity(site, recipe("int4-rtn")) == PerBlock(summed, 32)
        assert granularity(site, recipe("nvfp4")) == PerBlock(summed, 16)
        assert granularity(site, recipe("fp8-weight-only")) == PerChannel(1 - summed)
        whole = recipe("int8", weight_granularity="tensor")
        assert granularity(site, whole) == PerTensor()


@pytest.mark.parametrize(
    ("name", "k", "n", "reason"),
    [
        ("int4-rtn", 128, 32, ""),
        ("int4-rtn", 32, 32, ""),
        ("int4-rtn", 16, 32, "its length 16 is not made of two or more equal blocks of 16 to 64"),
        ("int4-rtn", 100, 32, "its length 100 is not made of two"),
        ("w4a8-rtn-dynamic", 100, 32, "its length 100 is not made of two"),
        ("int4-rtn", 128, 33, "an odd number of channels"),
        ("int8-weight-only", 128, 33, "an odd number of channels"),
        ("int8-weight-only", 33, 128, "an odd number of channels"),
        ("int8-weight-only", 100, 32, ""),
        ("int8-dynamic", 100, 33, ""),
        ("nvfp4", 100, 32, "its length 100 is no multiple of the block of 16"),
        ("mxfp8", 48, 32, "its length 48 is no multiple of the block of 32"),
        ("nvfp4", 48, 32, ""),
        ("nvfp4", 48, 33, "an odd number of channels"),
        ("int4-rtn", 128, 14, "thin: 128 x 14"),
    ],
)
def test_layers_that_no_block_fits_are_left(name: str, k: int, n: int, reason: str) -> None:
    for attrs in ({}, {"transB": 1}):
        found = reasons(placed(linear(k, n, **attrs), name, gpu="sm120"))["/fc"]
        assert found.startswith(reason) if reason else found == ""


def test_a_rule_does_not_force_a_block_that_does_not_exist() -> None:
    with pytest.raises(OnnxqError, match="cannot be quantized: its length 100"):
        placed(linear(100, 32), "int4-rtn", "quantize node=/fc")


@pytest.mark.parametrize("name", ["int4-rtn", "int8-weight-only", "w4a8-rtn-dynamic", "nvfp4"])
def test_convolutions_are_left(name: str) -> None:
    net = Net(dtype=FP16)
    net.weight("w", 32, 32, 3, 3)
    net.output(net.op("Conv", net.input("x", ["n", 32, 8, 8]), "w", name="/conv"))
    found = reasons(placed(net, name, gpu="sm120"))["/conv"]
    assert "weights of a convolution would be expanded at every call" in found


def test_what_is_done_is_said() -> None:
    said = {
        "int4-rtn": "int4 weights in blocks of 64, activations as they are",
        "fp8-weight-only": "fp8 weights per channel, activations as they are",
        "w4a8-rtn": "int4 weights in blocks of 64, int8 activations (max range)",
        "w4a8-rtn-dynamic": (
            "int4 weights in blocks of 64, int8 activations (scales computed per token)"
        ),
        "nvfp4": "nvfp4 weights in blocks of 16, nvfp4 activations (scales computed per token)",
        "mxfp8": "mxfp8 weights in blocks of 32, mxfp8 activations (scales computed per block)",
    }
    for name, text in said.items():
        (decision,) = placed(linear(128, 32), name, gpu="sm120").decisions
        assert decision.quantized and decision.reason == text


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("int4-rtn", "sm75", "has no int4"),
        ("int8-weight-only", "sm75", "would expand every weight at every call"),
        ("fp8-weight-only", "sm80", "has no fp8"),
        ("w4a8-rtn-dynamic", "sm75", "has no int4"),
        ("nvfp4", "sm89", "has no nvfp4"),
        ("mxfp8", "sm89", "has no mxfp8"),
        ("uint4-rtn", "sm120", "has no uint4"),
        ("nvfp4", "onnxruntime", "has no nvfp4"),
        ("fp8-weight-only", "onnxruntime", "has no fp8"),
    ],
)
def test_targets_without_the_format_are_refused(name: str, target: str, reason: str) -> None:
    with pytest.raises(OnnxqError, match=reason):
        placed(linear(128, 32), name, gpu=target)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("int4-rtn", "sm80"),
        ("w4a8-rtn-dynamic", "sm80"),
        ("int8-weight-only", "sm80"),
        ("int4-rtn", "onnxruntime"),
        ("uint4-rtn", "onnxruntime"),
    ],
)
def test_targets_with_the_format_take_it(name: str, target: str) -> None:
    assert reasons(placed(linear(128, 32), name, gpu=target))["/fc"] == ""


@pytest.mark.parametrize(
    ("weights", "activations", "size", "reason"),
    [
        ("int4", "none", 0, "block_size 0 for int4 weights; give a power of two"),
        ("int4", "none", 48, "block_size 48"),
        ("int4", "none", 8, "block_size 8"),
        ("int8", "none", 64, "8-bit weights have a scale a channel"),
        ("nvfp4", "nvfp4", 32, "nvfp4 comes in blocks of 16"),
        ("int8", "fp8", 0, "weights int8 with activations fp8; int8 weights go with: int8, none"),
        ("int4", "int4", 64, "int4 weights go with: none, fp8, int8"),
        ("nvfp4", "none", 0, "nvfp4 weights go with: nvfp4"),
        ("fp8", "mxfp8", 0, "fp8 weights go with: fp8, none"),
        ("int5", "none", 0, "unknown format 'int5'"),
    ],
)
def test_pairs_and_blocks_without_a_kernel_are_refused(
    weights: str, activations: str, size: int, reason: str
) -> None:
    with pytest.raises(OnnxqError, match=reason):
        Recipe("mine", weights=weights, activations=activations, block_size=size)


def test_the_opset_a_recipe_needs() -> None:
    needed = {
        "fp8": 21,
        "int8": 19,
        "int8-weight-only": 19,
        "int4-rtn": 21,
        "w4a8-rtn": 21,
        "nvfp4": 23,
    }
    assert {name: recipe(name).min_opset for name in needed} == needed


def test_nothing_is_built_for_onnxruntime() -> None:
    from onnxq.engine.backends import BACKENDS, parse_targets

    with pytest.raises(OnnxqError, match="nothing to build for onnxruntime"):
        parse_targets("sm89,onnxruntime", BACKENDS["tensorrt_rtx"])
