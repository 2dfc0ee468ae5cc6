"""Which ONNX nodes really run in low precision: pure, from the compiled layers alone.

What is counted is ONNX nodes, not kernels: the compiler merges the q, k, v projections of one
tensor into one gemm, and gate and up likewise. A merged gemm names all of its nodes, and so does
fused attention; a DequantizeLinear is named by the multiply that absorbed it, a QuantizeLinear by
the elementwise kernel that quantizes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from onnxq.engine import kernels

Kind = Literal["gemm", "conv", "attention"]
TITLES: dict[Kind, str] = {"gemm": "GEMM", "conv": "convolution", "attention": "attention"}

WEIGHTS_ALONE = " weights"


@dataclass(frozen=True)
class WeightedNode:
    """A multiplication of the ONNX file and the format it is meant to run in.

    `wanted` is a dtype word: `fp8`, `int8`, `fp4`, `fp16`, ..., or `int4 weights` where the other
    operand stays wide. For attention `name` is a label, and `parts` are the names of its first
    MatMul, its Softmax and its second MatMul. `left` is why the file does not quantize it.
    """

    name: str
    kind: Kind
    wanted: str
    parts: tuple[str, ...] = ()
    left: str = ""

    @property
    def narrow(self) -> bool:
        """Whether it is meant to run in fewer than 16 bits."""
        return self.wanted.removesuffix(WEIGHTS_ALONE) in kernels.NARROW


@dataclass(frozen=True)
class NodeCoverage:
    """What one node became in one profile; `reason` is empty where it ran as wanted.

    `ran` is the dtype it multiplied in; `elementwise` for a product inside such a kernel, whose
    operands do not tell one product's dtype; `none` where no layer names it.
    """

    node: WeightedNode
    profile: int
    ran: str
    layer: str
    reason: str = ""

    @property
    def as_wanted(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Coverage:
    """All nodes in all profiles, and what the engine holds beside them.

    `quantize_alone` and `dequantize_alone` are kernels whose only job is a Q or a DQ that no other
    kernel took up: name and why; `weight_bytes` are the constants of the first profile by dtype.
    """

    nodes: tuple[NodeCoverage, ...]
    quantize_alone: Mapping[str, str] = field(default_factory=dict)
    dequantize_alone: Mapping[str, str] = field(default_factory=dict)
    weight_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Every node that is quantized ran in its format, in every profile."""
        return all(entry.as_wanted or not entry.node.narrow for entry in self.nodes)

    @property
    def missed(self) -> tuple[NodeCoverage, ...]:
        """The nodes that did not run as they were meant to, each with its reason.

        Beside quantized nodes that may be attention that was left in float and did not fuse.
        """
        return tuple(entry for entry in self.nodes if not entry.as_wanted)

    @property
    def left(self) -> tuple[NodeCoverage, ...]:
        """The nodes that a quantized file itself leaves wide, and that ran so.

        None of a file that quantizes nothing.
        """
        quantized = any(entry.node.narrow for entry in self.nodes)
        return tuple(e for e in self.nodes if quantized and e.as_wanted and not e.node.narrow)

    def counts(self, profile: int = 0) -> dict[str, dict[str, int]]:
        """Nodes by kind and by what they ran in: `{"gemm": {"fp8": 210, "fp16": 1}, ...}`."""
        table: dict[str, Counter[str]] = {kind: Counter() for kind in TITLES}
        for entry in self.nodes:
            if entry.profile == profile:
                table[entry.node.kind][entry.ran] += 1
        return {kind: dict(counter.most_common()) for kind, counter in table.items()}

    def to_json(self) -> dict[str, Any]:
        """Counts by profile; every node that did not run as it was meant to, or was left wide."""
        profiles = sorted({entry.profile for entry in self.nodes})
        return {
            "complete": self.complete,
            "counts": [self.counts(profile) for profile in profiles],
            "missed": [
                {
                    "node": entry.node.name,
                    "profile": entry.profile,
                    "wanted": entry.node.wanted,
                    "ran": entry.ran,
                    "reason": entry.reason,
                }
                for entry in self.missed
            ],
            "left": [
                {
                    "node": entry.node.name,
                    "kind": entry.node.kind,
                    "profile": entry.profile,
                    "ran": entry.ran,
                    "reason": entry.node.left,
                }
                for entry in self.left
            ],
            "quantize_alone": dict(self.quantize_alone),
            "dequantize_alone": dict(self.dequantize_alone),
        }

    def summary(self) -> list[str]:
        """Lines for people, one a profile, then what was left alone and the weights' bytes."""
        profiles = sorted({entry.profile for entry in self.nodes}) or [0]
        lines = []
        for profile in profiles:
            counts = self.counts(profile)
            line = "; ".join(f"{title} {_listed(counts[kind])}" for kind, title in TITLES.items())
            lines.append(f"profile {profile}: {line}" if len(profiles) > 1 else line)
        lines.append(
            f"left alone: {len(self.quantize_alone)} quantize, "
            f"{len(self.dequantize_alone)} dequantize kernels"
        )
        reasons = Counter([*self.quantize_alone.values(), *self.dequantize_alone.values()])
        lines += [f"  {count}: {reason}" for reason, count in reasons.most_common()]
        sizes = ", ".join(f"{dtype} {size:,}" for dtype, size in self.weight_bytes.items())
        lines.append(f"weights in bytes: {sizes or '-'}")
        return lines


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {dtype}" for dtype, count in counts.items()) or "-"
