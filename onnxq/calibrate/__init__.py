"""Calibration data in, ranges out; with `evaluate`, the only room that imports onnxruntime."""
