"""What none can go below: import ONNX Runtime, load the model, run it once over the data.

python -I floor.py forward MODEL CALIB.npz
"""

import sys

import numpy as np
import onnxruntime

_, model, calib = sys.argv[1:4]
with np.load(calib) as arrays:
    columns = dict(arrays)
session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
for row in range(len(next(iter(columns.values())))):
    session.run(None, {name: array[row : row + 1] for name, array in columns.items()})
