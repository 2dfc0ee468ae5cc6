"""onnxsim: `python -I onnxsim_peer.py RECIPE MODEL CALIB.npz OUTPUT`, in its own environment.

Its documented calls with their defaults. Its INT4 silently does nothing below opset 21: the opset
is raised first, as a careful user would.
"""

import sys

import numpy as np
import onnx
import onnx.version_converter
import onnxsim

recipe, path, calib, output = sys.argv[1:]
with np.load(calib) as arrays:
    columns = dict(arrays)
count = len(next(iter(columns.values())))
feeds = [{name: rows[i : i + 1] for name, rows in columns.items()} for i in range(count)]
model = onnx.load(path)
if recipe == "int8":
    made = onnxsim.quantize_static(model, feeds)
elif recipe == "int8-dynamic":
    made = onnxsim.quantize_dynamic(model)
elif recipe == "fp8":
    made = onnxsim.quantize_fp8(model)
elif recipe == "int4":
    made = onnxsim.quantize_weight_only_int4(onnx.version_converter.convert_version(model, 21))
onnx.save(made, output)
