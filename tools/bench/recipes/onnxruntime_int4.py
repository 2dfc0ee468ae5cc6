"""ONNX Runtime's INT4: `python -I onnxruntime_int4.py RECIPE MODEL CALIB.npz OUTPUT BLOCK`.

Its methods, symmetric where they can be (HQQ and k-quant have zero points, which take half a bit
more), with activations as they are: by its default they would be rounded to INT8.
"""

import sys

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader
from onnxruntime.quantization.matmul_nbits_quantizer import (
    GPTQWeightOnlyQuantConfig,
    HQQWeightOnlyQuantConfig,
    KQuantWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    RTNWeightOnlyQuantConfig,
)


class Reader(CalibrationDataReader):
    """The arrays of an .npz, a row at a time."""

    def __init__(self, path):
        with np.load(path) as arrays:
            columns = dict(arrays)
        count = len(next(iter(columns.values())))
        self.feeds = [{n: a[i : i + 1] for n, a in columns.items()} for i in range(count)]

    def get_next(self):
        return self.feeds.pop(0) if self.feeds else None


recipe, model, calib, output, block = sys.argv[1:]
size = int(block)
METHODS = {
    "int4": lambda: None,  # its default: rounded to nearest
    "int4-rtn": RTNWeightOnlyQuantConfig,
    "int4-k-quant": KQuantWeightOnlyQuantConfig,
    "int4-hqq": lambda: HQQWeightOnlyQuantConfig(block_size=size, bits=4),
    "int4-gptq": lambda: GPTQWeightOnlyQuantConfig(Reader(calib), block_size=size),
}
quantizer = MatMulNBitsQuantizer(
    onnx.load(model),
    block_size=size,
    is_symmetric=True,
    accuracy_level=1,
    algo_config=METHODS[recipe](),
)
quantizer.process()
quantizer.model.save_model_to_file(output, use_external_data_format=True)
