"""NVIDIA ModelOpt: `python -I modelopt_peer.py RECIPE MODEL CALIB.npz OUTPUT`.

The documented call with its defaults (entropy for INT8, FP16 for what is not quantized), and what
a careful user changes: maxima instead of entropy, residual additions left out, node-by-node
calibration to save memory, external data for what is near 2 GB. Any recipe with `-no-concat` runs
without its pass for Concat, which fails (KeyError) on UNets, whose Concats feed each other.
"""

import sys

import numpy as np
from modelopt.onnx.quantization import quantize

RECIPES = {
    "int8": {"quantize_mode": "int8"},
    "int8-max": {"quantize_mode": "int8", "calibration_method": "max"},
    "int8-max-no-add": {
        "quantize_mode": "int8",
        "calibration_method": "max",
        "op_types_to_exclude": ["Add"],
    },
    "int8-max-per-node": {
        "quantize_mode": "int8",
        "calibration_method": "max",
        "calibrate_per_node": True,
    },
    "fp8": {"quantize_mode": "fp8", "calibration_method": "max"},
    "int4-rtn": {"quantize_mode": "int4", "calibration_method": "rtn_dq"},
}

recipe, model, calib, output = sys.argv[1:]
options = dict(RECIPES[recipe.removesuffix("-no-concat")])
if recipe.endswith("-no-concat"):
    options["passes"] = []
with np.load(calib) as arrays:
    data = dict(arrays)
quantize(
    model,
    calibration_data=data,
    calibration_eps=["cpu"],  # there is no GPU: without this it tries one first
    output_path=output,
    **options,
)
