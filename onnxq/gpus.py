"""Two tables: compile targets, a compute capability each, and GPUs, a card each.

Source of the targets: NVIDIA CUDA C++ Programming Guide, compute capabilities; TensorRT support
matrix. `ahead_of_time` is what the tensorrt-rtx 1.7.1 builder accepts without a GPU. The GPUs'
sources stand beside them.
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
    tensorrt: bool = True

    def runs(self, format_name: str) -> bool:
        """Whether a format (a row of `formats`) can be part of a product here.

        Of 8 bits, NVFP4 and MXFP8 both operands are; INT4 is expanded inside the kernel. Zero
        points are for ONNX Runtime alone.
        """
        if not self.tensorrt:
            return format_name in ("int8", "int4", "uint4")
        return format_name in _NEEDED and self.capability >= _NEEDED[format_name]

    @property
    def fuses_weight_only(self) -> bool:
        """Whether a narrow weight and a wide activation are multiplied by one kernel."""
        return not self.tensorrt or self.capability >= (8, 0)


_NEEDED = {"int8": (7, 5), "int4": (8, 0), "fp8": (8, 9), "nvfp4": (10, 0), "mxfp8": (10, 0)}


TARGETS = {
    t.name: t
    for t in (
        Target("sm75", (7, 5), "Turing: T4, RTX 20", True),
        Target("sm80", (8, 0), "Ampere: A100, A30", True),
        Target("sm86", (8, 6), "Ampere: A10, RTX 30", True),
        Target("sm87", (8, 7), "Ampere: Jetson Orin", False),
        Target("sm89", (8, 9), "Ada: L4, L40S, RTX 40", True),
        Target("sm90", (9, 0), "Hopper: H100, H200", False),
        Target("sm100", (10, 0), "Blackwell: B200", False),
        Target("sm120", (12, 0), "Blackwell: RTX 50, RTX PRO", True),
        Target("sm121", (12, 1), "Blackwell: GB10", True),
        Target("onnxruntime", (0, 0), "ONNX Runtime, any device", False, tensorrt=False),
    )
}

DEFAULT_TARGET = "sm89"


def target(name: str) -> Target:
    """Look up a target by name, such as `sm89`, or by a GPU that has it, such as `l40s`."""
    found = TARGETS.get(name.lower())
    if found is not None:
        return found
    card = _find(name)
    if card is None:
        known = ", ".join(TARGETS)
        raise OnnxqError(f"unknown target {name!r}", f"choose one of: {known}, or a GPU") from None
    return card.target


@dataclass(frozen=True)
class Gpu:
    """A card, by its maker's figures: what it could do at best, at its boost clock.

    Attributes:
        name: as people write it.
        sm: its target.
        memory: GB (10^9 bytes) that the maker names; drivers keep some of it.
        bandwidth: of that memory, GB/s.
        fp16, fp8, int8, fp4: dense matrix products, 10^12 operations a second (a multiplication and
            an addition are two), accumulated in FP32 (INT8: in INT32); 0: not in its tensor cores.
        narrow_gain: how much faster products in FP16 and FP8 are where they accumulate in FP16:
            consumer cards have FP32 accumulation at half rate. TensorRT accumulates in FP32 unless
            told otherwise, so `fp16` and `fp8` are what counts.
    """

    name: str
    sm: str
    memory: float
    bandwidth: float
    fp16: float
    fp8: float
    int8: float
    fp4: float
    narrow_gain: float = 1.0

    @property
    def target(self) -> Target:
        """What it compiles for."""
        return TARGETS[self.sm]

    def peak(self, format_name: str) -> float:
        """10^12 operations a second, dense, of products in the format (a row of `formats`).

        INT4 weights are expanded and multiplied in FP16. 0 where the target does not run it.
        """
        if format_name in _NEEDED and not self.target.runs(format_name):
            return 0.0
        column = {"int8": self.int8, "fp8": self.fp8, "mxfp8": self.fp8, "nvfp4": self.fp4}
        return column.get(format_name, self.fp16)


GPUS = {
    gpu.name: gpu
    for gpu in (
        # NVIDIA T4 datasheet: 65 / 130 (INT8), 320 GB/s. Its architecture has half-rate FP32
        # accumulation on consumer cards only.
        Gpu("T4", "sm75", 16, 320, 65, 0, 130, 0),
        # GA102 whitepaper (Ampere GeForce), RTX 3090: FP16 142 with FP16 and 71 with FP32
        # accumulation, INT8 284; 936 GB/s.
        Gpu("RTX 3090", "sm86", 24, 936, 71, 0, 284, 0, 2.0),
        # A10, A30 datasheets, without sparsity.
        Gpu("A10", "sm86", 24, 600, 125, 0, 250, 0),
        Gpu("A30", "sm80", 24, 933, 165, 0, 330, 0),
        # A100 datasheet (SXM): 312, INT8 624; 1,555 and 2,039 GB/s. PCIe with 80 GB: 1,935.
        Gpu("A100 40GB", "sm80", 40, 1555, 312, 0, 624, 0),
        Gpu("A100 80GB", "sm80", 80, 2039, 312, 0, 624, 0),
        Gpu("A100 80GB PCIe", "sm80", 80, 1935, 312, 0, 624, 0),
        # Jetson AGX Orin technical brief: GPU 170 INT8 TOPS sparse, 85 dense; 204.8 GB/s, shared
        # with the CPU. The 275 TOPS advertised count sparsity and two other accelerators.
        Gpu("Jetson AGX Orin", "sm87", 64, 204.8, 42.5, 0, 85, 0),
        # L4 datasheet: 242 FP16 and 485 FP8 / INT8 with sparsity; half without.
        Gpu("L4", "sm89", 24, 300, 121, 242.5, 242.5, 0),
        # L40S datasheet: 362 FP16, 733 FP8 / INT8 without sparsity; 864 GB/s.
        Gpu("L40S", "sm89", 48, 864, 362, 733, 733, 0),
        # Ada GPU architecture whitepaper: RTX 4090, 330.3 FP16 (FP16 accumulation) and 165.2
        # (FP32), FP8 660.6 and 330.3, INT8 660.6. RTX 6000 Ada, professional: full rate.
        Gpu("RTX 4090", "sm89", 24, 1008, 165.2, 330.3, 660.6, 0, 2.0),
        Gpu("RTX 6000 Ada", "sm89", 48, 960, 364.2, 728.5, 728.5, 0),
        # H100 and H200 datasheets, halved: they state figures with sparsity.
        Gpu("H100 SXM", "sm90", 80, 3352, 989.4, 1978.9, 1978.9, 0),
        Gpu("H100 PCIe", "sm90", 80, 2039, 756, 1513, 1513, 0),
        Gpu("H200", "sm90", 141, 4800, 989.4, 1978.9, 1978.9, 0),
        # HGX B200 datasheet, halved where it states sparsity: 4.5 PFLOPS FP16, 9 FP8 / INT8, 18 FP4
        # a GPU; 180 GB, 7.7 TB/s.
        Gpu("B200", "sm100", 180, 7700, 2250, 4500, 4500, 9000),
        # RTX Blackwell GPU architecture whitepaper: RTX 5090, FP16 419 and 209.5 (FP32
        # accumulation), FP8 838 and 419, INT8 838, FP4 1,676; 1,792 GB/s.
        Gpu("RTX 5090", "sm120", 32, 1792, 209.5, 419, 838, 1676, 2.0),
        # RTX PRO Blackwell architecture whitepaper (workstation edition): 503.8, 1,007.6, 2,015.2,
        # at full rate with FP32 accumulation. The server edition: 1,597 GB/s.
        Gpu("RTX PRO 6000 Blackwell", "sm120", 96, 1792, 503.8, 1007.6, 1007.6, 2015.2),
    )
}

_SHORT = {
    "a100": "A100 80GB",
    "h100": "H100 SXM",
    "orin": "Jetson AGX Orin",
    "rtxpro6000": "RTX PRO 6000 Blackwell",
}


def gpu(name: str) -> Gpu:
    """Look up a GPU by name; spaces, dashes and case do not count, nor does its maker.

    Raises:
        OnnxqError: not in the table, naming those that are.
    """
    found = _find(name)
    if found is None:
        raise OnnxqError(f"unknown GPU {name!r}", f"choose one of: {', '.join(GPUS)}")
    return found


def _find(name: str) -> Gpu | None:
    bare = _bare(name)
    wanted = _bare(_SHORT.get(bare, bare))
    return next((found for known, found in GPUS.items() if _bare(known) == wanted), None)


def _bare(name: str) -> str:
    letters = "".join(c for c in name.lower() if c.isalnum())
    for brand in ("nvidia", "geforce", "tesla"):
        letters = letters.removeprefix(brand)
    return letters
