"""onnxq measured on real models: accuracy on held-out data, compiled layers, time and memory."""
