"""Ranges around another middle than 0: a layer's numbers, where it is done, what it becomes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from core_graphs import Net, operators, quantized, run

import onnxq
from onnxq.calibrate.one_sided import centered
from onnxq.calibrate.ranges import Range
from onnxq.calibrate.statistics import Amax, Histogram
from onnxq.recipe import load
from onnxq.samples import Data

Array = np.ndarray[Any, Any]
K, N, OFFSET, STEP = 64, 32, 100, 1 / 16
GRID = Range(peak=14.2, offset=OFFSET, reach=127 * STEP)
"""Codes stand for -27/16 to 227/16, in steps of 1/16: all of it exact in 16 bits."""


def exact(rng: np.random.Generator, *shape: int, axis: int) -> Array:
    """Weights that INT8 keeps: multiples of 1/256, the largest of each channel 127 of them."""
    codes = rng.integers(-20, 20, shape)
    np.moveaxis(codes, axis, 0).reshape(shape[axis], -1)[:, 0] = 127
    return codes / 256


def layer(kind: str, dtype: Any) -> Net:
    net = Net(dtype=dtype)
    if kind.startswith("conv"):
        x = net.input("x", ["b", K, 3, 3])
        w = net.const("w", exact(net.rng, N, K, 2, 2, axis=0))
        bias = [net.const("bias", np.arange(N) / 8)] if "bias" in kind else []
        net.output(net.op("Conv", x, w, *bias, name="/layer"), ["b", N, 2, 2])
        return net
    x = net.input("x", ["b", K])
    transposed = "transposed" in kind
    weight = exact(net.rng, K, N, axis=1)
    w = net.const("w", weight.T if transposed else weight)
    if kind == "matmul":
        net.output(net.op("MatMul", x, w, name="/layer"))
        return net
    if "computed" in kind:
        bias = net.op("Mul", net.input("b", [N]), net.const("two", 2.0))
    else:
        bias = net.const("bias", np.arange(N) / 8)
    attrs = {"alpha": 0.5} if "alpha" in kind else {}
    net.output(net.op("Gemm", x, w, bias, name="/layer", transB=int(transposed), **attrs))
    return net


def feeds(net: Net, steps: Array) -> dict[str, Array]:
    """Values on the grid for x: the sum of what they lack and what they get is exact there."""
    dims = [d.dim_value or 3 for d in net.inputs[0].type.tensor_type.shape.dim]
    x = np.resize(steps, dims) * STEP
    given = {"x": x.astype(net.dtype)}
    if len(net.inputs) > 1:
        given["b"] = (np.arange(N) / 8).astype(net.dtype)
    return given


KINDS = [
    "matmul",
    "gemm",
    "gemm-transposed",
    "gemm-alpha",
    "gemm-computed",
    "gemm-alpha-transposed-computed",
    "conv",
    "conv-bias",
]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_grid_a_layer_is_what_it_was(kind: str, dtype: Any) -> None:
    """All of the range, both its ends, and 0: a zero point's arithmetic without a zero point."""
    net = layer(kind, dtype)
    made = quantized(net, "int8", peaks=GRID, center=True)
    assert operators(made, ["Sub", "QuantizeLinear"]) == ["Sub", "QuantizeLinear"]
    x = feeds(net, np.random.default_rng(1).permutation(np.arange(-27, 228)))
    for given in (x, feeds(net, np.array([-27, 227])), feeds(net, np.array([0]))):
        reference, found = run(net.model(), given)[0], run(made, given)[0]
        # The product of what is left, its channel's share, and the sum with the bias are each
        # rounded to 11 bits; all are at most 227/16 x (63 x 20 + 127) / 256 (x 4 taps) in size.
        size = 227 / 16 * (63 * 20 + 127) / 256 * (4 if "conv" in kind else 1)
        bound = 4 * size * (2.0**-11 if dtype == np.float16 else 2.0**-22)
        np.testing.assert_allclose(found, reference, rtol=0, atol=bound)


def test_beyond_the_range_values_are_cut_off() -> None:
    net = layer("matmul", np.float32)
    made = quantized(net, "int8", peaks=GRID, center=True)
    ends = run(net.model(), feeds(net, np.array([227.0])))[0]
    np.testing.assert_allclose(run(made, feeds(net, np.array([9999.0])))[0], ends, rtol=1e-5)
    ends = run(net.model(), feeds(net, np.array([-28.0])))[0]  # INT8 has a code of -128 too
    np.testing.assert_allclose(run(made, feeds(net, np.array([-9999.0])))[0], ends, rtol=1e-4)


