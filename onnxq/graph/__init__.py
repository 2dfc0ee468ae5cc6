"""Reading, querying and editing ONNX graphs; the only room that imports onnx and onnx_graphsurgeon."""
