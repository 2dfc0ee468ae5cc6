"""Which recipe for which GPU and use: the field's decision table, as a pure function.

Four questions decide. Is a user waiting for each answer (online), or are answers collected
(offline)? What does the GPU multiply? How many requests run at a time? What room is left?

    text made token by token, online,    the weights' bytes decide: INT4 weights alone (W4A16)
    few at a time, on Ampere or Hopper
    everything else                      multiplications decide: both operands in 8 bits (W8A8),
                                         FP8 from Ada on, INT8 before
    Ada                                  FP8 in either case
    Blackwell                            NVFP4 in either case: both operands in 4 bits

A tight accuracy budget asks for GPTQ, or SmoothQuant and GPTQ, in the same format.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from onnxq.footprint import Footprint, Kind
from onnxq.gpus import Gpu

Workload = Literal["online", "offline"]

FEW = 8
"""From so many requests at a time on, INT4 weights alone lose. Published for Llama-3.1-8B on H200
(TensorRT-LLM): INT4 AWQ is 1.33 x as fast as BF16 at one request and 0.75 x at 8; FP8 1.41 x and
1.31 x."""

TIGHT = 0.01
"""A loss of accuracy below this asks for the most careful rounding there is."""

_RESERVED = 0.1
"""Share of a GPU's memory left to activations, workspace and the driver."""


@dataclass(frozen=True)
class Scheme:
    """What is stored and multiplied.

    Attributes:
        name: the field's short name.
        recipes: recipes that do it, the best first.
        careful: the same where accuracy is tight.
        wider: the recipes to fall back on where too much is lost.
        sparse: with 2:4 sparsity beside it.
        published: relative loss of MMLU, Llama-3.1-8B (NVIDIA Model Optimizer); None: no figure.
    """

    name: str
    recipes: tuple[str, ...]
    careful: tuple[str, ...]
    wider: tuple[str, ...]
    sparse: str = ""
    published: float | None = None


W4A16 = Scheme(
    "W4A16: INT4 weights, 16-bit activations",
    ("int4-gptq", "int4-awq", "int4-rtn"),
    ("int4-best", "int4-gptq", "int4-awq", "int4-rtn"),
    ("int8-weight-only",),
    published=0.057,
)
INT8 = Scheme(
    "W8A8: INT8 weights and activations",
    ("int8-smoothquant", "int8-dynamic"),
    ("int8-smoothquant-gptq", "int8-smoothquant", "int8-dynamic"),
    ("int8-smoothquant-dynamic", "int8-weight-only"),
    "int8-smoothquant-sparse24",
)
FP8 = Scheme(
    "W8A8: FP8 weights and activations",
    ("fp8", "fp8-dynamic"),
    ("fp8-gptq", "fp8-dynamic", "fp8"),
    ("fp8-weight-only",),
    "fp8-sparse24",
    0.015,
)
NVFP4 = Scheme(
    "W4A4: NVFP4 weights and activations",
    ("nvfp4", "fp8"),
    ("nvfp4-gptq", "nvfp4", "fp8"),
    ("fp8",),
)
INT8_CONVOLUTIONS = Scheme(
    "W8A8: INT8 weights and activations", ("int8", "int8-dynamic"), ("int8", "int8-dynamic"), ()
)
FP8_CONVOLUTIONS = Scheme(
    "W8A8: FP8 weights and activations", ("fp8", "fp8-dynamic"), ("fp8", "fp8-dynamic"), ()
)
"""Calibrated also where accuracy is tight: PP-OCR's recognizer makes 2.15 % of errors in `int8` and
3.72 % in `int8-dynamic`, 1.90 % in `fp8` and 2.81 % in `fp8-dynamic`."""
INT8_DIFFUSION = Scheme(
    "W8A8: INT8 weights and activations", ("sdxl-int8", "int8"), ("sdxl-int8", "int8"), ()
)
FP8_DIFFUSION = Scheme(
    "W8A8: FP8 weights and activations", ("sdxl-fp8", "fp8"), ("sdxl-fp8", "fp8"), ()
)


