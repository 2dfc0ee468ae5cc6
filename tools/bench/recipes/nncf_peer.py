"""NNCF: `python -I nncf_peer.py RECIPE MODEL CALIB.npz OUTPUT`, in its own environment.

The documented call with its defaults; with the kind of model named, as it asks for transformers;
and that without SmoothQuant, which stops at a product of two computed tensors.
"""

import sys

import nncf
import numpy as np
import onnx
from nncf.quantization.advanced_parameters import (
    AdvancedQuantizationParameters,
    AdvancedSmoothQuantParameters,
)

RECIPES = {
    "int8": {},
    "int8-transformer": {"model_type": nncf.ModelType.TRANSFORMER},
    "int8-transformer-unsmoothed": {
        "model_type": nncf.ModelType.TRANSFORMER,
        "advanced_parameters": AdvancedQuantizationParameters(
            smooth_quant_alphas=AdvancedSmoothQuantParameters(matmul=-1, convolution=-1)
        ),
    },
}

recipe, path, calib, output = sys.argv[1:]
with np.load(calib) as arrays:
    columns = dict(arrays)
count = len(next(iter(columns.values())))
feeds = [{name: rows[i : i + 1] for name, rows in columns.items()} for i in range(count)]
quantized = nncf.quantize(onnx.load(path), nncf.Dataset(feeds), **RECIPES[recipe])
onnx.save(quantized, output)
