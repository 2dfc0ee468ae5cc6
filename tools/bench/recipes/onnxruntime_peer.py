"""ONNX Runtime's quantizer: `python -I onnxruntime_peer.py RECIPE MODEL CALIB.npz OUTPUT`.

The documented call with its defaults; what its example for TensorRT does, after its pre-processing:
symmetric, a scale a channel, inputs of layers only, attention left; and dynamic quantization, which
it recommends for transformers.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process


class Reader(CalibrationDataReader):
    """The arrays of an .npz, a row at a time."""

    def __init__(self, path):
        with np.load(path) as arrays:
            columns = dict(arrays)
        count = len(next(iter(columns.values())))
        self.feeds = iter([{n: a[i : i + 1] for n, a in columns.items()} for i in range(count)])

    def get_next(self):
        return next(self.feeds, None)


def computed_products(path):
    """Names of the MatMuls without a constant: MatMulConstBOnly has no effect on Q/DQ."""
    graph = onnx.load(path).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [n.name for n in graph.node if n.op_type == "MatMul" and n.input[1] not in constants]


recipe, model, calib, output = sys.argv[1:]
if recipe == "int8":
    quantize_static(model, output, Reader(calib))
elif recipe == "int8-tensorrt":
    with tempfile.TemporaryDirectory() as folder:
        # Its pre-processing does not find external data again: all in one file, then.
        whole, prepared = str(Path(folder, "whole.onnx")), str(Path(folder, "prepared.onnx"))
        onnx.save(onnx.load(model), whole)
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        products = ["MatMul", "Gemm", "Conv"]
        quantize_static(
            prepared,
            output,
            Reader(calib),
            op_types_to_quantize=products,
            nodes_to_exclude=computed_products(prepared),
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "OpTypesToExcludeOutputQuantization": products,
                "DedicatedQDQPair": True,
                "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
                "QuantizeBias": False,
            },
        )
elif recipe == "int8-dynamic":
    quantize_dynamic(model, output)
