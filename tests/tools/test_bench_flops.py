"""FLOPs of products, counted here by numbers that count their own multiplications."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import pytest

from onnxq.graph.model import Model
from onnxq.graph.prepare import prepare
from tools.bench.flops import in_eight_bits, model_flops, product_flops, shares


class Counted:
    """A number that counts the multiplications of all of its kind."""

    count = 0

    def __mul__(self, other: object) -> Counted:
        Counted.count += 1
        return self

    def __add__(self, other: object) -> Counted:
        return self


def numbers(*shape: int) -> Any:
    Counted.count = 0
    return np.frompyfunc(lambda _: Counted(), 1, 1)(np.zeros(shape))


@pytest.mark.parametrize(
    ("left", "right"),
    [((3, 5), (5, 7)), ((2, 3, 5), (5, 7)), ((2, 3, 4, 5), (2, 3, 5, 6)), ((4, 5), (2, 5, 3))],
)
def test_matmul(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    output = np.matmul(numbers(*left), numbers(*right))
    assert product_flops("MatMul", left, right, output.shape) == 2 * Counted.count


@pytest.mark.parametrize("transposed", [False, True])
def test_gemm(transposed: bool) -> None:
    left = (5, 3) if transposed else (3, 5)
    output = np.matmul(numbers(3, 5), numbers(5, 7))
    flops = product_flops("Gemm", left, (5, 7), output.shape, transposed=transposed)
    assert flops == 2 * Counted.count


def convolved(shape: tuple[int, ...], weight: tuple[int, ...], group: int) -> tuple[int, ...]:
    """Convolves without padding or stride, one number after the other; the output's shape."""
    image, kernel = numbers(*shape), numbers(*weight)
    size = [i - k + 1 for i, k in zip(shape[2:], weight[2:], strict=True)]
    per_group = weight[0] // group
    for place in product(range(shape[0]), range(weight[0]), *map(range, size)):
        first = place[1] // per_group * weight[1]
        for inner in product(range(weight[1]), *map(range, weight[2:])):
            at = [p + k for p, k in zip(place[2:], inner[1:], strict=True)]
            image[(place[0], first + inner[0], *at)] * kernel[(place[1], *inner)]
    return (shape[0], weight[0], *size)


@pytest.mark.parametrize(
    ("shape", "weight", "group"),
    [((2, 3, 6, 5), (4, 3, 3, 2), 1), ((1, 4, 5, 5), (6, 2, 3, 3), 2), ((1, 2, 9), (3, 2, 4), 1)],
)
def test_conv(shape: tuple[int, ...], weight: tuple[int, ...], group: int) -> None:
    output = convolved(shape, weight, group)
    assert product_flops("Conv", shape, weight, output) == 2 * Counted.count


def test_conv_transpose() -> None:
    """Each input element is multiplied with its channel's whole kernel: 2*3*4*4 by 5*2*2."""
    flops = product_flops("ConvTranspose", (2, 3, 4, 4), (3, 5, 2, 2), (2, 5, 8, 8))
    assert flops == 2 * (2 * 3 * 4 * 4) * (5 * 2 * 2)


def test_other_operators_are_refused() -> None:
    with pytest.raises(ValueError, match="Einsum"):
        product_flops("Einsum", (2, 2), (2, 2), (2, 2))


def test_every_product_of_a_model_is_counted(tmp_path: Path) -> None:
    """A linear layer, both products of an attention, and one without a name."""
    path = tmp_path / "model.onnx"
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        agraph (float[B, S, 16] x) => (float[B, S, 8] y)
        <float[16, 16] w = {}, float[16, 8] u = {}, float[1] scale = {0.25}>
        {
            [fc] q = MatMul(x, w)
            k = Transpose<perm = [0, 2, 1]>(x)
            [scores] s = MatMul(q, k)
            z = Mul(s, scale)
            p = Softmax<axis = -1>(z)
            [values] v = MatMul(p, x)
            y = MatMul(v, u)
        }""".replace("{}", "{0.5}")
    )
    for tensor, shape in zip(model.graph.initializer, ((16, 16), (16, 8)), strict=False):
        tensor.CopyFrom(onnx.numpy_helper.from_array(np.ones(shape, np.float32), tensor.name))
    onnx.save(model, path)
    prepared, _ = prepare(Model.load(path), 0)
    flops = model_flops(prepared, {"x": np.ones((2, 6, 16), np.float32)})
    assert flops == {
        "fc": 2 * 2 * 6 * 16 * 16,
        "scores": 2 * 2 * 6 * 6 * 16,
        "values": 2 * 2 * 6 * 6 * 16,
        "node_of_y": 2 * 2 * 6 * 16 * 8,
    }


def test_shares() -> None:
    flops = {"a": 60, "b": 25, "c": 10, "d": 5}
    ran = [("a", "int8"), ("b", "fp16"), ("c", "fp8"), ("other", "fp8")]
    found = shares(flops, ran)
    assert found == pytest.approx({"int8": 0.6, "fp16": 0.25, "fp8": 0.1, "not found": 0.05})
    assert in_eight_bits(found) == pytest.approx(0.7)


def test_a_weight_alone_in_eight_bits_is_no_product_in_eight_bits() -> None:
    found = shares({"a": 1, "b": 3}, [("a", "int8"), ("b", "fp16 x int8")])
    assert in_eight_bits(found) == pytest.approx(0.25)
    assert shares({}, []) == {}
