"""What a rule is and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any

from onnxq.graph.ir import Node

if TYPE_CHECKING:
    from onnxq.linting.subject import Subject


class Severity(str, Enum):
    """How bad a finding is, worst first.

    REFUSED: the parser or the builder fails. SLOW: it compiles, but a quantized product does not
    run as the low-precision kernel it is meant to be. NUMBERS: it compiles and runs in 8 bits, but
    computes something else than ONNX says, or loses what quantization should have kept.
    PORTABILITY: TensorRT for RTX compiles it; ONNX Runtime, the ONNX standard or TensorRT's
    documentation does not agree.
    """

    REFUSED = "refused"
    SLOW = "not in low precision"
    NUMBERS = "wrong numbers"
    PORTABILITY = "portability"


@dataclass(frozen=True)
class Found:
    """What a check yields: where, and why.

    Attributes:
        node: the node, or the name of a tensor, an input or the model.
        severity: instead of the rule's, where it depends on the graph.
        curable: whether this case is one that `--fix` cures, if it cures the rule's.
    """

    node: Node | str
    reason: str
    severity: Severity | None = None
    curable: bool = True


Check = Callable[["Subject"], Iterator[Found]]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        id: its stable name, as `--ignore` and the JSON have it.
        cure: what to do about it.
        fixable: whether `--fix` may cure it.
        tensorrt: whether it is about TensorRT; else it holds for ONNX Runtime as a target too.
    """

    id: str
    severity: Severity
    check: Check
    cure: str
    fixable: bool = False
    tensorrt: bool = True


@dataclass(frozen=True)
class Finding:
    """One rule, one place.

    Attributes:
        node: name of the node (or of its operator and output, where it has none), or of a tensor.
        operator: the node's operator; '' for what is no node.
    """

    rule: str
    severity: Severity
    node: str
    operator: str
    reason: str
    cure: str
    fixable: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "rule": self.rule,
            "severity": self.severity.value,
            "node": self.node,
            "operator": self.operator,
            "reason": self.reason,
            "cure": self.cure,
            "fixable": self.fixable,
        }