@dataclass(frozen=True)
class Use:
    """What the model is for.

    Attributes:
        batch: requests at a time.
        budget: relative loss of accuracy that is acceptable.
        saturated: the GPU's arithmetic is in full use already, whatever the batch.
        sequence: tokens of a request, its answer included.
    """

    gpu: Gpu
    workload: Workload
    batch: int = 1
    budget: float = 0.02
    saturated: bool = False
    sequence: int = 2048

    @property
    def tight(self) -> bool:
        """Whether the accuracy budget is."""
        return self.budget < TIGHT

    @property
    def few(self) -> bool:
        """Whether the GPU waits for memory rather than for its arithmetic."""
        return self.workload == "online" and self.batch < FEW and not self.saturated


@dataclass(frozen=True)
class Advice:
    """What to do and why.

    Attributes:
        recipe: one that this onnxq has.
        wanted: the one to name if it were there; `recipe` where it is.
        reasons: question -> answer, in the order they decide.
        notes: what else to know.
    """

    use: Use
    kind: Kind
    scheme: Scheme
    recipe: str
    wanted: str
    reasons: tuple[tuple[str, str], ...]
    notes: tuple[str, ...] = ()


def advise(use: Use, available: Collection[str], kind: Kind | None = None) -> Advice:
    """The recipe for a use, of those `available`.

    Args:
        kind: of the model; None: a language model.
    """
    kind = kind or Kind()
    scheme = choose(use, kind)
    chain = scheme.careful if use.tight else scheme.recipes
    recipe = next(name for name in (*chain, *scheme.recipes) if name in available)
    careful = recipe not in scheme.recipes
    reasons = (
        ("workload", _workload(use, kind)),
        ("GPU", _gpu(use, kind, scheme)),
        ("concurrency", _concurrency(use, kind)),
        ("accuracy", _accuracy(use, kind, scheme, careful)),
    )
    found = Advice(use, kind, scheme, recipe, chain[0], reasons)
    return replace(found, notes=tuple(_notes(found, available)))


def choose(use: Use, kind: Kind) -> Scheme:
    """The decision table."""
    capability = use.gpu.target.capability
    if kind.diffuses:
        return FP8_DIFFUSION if capability >= (8, 9) else INT8_DIFFUSION
    if kind.convolutional:  # no kernel has 4-bit convolutions
        return FP8_CONVOLUTIONS if capability >= (8, 9) else INT8_CONVOLUTIONS
    if capability >= (10, 0):
        return NVFP4
    if capability >= (8, 0) and capability != (8, 9) and kind.generates and use.few:
        return W4A16
    return FP8 if capability >= (8, 9) else INT8


def cache_bytes(use: Use, size: Footprint) -> int | None:
    """The key-value cache of all requests at full length."""
    return None if size.cache is None else size.cache * use.batch * use.sequence


def gpus_needed(use: Use, taken: int) -> int:
    """GPUs that hold so many bytes, a tenth of each left free."""
    return math.ceil(taken / ((1 - _RESERVED) * use.gpu.memory * 1e9))


def headroom(use: Use, advice: Advice, size: Footprint) -> tuple[str, tuple[str, ...]]:
    """What room is left in memory, and what follows from it."""
    cache = cache_bytes(use, size)
    taken = size.weights + (cache or 0)
    count = gpus_needed(use, taken)
    said = f"weights {_gigabytes(size.weights)} ({_gigabytes(size.full)} in 16 bits)"
    if size.cache:
        said += f", cache {_gigabytes(cache or 0)} ({use.batch} x {use.sequence} tokens)"
    said += f", of {use.gpu.memory:g} GB: {count} GPU{'s' * (count > 1)}"
    notes = []
    if size.cache is None:
        notes.append("the graph does not show how large its key-value cache is: it comes on top")
    narrow = size.plain + size.coded * _INT4_OF_8_BITS + (cache or 0)
    if count > gpus_needed(use, round(narrow)) and advice.scheme in (FP8, INT8):
        fewer = gpus_needed(use, round(narrow))
        notes.append(f"INT4 weights alone (int4-gptq) would take {fewer} instead of {count}")
    if size.cache != 0 and use.workload == "online":
        least = taken / count / (use.gpu.bandwidth * 1e9)
        notes.append(
            f"a token reads all of it: {1e3 * least:.2g} ms at the least, at the full bandwidth"
        )
    return said, tuple(notes)


_INT4_OF_8_BITS = (4 + 16 / 64) / 8
"""Bytes of INT4 in blocks of 64 with 16-bit scales, of those of 8 bits."""


