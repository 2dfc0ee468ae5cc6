"""Real graphs to judge: parts of the real models by our recipes, and what peers made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper, utils

import onnxq
from onnxq.samples import Data
from tools.lint_truth.patients import restore
from tools.lint_truth.score import Graph

MODELS = Path("models/out")
ROWS = 64
"""Of an embedding: the words it has do not matter here, and each graph is saved many times."""
RECIPES = (
    *("fp8", "int8", "fp8-attention", "fp8-dynamic", "int8-dynamic", "int4-rtn"),
    *("int8-weight-only", "fp8-weight-only", "w4a8-rtn-dynamic"),
)


@dataclass(frozen=True)
class Part:
    """A real model up to one of its tensors, and shapes for its open dimensions."""

    model: str
    until: str
    shapes: tuple[str, ...] = ()


_TEXT = tuple(f"{name}:1x32,2x32,4x64" for name in ("input_ids", "attention_mask"))
PARTS = {
    "minilm": Part("minilm", "layer_norm_2", (*_TEXT, "token_type_ids:1x32,2x32,4x64")),
    "smollm2": Part("smollm2-fp32", "/model/layers.1/Add_1_output_0", _TEXT),
    "unet": Part(
        "sdxl-unet-tiny-fp16",
        "layer_norm_3",
        (
            *("sample:1x4x16x16,2x4x16x16,2x4x16x16", "timestep:1,2,2", "time_ids:1x6,2x6,2x6"),
            *("encoder_hidden_states:1x77x128,2x77x128,2x77x128", "text_embeds:1x64,2x64,2x64"),
        ),
    ),
    "ppocr": Part("ppocr_rec", "", ("x:1x3x48x320,2x3x48x320,4x3x48x320",)),
}


def parts(folder: Path) -> Iterator[tuple[str, Path, tuple[str, ...]]]:
    """Each part as a file: (name, path, shapes)."""
    for name, part in PARTS.items():
        source = MODELS / part.model / "model.onnx"
        if not source.exists():
            raise SystemExit(f"{source} is missing: run `make models`")
        path = folder / f"{name}.onnx"
        model = onnx.load(source)
        onnx.save(_until(model, part.until), path)
        inputs = {i.name for i in onnx.load(path).graph.input}
        yield name, path, tuple(s for s in part.shapes if s.partition(":")[0] in inputs)


def _until(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    if tensor:
        names = [i.name for i in model.graph.input]
        needed = _needed(model.graph, tensor)
        extractor = utils.Extractor(onnx.shape_inference.infer_shapes(model))
        model = extractor.extract_model([n for n in names if n in needed], [tensor])
    tables = {n.input[0] for n in model.graph.node if n.op_type == "Gather"}
    for constant in model.graph.initializer:
        if constant.name in tables and len(constant.dims) == 2 and constant.dims[0] > 10 * ROWS:
            constant.CopyFrom(numpy_helper.from_array(_array(constant)[:ROWS], constant.name))
    del model.graph.value_info[:]  # it has the old shapes
    return model


def _array(constant: onnx.TensorProto) -> np.ndarray:
    return np.asarray(numpy_helper.to_array(constant))


def _needed(graph: onnx.GraphProto, tensor: str) -> set[str]:
    makers = {o: n for n in graph.node for o in n.output}
    waiting, found = [tensor], {tensor}
    while waiting:
        node = makers.get(waiting.pop())
        fresh = set(node.input) - found if node else set()
        found |= fresh
        waiting += fresh
    return found


def ours(folder: Path) -> Iterator[Graph]:
    """Each part by each recipe, and some in FP32 or BF16."""
    for name, path, shapes in parts(folder):
        samples = folder / f"{name}.npz"
        np.savez(samples, **_samples(path, shapes))  # type: ignore[arg-type]
        wanted = [(recipe, "fp16") for recipe in RECIPES]
        wanted += [("int8", "keep"), ("fp8-dynamic", "bf16")]
        for recipe, precision in wanted:
            output = folder / f"{name}.{recipe}.{precision}.onnx"
            onnxq.quantize(
                path,
                output,
                recipe=recipe,
                precision=precision,
                calib=Data(path=samples) if recipe in ("fp8", "int8", "fp8-attention") else None,
            )
            yield Graph(output.stem, output, "sm89", shapes)


def _samples(path: Path, shapes: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Two samples of each input, of its profile's middle shape; words that the table has."""
    made, random = {}, np.random.default_rng(0)
    types = {i.name: i.type.tensor_type.elem_type for i in onnx.load(path).graph.input}
    for entry in shapes:
        name, _, sizes = entry.partition(":")
        shape = [2, *map(int, sizes.split(",")[1].split("x")[1:])]
        if types[name] == TensorProto.INT64:
            ones = "mask" in name
            made[name] = np.ones(shape, np.int64) if ones else random.integers(0, 2, shape)
        else:
            kind = onnx.helper.tensor_dtype_to_np_dtype(types[name])
            made[name] = random.normal(size=shape).astype(kind)
    return made


def peers() -> Iterator[Graph]:
    """The patients of the tests, and the whole models that `make bench-peers` left."""
    for path in sorted(restore().glob("*_*.onnx")):
        shapes = ("ids:1x32,2x32,4x64", "mask:1x32,2x32,4x64") if "bert" in path.stem else ()
        yield Graph(path.stem, path, "sm89", shapes or ("x:1x3x64x64,2x3x64x64,4x3x64x64",))
    for path in sorted(MODELS.glob("bench/minilm/*.*/model.onnx")):
        if not path.parent.name.startswith("onnxq"):
            yield Graph(path.parent.name, path, "sm89", PARTS["minilm"].shapes)
