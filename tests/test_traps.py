"""Traps that peers fall into, each as a user meets it: a clear error or the right result.

ModelOpt 0.47.0's twenty by their numbers; C: in `calibrate/test_calib_traps.py`.

     1 a causal mask quantized, NaN             here   11 bodies of If skipped in silence      here
     2 the input rewritten                      here   12 a quantized model taken              here
     3 another's file deleted, data that grows  here   13 output = input                       here
     4 `/fc1` leaves out `/fc10` too            here   14 odd batches, counted on one input    C
     5 unknown names taken                      here   15 no data: one random sample           C
     6 NaN in the data taken                    C      16 residual additions quantized         here
     7 entropy = max, and by order of batches   C      17 too little data: no word             C
     8 INT4 of a transposed Gemm                here   18 a range of 1e7                       here
     9 weights of 3 dimensions                  here   19 placement by the batch size          here
    10 AWQ on a weight rounded already          here   20 what is broken passes the checker    here

Others' (onnxruntime, AIMET, NNCF, Quark, onnx-neural-compressor, onnxsim):

    GPTQ that rounds to nearest            algorithms/test_algorithms_gptq.py, test_solving.py
    entropy that is minmax                 C, 7
    data dropped where memory is short     C      histograms that keep every activation      C
    FP8 with one calibrator                C      an INT32 bias, UINT8, zero points          C
    scales of 0                            C      INT4 that does nothing, or grows the file  here
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from core_attention import Spelling, attention_net
from core_graphs import Net, snr
from onnx import TensorProto as T
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

import onnxq
from onnxq.errors import OnnxqError
from onnxq.samples import Data

Array = np.ndarray[Any, Any]
WIDE = 64


def mlp(batch: int | str = "b", names: tuple[str, ...] = ("/fc1", "/fc10", "/fc2")) -> Net:
    """Layers of 64 x 64 with a residual addition around each."""
    net = Net()
    y = net.input("x", [batch, WIDE])
    for name in names:
        layer = net.op("MatMul", y, net.weight(f"{name[1:]}.weight", WIDE, WIDE), name=name)
        y = net.op("Add", net.op("Relu", layer, name=f"{name}/act"), y, name=f"{name}/add")
    net.output(y)
    return net


def rows(count: int, seed: int = 1) -> Array:
    return np.random.default_rng(seed).standard_normal((count, WIDE)).astype(np.float32)


def data(folder: Path, **arrays: Array) -> Path:
    path = folder / "calib.npz"
    np.savez(path, **arrays)
    return path


def digests(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.is_file()
    }


def done(made: onnxq.api.Quantized) -> list[str]:
    """Names of the layers that were quantized."""
    assert made.placement is not None
    return [d.site.name for d in made.placement.quantized]


def left(made: onnxq.api.Quantized) -> dict[str, str]:
    """Reasons, by name, for what was not."""
    assert made.placement is not None
    return {d.site.name: d.reason for d in made.placement.left}


def values(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def producers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


@pytest.mark.parametrize("recipe", ["fp8", "fp8-attention", "int8", "fp8-dynamic", "int8-dynamic"])
def test_1_a_causal_mask_is_not_quantized(recipe: str, tmp_path: Path) -> None:
    """Theirs gave the mask of -3.4e38 a scale that is infinite in FP16: NaN, and no warning."""
    source = attention_net(Spelling("mul", "add")).save(tmp_path / "m.onnx")
    causal = np.broadcast_to(np.tril(np.ones((1, 32, 32), bool)), (4, 1, 32, 32))
    x = np.random.default_rng(0).standard_normal((4, 32, WIDE)).astype(np.float32)
    calib = data(tmp_path, x=x, mask=causal)
    made = onnxq.quantize(source, recipe=recipe, calib=None if "dynamic" in recipe else calib)
    model = onnx.load(made.files[0])
    makes, known = producers(model), values(model)
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            origin, scale = makes.get(node.input[0]), known[node.input[1]]
            assert origin is None or origin.op_type not in ("Where", "Add"), node.name
            assert np.isfinite(scale.astype(np.float32)).all() and (scale > 0).all(), node.name
    # Every row of a causal mask hides something: a mask that is lost shows in all outputs.
    found = onnxq.compare(source, made.files[0], data=calib, min_snr=15, fp16=False)
    assert found.passed, found.as_dict()


@pytest.mark.parametrize(
    "recipe", ["fp8", "int8", "fp8-dynamic", "int8-dynamic", "int8-weight-only", "int4-rtn"]
)
@pytest.mark.parametrize("external", [False, True])
def test_2_the_input_is_not_touched(recipe: str, external: bool, tmp_path: Path) -> None:
    where, out = tmp_path / "in", tmp_path / "out"
    where.mkdir()
    out.mkdir()
    onnx.save(
        mlp().model(),
        where / "m.onnx",
        save_as_external_data=external,
        size_threshold=0,
        location="m.onnx.data",
    )
    before = digests(where), {p.name: p.stat().st_mtime_ns for p in where.iterdir()}
    calib = data(tmp_path, x=rows(8))
    onnxq.quantize(where / "m.onnx", out / "q.onnx", recipe=recipe, calib=calib)
    assert before == (digests(where), {p.name: p.stat().st_mtime_ns for p in where.iterdir()})


def test_3_no_other_file_is_deleted_and_external_data_does_not_grow(
    tmp_path: Path, cli: Callable[..., Any]
) -> None:
    onnx.save(
        mlp().model(),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        size_threshold=0,
        location="m.onnx.data",
    )
    for name in ("q.onnx_data", "q.onnx.data", "q.data", "m.onnx_data"):
        (tmp_path / name).write_text("somebody else's")
    before = digests(tmp_path)
    sizes = []
    for _ in range(3):
        run = cli("quantize", "m.onnx", "-o", "q.onnx", "--recipe", "int8-dynamic", cwd=tmp_path)
        assert run.returncode == 0, run.stderr
        after = digests(tmp_path)
        assert {name: after[name] for name in before} == before
        sizes.append(sum(p.stat().st_size for p in tmp_path.iterdir()))
    assert len(set(sizes)) == 1


def test_4_leaving_one_layer_does_not_leave_those_whose_names_begin_alike(tmp_path: Path) -> None:
    source = mlp().save(tmp_path / "m.onnx")
    made = onnxq.quantize(source, recipe="int8-dynamic", rules=["leave node=/fc1"])
    assert done(made) == ["/fc10", "/fc2"]


@pytest.mark.parametrize(
    "words",
    [
        ("quantize", "m.onnx", "--rule", "leave node=/fc3"),
        ("quantize", "m.onnx", "--rule", "leave node=fc1"),
        ("quantize", "m.onnx", "--rule", "leave op=Gemmm"),
        ("quantize", "m.onnx", "--rule", "leave weight=fc1"),
        ("quantize", "m.onnx", "--rule", "leave module=encoder.*"),
        ("inspect", "m.onnx", "--recipe", "int8", "--rule", "leave nod=/fc1"),
        ("build", "m.onnx", "--shapes", "y:1x64"),
    ],
)
def test_5_names_that_are_not_in_the_model_are_refused(
    words: tuple[str, ...], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    mlp().save(tmp_path / "m.onnx")
    run = cli(*words, cwd=tmp_path)
    assert run.returncode == 2 and run.stderr.startswith("onnxq: error: "), run.stderr
    assert run.stderr.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def gemm(transposed: bool) -> Net:
    """x [b, 128] times W [128, 32]; W is stored transposed, or not."""
    net = Net()
    weight = net.rng.standard_normal((128, 32)) / 11
    stored = net.const("w", weight.T if transposed else weight)
    bias = net.const("b", net.rng.standard_normal(32))
    y = net.op("Gemm", net.input("x", ["b", 128]), stored, bias, transB=int(transposed))
    net.output(y)
    return net


@pytest.mark.parametrize("recipe", ["int4-rtn", "int4-gptq", "int4-awq", "w4a8-rtn"])
def test_8_four_bits_of_a_gemm_with_a_transposed_weight(recipe: str, tmp_path: Path) -> None:
    """Blocks run along the summed dimension either way: the same layer, the same numbers."""
    rng = np.random.default_rng(0)
    calib = data(tmp_path, x=rng.standard_normal((256, 128)).astype(np.float32))
    x = rng.standard_normal((5, 128)).astype(np.float32)
    found = []
    for transposed in (False, True):
        source = gemm(transposed).save(tmp_path / f"{transposed}.onnx")
        made = onnxq.quantize(source, recipe=recipe, calib=calib, precision="keep")
        assert len(done(made)) == 1
        reference = ReferenceEvaluator(str(source)).run(None, {"x": x})[0]
        found.append(ReferenceEvaluator(str(made.files[0])).run(None, {"x": x})[0])
        # 4 bits of normal numbers in blocks of 64: a step of about 2.6 / 7 deviations, whose
        # rounding error is 0.11 deviations, 19 dB below the weight.
        assert snr(reference, found[-1]) > 17
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("recipe", ["int8-dynamic", "fp8", "int4-rtn", "int8-weight-only"])
def test_9_weights_of_three_dimensions_are_left_with_a_reason(recipe: str, tmp_path: Path) -> None:
    net = Net()
    x = net.input("x", ["b", 4, 8, WIDE])
    experts = net.op("MatMul", x, net.weight("experts", 4, WIDE, WIDE), name="/experts")
    net.output(net.op("MatMul", experts, net.weight("w", WIDE, WIDE), name="/plain"))
    calib = data(tmp_path, x=np.ones((2, 4, 8, WIDE), np.float32))
    made = onnxq.quantize(net.save(tmp_path / "m.onnx"), recipe=recipe, calib=calib)
    assert done(made) == ["/plain"]
    assert "3 dimensions" in left(made)["/experts"]


@pytest.mark.parametrize("recipe", ["int4-awq", "int4-best"])
def test_10_a_rescaled_weight_is_rounded_after_it_and_never_worse(
    recipe: str, tmp_path: Path
) -> None:
    """Theirs folded scales into weights that were rounded already: worse than plain rounding.

    Here two layers read one tensor, two layers share one weight, and one is read by a Gather too.
    """
    net = Net()
    ids = net.input("ids", ["b", "s"], np.int64)
    table = net.weight("table", 256, 128, scale=1.0)
    embedded = net.op("Gather", table, ids, name="/embedding")
    gain = net.const("gain", np.exp(net.rng.standard_normal(128)))
    normal = net.op("LayerNormalization", embedded, gain, net.const("shift", np.zeros(128)))
    q = net.op("MatMul", normal, net.weight("q", 128, 128), name="/q")
    k = net.op("MatMul", normal, net.weight("k", 128, 128), name="/k")
    shared = net.weight("shared", 128, 128)
    y = net.op("Mul", net.op("MatMul", q, shared, name="/a"), net.op("Tanh", k))
    y = net.op("MatMul", y, shared, name="/b")
    net.output(net.op("MatMul", y, net.weight("o", 128, 64), name="/o"))
    source = net.save(tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    calib = data(tmp_path, ids=rng.integers(0, 256, (32, 16)))
    heldout = {"ids": rng.integers(0, 256, (16, 16))}
    reference = ReferenceEvaluator(str(source)).run(None, heldout)[0]
    measured = {}
    for name in ("int4-rtn", recipe):
        made = onnxq.quantize(source, recipe=name, calib=calib, precision="keep")
        model = onnx.load(made.files[0])
        np.testing.assert_array_equal(values(model)["table"], values(net.model())["table"])
        found = ReferenceEvaluator(model).run(None, heldout)[0]
        measured[name] = snr(reference, found)
    assert measured[recipe] >= measured["int4-rtn"], measured


def test_11_what_an_if_holds_is_said(tmp_path: Path, cli: Callable[..., Any]) -> None:
    body = []
    for name in ("then", "else"):
        inner = Net()
        inner.output(
            inner.op("MatMul", "x", inner.weight(f"{name}.w", WIDE, WIDE), name=f"/{name}")
        )
        body.append(inner.model().graph)
    net = Net()
    x = net.input("x", ["b", WIDE])
    flag = net.input("flag", [], bool)
    y = net.op("If", flag, name="/if", then_branch=body[0], else_branch=body[1])
    net.output(net.op("MatMul", y, net.weight("w", WIDE, WIDE), name="/behind"), ["b", WIDE])
    assert x
    source = net.save(tmp_path / "m.onnx")
    made = onnxq.quantize(source, recipe="int8-dynamic")
    assert done(made) == ["/behind"]
    assert all("inside a subgraph of If '/if'" in left(made)[name] for name in ("/then", "/else"))
    shown = cli("inspect", "m.onnx", "--recipe", "int8-dynamic", cwd=tmp_path)
    assert "/then" in shown.stdout and "subgraph" in shown.stdout


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int8-dynamic", "int4-rtn"])
def test_12_a_quantized_model_is_refused(
    recipe: str, tmp_path: Path, cli: Callable[..., Any]
) -> None:
    source = mlp().save(tmp_path / "m.onnx")
    calib = data(tmp_path, x=rows(8))
    made = onnxq.quantize(source, tmp_path / "q.onnx", recipe=recipe, calib=calib)
    for again in ("int8-dynamic", "fp8", "int4-rtn"):
        with pytest.raises(OnnxqError, match="quantized already"):
            onnxq.quantize(made.files[0], tmp_path / "twice.onnx", recipe=again, calib=calib)
    run = cli("quantize", "q.onnx", cwd=tmp_path)
    assert run.returncode == 2 and "quantized already" in run.stderr


@pytest.mark.parametrize("way", ["same", "dotted", "symlink", "hardlink", "data"])
def test_13_the_output_is_never_the_input(way: str, tmp_path: Path) -> None:
    source = tmp_path / "m.onnx"
    onnx.save(
        mlp().model(), source, save_as_external_data=True, size_threshold=0, location="m.onnx.data"
    )
    (tmp_path / "sub").mkdir()
    other = {
        "same": source,
        "dotted": tmp_path / "sub/../m.onnx",
        "symlink": tmp_path / "link.onnx",
        "hardlink": tmp_path / "hard.onnx",
        "data": tmp_path / "m.onnx.data",
    }[way]
    if way == "symlink":
        other.symlink_to(source)
    if way == "hardlink":
        os.link(source, other)
    before = digests(tmp_path)
    with pytest.raises(OnnxqError) as refused:
        onnxq.quantize(source, other, recipe="int8-dynamic")
    assert refused.value.hint
    assert digests(tmp_path) == before


@pytest.mark.parametrize("recipe", ["int8", "fp8", "int8-dynamic"])
def test_16_residual_additions_are_not_quantized(recipe: str, tmp_path: Path) -> None:
    source = mlp().save(tmp_path / "m.onnx")
    made = onnxq.quantize(source, recipe=recipe, calib=data(tmp_path, x=rows(64)))
    assert len(done(made)) == 3
    model = onnx.load(made.files[0])
    makes = producers(model)
    for node in model.graph.node:
        if node.op_type == "Add" and node.name.endswith("/add"):
            kinds = {makes[i].op_type for i in node.input if i in makes}
            assert "DequantizeLinear" not in kinds, node.name
    found = onnxq.compare(source, made.files[0], data=data(tmp_path, x=rows(64, 2)), min_snr=25)
    assert found.passed, found.as_dict()


def wide_net(size: Array) -> Net:
    """x times `size`, into a layer whose weights make up for it: every channel counts alike."""
    net = Net()
    wide = net.op("Mul", net.input("x", ["b", WIDE]), net.const("size", size), name="/wide")
    weight = net.rng.standard_normal((WIDE, WIDE)) / 8
    y = net.op("MatMul", wide, net.const("w", weight / size[:, None]), name="/fc1")
    net.output(net.op("MatMul", y, net.weight("v", WIDE, WIDE), name="/fc2"))
    return net


@pytest.mark.parametrize("recipe", ["int8-dynamic", "fp8-dynamic"])
def test_18_without_data_a_comparison_shows_it(recipe: str, tmp_path: Path) -> None:
    """The channel is large at run time only: nothing in the file says so."""
    size = np.ones(WIDE)
    size[3] = 1e7
    source = wide_net(size).save(tmp_path / "m.onnx")
    made = onnxq.quantize(source, recipe=recipe)
    held = data(tmp_path, x=rows(16, 2))
    assert not onnxq.compare(source, made.files[0], data=held, min_snr=10, fp16=False).passed


@pytest.mark.parametrize("precision", ["fp16", "bf16", "keep"])
@pytest.mark.parametrize("recipe", ["int8", "fp8", "int8-dynamic", "fp8-dynamic"])
def test_18_a_tensor_of_1e7_throughout_is_quantized_rightly(
    recipe: str, precision: Any, tmp_path: Path
) -> None:
    source = wide_net(np.full(WIDE, 1e7)).save(tmp_path / "m.onnx")
    calib = data(tmp_path, x=rows(64))
    made = onnxq.quantize(source, recipe=recipe, calib=calib, precision=precision)
    assert done(made) == ["/fc1", "/fc2"]
    held = data(tmp_path, x=rows(16, 2))
    found = onnxq.compare(source, made.files[0], data=held, min_snr=24, fp16=False)
    assert found.passed, found.as_dict()


def test_19_the_calibration_batch_decides_nothing(tmp_path: Path) -> None:
    source = mlp().save(tmp_path / "m.onnx")
    calib = data(tmp_path, x=rows(64))
    found = [
        done(onnxq.quantize(source, recipe="int8", calib=Data(path=calib, batch=batch)))
        for batch in (1, 7, 64)
    ]
    assert found[0] == found[1] == found[2] == ["/fc1", "/fc10", "/fc2"]


def test_20_a_broken_output_does_not_pass(tmp_path: Path, cli: Callable[..., Any]) -> None:
    """onnx.checker takes what computes nonsense; a comparison with a tolerance does not."""
    mlp().save(tmp_path / "m.onnx")
    calib = data(tmp_path, x=rows(64))
    made = onnxq.quantize(tmp_path / "m.onnx", tmp_path / "q.onnx", recipe="int8", calib=calib)
    words = ("compare", "m.onnx", "q.onnx", "--data", "calib.npz", "--min-snr", "20")
    assert cli(*words, cwd=tmp_path).returncode == 0
    broken = onnx.load(made.files[0])
    read = next(n for n in broken.graph.node if n.op_type == "QuantizeLinear").input[1]
    for tensor in broken.graph.initializer:
        if tensor.name == read:
            wrong = numpy_helper.to_array(tensor) * np.float16(50)
            tensor.CopyFrom(numpy_helper.from_array(wrong, tensor.name))
    onnx.checker.check_model(broken, full_check=True)
    onnx.save(broken, made.files[0])
    run = cli(*words, cwd=tmp_path)
    assert run.returncode == 1, run.stdout + run.stderr


@pytest.mark.parametrize("opset", [13, 17, 20])
def test_int4_of_an_old_model_is_int4_and_the_file_shrinks(opset: int, tmp_path: Path) -> None:
    """onnxsim 0.8.1 does nothing at opset 20, in silence; elsewhere the FP32 weights stay too."""
    net = Net(opset=opset)
    y = net.op("MatMul", net.input("x", ["b", 512]), net.weight("w", 512, 512), name="/fc1")
    net.output(net.op("MatMul", y, net.weight("v", 512, 512), name="/fc2"))
    source = net.save(tmp_path / "m.onnx")
    made = onnxq.quantize(source, recipe="int4-rtn")
    assert done(made) == ["/fc1", "/fc2"]
    codes = [t for t in onnx.load(made.files[0]).graph.initializer if t.data_type == T.INT4]
    assert len(codes) == 2
    # 4 bits and a scale of 16 for each 64 of 32, and a kilobyte or two of graph.
    assert made.files[0].stat().st_size < source.stat().st_size * (4 + 16 / 64) / 32 + 4096


@pytest.mark.parametrize("precision", ["fp16", "bf16", "keep"])
@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_18_a_channel_that_reaches_1e7_does_not_make_zeros_of_the_others(
    recipe: str, precision: Any, tmp_path: Path
) -> None:
    """Theirs had a relative error of 2.9, and no word. The layer is left, and it is said why."""
    size = np.ones(WIDE)
    size[3] = 1e7
    source = wide_net(size).save(tmp_path / "m.onnx")
    calib = data(tmp_path, x=rows(64))
    made = onnxq.quantize(source, recipe=recipe, calib=calib, precision=precision)
    assert done(made) == ["/fc2"]
    assert "makes zeros of 98.4% of its channels" in left(made)["/fc1"]
    held = data(tmp_path, x=rows(16, 2))
    found = onnxq.compare(source, made.files[0], data=held, min_snr=25, fp16=False)
    assert found.passed, found.as_dict()
