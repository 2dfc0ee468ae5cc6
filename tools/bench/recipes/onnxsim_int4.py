"""onnxsim's INT4 weights: `python -I onnxsim_int4.py RECIPE MODEL CALIB.npz OUTPUT BLOCK`.

Rounded to nearest, and its methods on top of that. It silently does nothing below opset 21: the
opset is raised first, as a careful user would. Its blocks are of 32, whatever BLOCK asks for.
"""

import sys

import numpy as np
import onnx
import onnx.version_converter
import onnxsim

recipe, path, calib, output, _ = sys.argv[1:]
with np.load(calib) as arrays:
    columns = dict(arrays)
count = len(next(iter(columns.values())))
feeds = [{name: rows[i : i + 1] for name, rows in columns.items()} for i in range(count)]
model = onnx.version_converter.convert_version(onnx.load(path), 21)
made = onnxsim.quantize_weight_only_int4(model)
if recipe != "int4-rtn":
    method = getattr(onnxsim, f"apply_{recipe.removeprefix('int4-')}")
    made = method(model, made, feeds)
onnx.save(made, output)