def test_layers_that_read_one_tensor_share_one_subtraction() -> None:
    net = Net()
    x = net.input("x", ["b", K])
    ends = [net.op("MatMul", x, net.weight(n, K, N), name=f"/{n}") for n in "qkv"]
    net.output(net.op("Add", net.op("Add", ends[0], ends[1]), ends[2]))
    made = quantized(net, "int8", peaks=GRID, center=True)
    assert operators(made, ["Sub", "QuantizeLinear"]) == ["Sub", "QuantizeLinear"]


@pytest.mark.parametrize(
    ("dtype", "subtracted"), [(np.float16, 0), (ml_dtypes.bfloat16, 1), (np.float32, 1)]
)
def test_fp16_without_room_for_what_is_given_back_keeps_its_middle(
    dtype: Any, subtracted: int
) -> None:
    """4,096 weights of 1 and a middle of 6.25: 25,600 to give back."""
    net = Net(dtype=dtype)
    x = net.input("x", ["b", 4096])
    net.output(net.op("MatMul", x, net.const("w", np.ones((4096, N))), name="/layer"))
    made = quantized(net, "int8", peaks=GRID, center=True)
    assert len(operators(made, ["Sub"])) == subtracted
    scale = next(
        t for t in made.graph.initializer if t.name == ("x_scale", "x_centered_scale")[subtracted]
    )
    wanted = (GRID.reach if subtracted else GRID.peak) / 127
    assert float(onnx.numpy_helper.to_array(scale)) == pytest.approx(wanted, rel=2**-8)


def one_sided(shape: tuple[int, ...], seed: int = 0) -> Array:
    return np.maximum(np.random.default_rng(seed).standard_normal(shape) + 1, -0.2).astype("f")


@pytest.mark.parametrize(
    ("pads", "auto", "subtracted"),
    [([0] * 4, "NOTSET", 1), ([1] * 4, "NOTSET", 0), (None, "SAME_UPPER", 0), (None, "VALID", 1)],
)
def test_what_pads_keeps_its_middle(
    pads: list[int] | None, auto: str, subtracted: int, tmp_path: Path
) -> None:
    """The 0 that it pads with would stand for the middle."""
    net = Net()
    x = net.input("x", ["b", 32, 8, 8])
    attrs = {} if pads is None else {"pads": pads}
    net.output(net.op("Conv", x, net.weight("w", 32, 32, 3, 3), auto_pad=auto, **attrs))
    np.savez(tmp_path / "c.npz", x=one_sided((8, 32, 8, 8)))
    made = onnxq.quantize(net.save(tmp_path / "m.onnx"), recipe="int8", calib=tmp_path / "c.npz")
    assert len(operators(onnx.load(made.files[0]), ["Sub"])) == subtracted


@pytest.mark.parametrize("precision", ["fp16", "keep"])
def test_one_sided_activations_gain_what_twice_the_codes_give(
    precision: Any, tmp_path: Path
) -> None:
    net = Net()
    x = net.input("x", ["b", 256])
    net.output(net.op("MatMul", x, net.weight("w", 256, 256), name="/layer"))
    source = net.save(tmp_path / "m.onnx")
    np.savez(tmp_path / "c.npz", x=one_sided((256, 256)))
    np.savez(tmp_path / "h.npz", x=one_sided((64, 256), 1))
    noise = []
    for recipe in (load("int8"), replace(load("int8"), center=False)):
        made = onnxq.quantize(source, recipe=recipe, calib=tmp_path / "c.npz", precision=precision)
        found = onnxq.compare(source, made.files[0], data=tmp_path / "h.npz", fp16=False)
        noise.append(found.comparison.rows[0].found.error.snr)
    # Half the step is 6 dB on the activations; the weights' rounding, about as large, stays.
    assert noise[0] > noise[1] + 1.5, noise


def quantization_error(values: Array, offset: int, reach: float) -> float:
    step = reach / 127
    codes = np.clip(np.rint(values / step - offset), -127, 127)
    return float(np.mean(((codes + offset) * step - values) ** 2))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("kind", ["gelu", "relu", "shifted", "skewed"])
