"""Damaged models and data, by the ten thousand, through all of onnxq that runs in one process."""
