"""Peers' graphs, kept as text without their weights, as models again.

    python -m tools.lint_truth.patients FILE.onnx ...     # writes FILE.textproto beside each

The text is protobuf's. Lint reads scales, which are kept, and no weights: an initializer of more
than 64 elements has its type and dims alone, and random values when it is restored, the same ones
each time.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import onnx
from google.protobuf import text_format
from onnx import TensorProto, helper, numpy_helper

_ROOT = Path(__file__).parents[2]
KEPT = _ROOT / "tests/lint/patients"
RESTORED = _ROOT / "models/out/patients"

_LARGEST_KEPT = 64
_FLOATS = {"FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"}


def restore() -> Path:
    """The folder with every patient as an .onnx file; written anew, each beside and renamed."""
    RESTORED.mkdir(parents=True, exist_ok=True)
    for text in sorted(KEPT.glob("*.textproto")):
        model = text_format.Parse(text.read_text(), onnx.ModelProto())
        for tensor in _weights(model):
            tensor.CopyFrom(_random(tensor))
        made = RESTORED / f".{text.stem}.{os.getpid()}"
        made.write_bytes(model.SerializeToString(deterministic=True))
        made.rename(RESTORED / f"{text.stem}.onnx")
    return RESTORED


def stripped(model: onnx.ModelProto) -> str:
    """The model as text, without its weights."""
    for tensor in _weights(model):
        kept = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        tensor.CopyFrom(kept)
    return text_format.MessageToString(model)


def _weights(model: onnx.ModelProto) -> list[TensorProto]:
    types = _FLOATS | {"INT8", "FLOAT8E4M3FN"}
    return [
        t
        for t in model.graph.initializer
        if math.prod(t.dims) > _LARGEST_KEPT and TensorProto.DataType.Name(t.data_type) in types
    ]


def _random(tensor: TensorProto) -> TensorProto:
    rng = np.random.default_rng(zlib.crc32(tensor.name.encode()))
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    if kind == np.int8:
        values = rng.integers(-127, 128, tensor.dims)
    else:
        values = rng.standard_normal(tensor.dims) / math.sqrt(math.prod(tensor.dims[1:]) or 1)
    return numpy_helper.from_array(values.astype(kind), tensor.name)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).with_suffix(".textproto").write_text(stripped(onnx.load(name)))
