"""Compiling with TensorRT and reading what became of each node; the only room that imports tensorrt."""
