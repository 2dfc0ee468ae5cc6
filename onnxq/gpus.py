"""Compile targets: what each compute capability runs in low precision.

Source: NVIDIA CUDA C++ Programming Guide, compute capabilities; TensorRT support matrix.
`ahead_of_time` is what the tensorrt-rtx 1.7.1 builder accepts without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.errors import OnnxqError


@dataclass(frozen=True)
class Target:
    """One compute capability, and what the compiler makes run on it."""

    name: str
    capability: tuple[int, int]
    architecture: str
    ahead_of_time: bool

    def runs(self, format_name: str) -> bool:
        """Whether a format (a row of `formats`) can be part of a product here.

        Of 8 bits, NVFP4 and MXFP8 both operands are; INT4 is expanded inside the kernel.
        """
        if format_name not in _NEEDED:
            return False
        return self.capability >= _NEEDED[format_name]

    @property
    def fuses_weight_only(self) -> bool:
        """Whether a narrow weight and a wide activation are multiplied by one kernel."""
        return self.capability >= (8, 0)


_NEEDED = {"int8": (7, 5), "int4": (8, 0), "fp8": (8, 9), "nvfp4": (10, 0), "mxfp8": (10, 0)}


TARGETS = {
    t.name: t
    for t in (
        Target("sm75", (7, 5), "Turing: T4, RTX 20", True),
        Target("sm80", (8, 0), "Ampere: A100, A30", True),
        Target("sm86", (8, 6), "Ampere: A10, RTX 30", True),
        Target("sm89", (8, 9), "Ada: L4, L40S, RTX 40", True),
        Target("sm90", (9, 0), "Hopper: H100, H200", False),
        Target("sm100", (10, 0), "Blackwell: B200", False),
        Target("sm120", (12, 0), "Blackwell: RTX 50, RTX PRO", True),
        Target("sm121", (12, 1), "Blackwell: GB10", True),
    )
}

DEFAULT_TARGET = "sm89"


def target(name: str) -> Target:
    """Look up a target by name, such as `sm89`."""
    try:
        return TARGETS[name.lower()]
    except KeyError:
        known = ", ".join(TARGETS)
        raise OnnxqError(f"unknown target {name!r}", f"choose one of: {known}") from None
