"""Lint: what TensorRT will refuse, run in 16 bits or compute wrongly, told from the file alone."""
