"""The names of graph objects, for rooms that hold them and never change them by themselves."""

from __future__ import annotations

from onnx_graphsurgeon import Constant, Node, Tensor

__all__ = ["Constant", "Node", "Tensor"]