def _notes(advice: Advice, available: Collection[str]) -> Iterator[str]:
    use, scheme, recipe = advice.use, advice.scheme, advice.recipe
    if recipe != advice.wanted:
        yield f"{advice.wanted} would be the one, which this onnxq lacks: {recipe} is nearest"
    if _is_either_use(advice) and scheme is FP8:
        yield "INT4 weights alone (int4-gptq) are read in half the time, at a larger loss"
    if scheme is W4A16 and use.gpu.fp8:
        yield (
            "published for Llama-3.1-8B on H200, one request: INT4 AWQ 1.33 x, FP8 1.41 x BF16: "
            "if FP8 fits, measure both"
        )
    if use.workload == "offline" and scheme.sparse in available:
        yield f"{scheme.sparse} has 2:4 sparsity beside it: faster, at a further loss"
    if scheme in (INT8_DIFFUSION, FP8_DIFFUSION):
        yield "where it loses too much: fewer layers, with --set level=2 or 1"
    else:
        # What is left by its error is left by that of activations in 8 bits.
        by_error = scheme not in (W4A16, NVFP4)
        single = (
            "the worst layers left with --keep-flops 10%"
            if by_error
            else "single layers left with --rule"
        )
        others = [name for name in scheme.wider if name in available and name != recipe]
        yield f"where it loses too much: {', '.join(others)}{' or ' * bool(others)}{single}"


def _is_either_use(advice: Advice) -> bool:
    """Whether bytes would decide, but the GPU's own format serves bytes and products alike."""
    return advice.kind.generates and advice.use.few and advice.scheme in (FP8, NVFP4)


def _workload(use: Use, kind: Kind) -> str:
    if not kind.generates:
        return f"{use.workload}; a call works through its whole input: multiplications decide"
    if use.workload == "offline":
        return "offline: many requests share each reading of the weights: multiplications decide"
    return "online: a token waits until all weights are read: their bytes decide, if users are few"


def _gpu(use: Use, kind: Kind, scheme: Scheme) -> str:
    gpu = use.gpu
    columns = (("FP16", gpu.fp16), ("INT8", gpu.int8), ("FP8", gpu.fp8), ("FP4", gpu.fp4))
    rates = ", ".join(f"{name} {rate:,.0f}" for name, rate in columns if rate)
    family = gpu.target.architecture.split(":")[0]
    said = f"{gpu.name} ({family}): {rates} TFLOPS dense; {gpu.bandwidth:,.0f} GB/s"
    if scheme is W4A16:
        return f"{said}; INT4 weights are a quarter of the bytes, multiplied in FP16"
    if kind.generates and use.few:
        return said + _EITHER_USE[scheme]
    return said


_EITHER_USE = {
    NVFP4: "; NVFP4 is a quarter of the bytes and four times the rate: right for both uses",
    FP8: "; FP8 is half the bytes and twice the rate: right for both uses",
    INT8: "; it has no product with INT4 weights inside",
}


def _concurrency(use: Use, kind: Kind) -> str:
    users = f"{use.batch} at a time"
    if not kind.generates or use.workload == "offline":
        return users
    if use.saturated:
        return f"{users}, and the GPU is in full use: multiplications decide after all"
    if use.batch >= FEW:
        return f"{users}: from about {FEW} on, multiplications decide"
    # A weight in INT4 is half a byte to read, and 2 operations in FP16 a request.
    turn = use.gpu.fp16 * 1e12 * 0.5 / (2 * use.gpu.bandwidth * 1e9)
    return f"{users}: few, the GPU waits for memory (below {FEW} in practice, {turn:.0f} in theory)"


def _accuracy(use: Use, kind: Kind, scheme: Scheme, careful: bool) -> str:
    said = f"{100 * use.budget:g} % may be lost"
    if use.tight:
        said += ": tight, so weights are rounded with care" if careful else ": tight"
    if kind.generates and scheme.published is not None:
        said += f"; published for Llama-3.1-8B: {100 * scheme.published:g} % of MMLU"
        if scheme.published > use.budget:
            said += ", more than that"
    elif use.tight:
        said += "; nothing is published of such a model"
    return said + (": measure it" if use.tight or "more than that" in said else "")


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
