"""NVIDIA ModelOpt's INT4 weights: `python -I modelopt_int4.py RECIPE MODEL CALIB.npz OUTPUT BLOCK`.

Its methods as its examples for language models call them. Without cupy it ends with an error where
it would fold AWQ's scales into a norm, behind the whole search: `-unfused` leaves them as Muls.
"""

import sys

import numpy as np
import onnx
from modelopt.onnx.quantization.int4 import quantize

METHODS = {
    "int4-rtn": "rtn_dq",
    "int4-awq-lite": "awq_lite",
    "int4-awq-lite-unfused": "awq_lite",
    "int4-awq-clip": "awq_clip",
}

recipe, model, calib, output, block = sys.argv[1:]
with np.load(calib) as arrays:
    columns = dict(arrays)
count = len(next(iter(columns.values())))
made = quantize(
    model,
    calibration_method=METHODS[recipe],
    calibration_data_reader=[
        {name: rows[i : i + 1] for name, rows in columns.items()} for i in range(count)
    ],
    calibration_eps=["cpu"],
    block_size=int(block),
    **({"awqlite_fuse_nodes": False} if recipe.endswith("-unfused") else {}),
)
onnx.save(made, output, save_as_external_data=True, location="model.onnx_data")
