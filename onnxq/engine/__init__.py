"""Compiling with TensorRT, and reading what became of each node.

The only room that imports tensorrt and tensorrt_rtx, and only in the compile's own process.
"""
