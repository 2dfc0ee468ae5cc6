"""onnxq: model.onnx in, a smaller and faster one for TensorRT out, with the evidence.

    report = onnxq.quantize("model.onnx", "model.fp8.onnx", recipe="fp8", calib="data.npz")
    onnxq.build("model.fp8.onnx", "model.plan", target="sm89", shapes=["x:1x3,4x3,8x3"])
    onnxq.compare("model.onnx", "model.fp8.onnx", data="heldout.npz")

Importing this package imports nothing heavy: onnx, ONNX Runtime and TensorRT load on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxq.api import (
        build,
        check_zeros,
        compare,
        evaluate_diffusion,
        inspect,
        lint,
        prune,
        quantize,
        recommend,
    )

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "build",
    "check_zeros",
    "compare",
    "evaluate_diffusion",
    "inspect",
    "lint",
    "prune",
    "quantize",
    "recommend",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from onnxq import api

        return getattr(api, name)
    raise AttributeError(f"module 'onnxq' has no attribute {name!r}")