def test_a_one_sided_range_is_as_good_as_the_best_of_a_fine_grid(kind: str, sign: int) -> None:
    rng = np.random.default_rng(0)
    normal = rng.standard_normal(50_000)
    values = {
        "gelu": normal * 2 / (1 + np.exp(-3.4 * normal)),
        "relu": np.maximum(normal, 0),
        "shifted": normal + 5,
        "skewed": np.exp(normal) - 0.5,
    }[kind].astype(np.float32) * np.float32(sign)
    found = Histogram()
    found.update(values)
    chosen = centered(found, "mse")
    assert chosen is not None
    offset, reach = chosen
    assert offset * sign > 0 and isinstance(offset, int)
    longer, shorter = np.abs(values).max(), max(0.0, float(-(values * sign).min()))
    best = np.inf
    for top in np.linspace(max(shorter, longer / 40), longer, 400):
        step = (top + shorter) / 254
        best = min(best, quantization_error(values, sign * round(top / step - 127), step * 127))
    # Bins are 1/2048 to 1/4096 of the range, steps 1/254: 6 % of a step's square at most.
    assert quantization_error(values, offset, reach) <= 1.08 * best
    plain = min(
        quantization_error(values, 0, clip) for clip in np.linspace(longer / 40, longer, 400)
    )
    assert quantization_error(values, offset, reach) < 0.5 * plain


def test_an_outlier_on_one_side_does_not_take_the_others_their_zero() -> None:
    """SmolLM2's layer 11 has 3,214 among values of 1.5: 0 must not become half a step of 12."""
    values = np.append(np.random.default_rng(0).standard_normal(50_000), 3214).astype(np.float32)
    for method in ("max", "mse", "mse:2", "percentile:100"):
        found = Histogram()
        found.update(values)
        chosen = centered(found, method)
        assert chosen is None or quantization_error(np.zeros(1), *chosen) == 0


def test_where_another_middle_gains_nothing() -> None:
    extremes = Amax()
    extremes.update(np.array([-0.8, 1.0], np.float32))
    assert centered(extremes, "max") is None  # two-sided
    extremes = Amax()
    extremes.update(np.array([-0.1, 1.0], np.float32))
    assert centered(extremes, "max") is not None
    assert centered(extremes, "max", "fp8") is None  # dense around 0 only
    assert centered(Amax(), "max") is None  # nothing seen
    zeros = Histogram()
    zeros.update(np.zeros(5, np.float32))
    assert centered(zeros, "mse") is None


def test_the_compiled_engine_has_no_kernel_more(tmp_path: Path) -> None:
    net = Net()
    y = net.op("MatMul", net.input("x", ["b", 128]), net.weight("a", 128, 256), name="/up")
    y = net.op("Relu", net.op("Add", y, net.const("c", np.ones(256))))
    y = net.op("MatMul", y, net.weight("d", 256, 128), name="/down")
    net.output(net.op("Relu", net.op("Add", y, net.const("e", np.ones(128)))))
    source = net.save(tmp_path / "m.onnx")
    data = Data(tmp_path / "c.npz")
    np.savez(tmp_path / "c.npz", x=one_sided((64, 128)))
    kernels = []
    for center in (False, True):
        recipe = replace(load("int8"), center=center)
        made = onnxq.quantize(source, recipe=recipe, calib=data)
        assert len(operators(onnx.load(made.files[0]), ["Sub"])) == 2 * center
        built = onnxq.build(made.files[0], shapes=["x:1x128,16x128,64x128"], strict=True)
        assert built.passed and built.report.facts["products"]["gemm"] == {"int8": 2}
        kernels.append(built.report.facts["layers"])
    assert kernels[0] == kernels[1]


@pytest.mark.parametrize(("outlier", "quantized_layers"), [(6.0, 1), (3000.0, 0)])
def test_a_layer_of_which_nothing_would_be_left_stays(
    outlier: float, quantized_layers: int, tmp_path: Path
) -> None:
    """One channel of SmolLM2's layer 11 reaches 3,214, the others 1.5: half a step is 12."""
    net = Net()
    x = net.input("x", ["b", 128])
    net.output(net.op("MatMul", x, net.weight("w", 128, 64), name="/layer"))
    data = np.random.default_rng(0).uniform(-1, 1, (64, 128)).astype(np.float32)
    data[:, 7] *= outlier
    np.savez(tmp_path / "c.npz", x=data)
    recipe = replace(load("int8"), calibrator="max")
    made = onnxq.quantize(net.save(tmp_path / "m.onnx"), recipe=recipe, calib=tmp_path / "c.npz")
    written = onnx.load(made.files[0])
    assert operators(written, ["QuantizeLinear"]) == ["QuantizeLinear"] * quantized_layers
    reasons = [d.reason for d in made.placement.decisions if not d.quantized]
    assert len(reasons) == 1 - quantized_layers
    assert all("makes zeros of 99.2% of its channels" in reason for reason in reasons)
