"""Rules: what a user has done with single layers, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from onnxq.errors import OnnxqError

Choice = Literal["quantize", "leave"]

CHOICES = ("quantize", "leave")

ROLES = (
    *("conv_in", "conv_out", "shortcut", "conv", "embedding", "qkv", "feed_forward"),
    *("proj_out", "linear", "attention"),
)
"""What a layer of a diffusion UNet can be for: `onnxq.unet` tells which it is."""


@dataclass(frozen=True)
class Rule:
    """Overrides the placement of the nodes it matches; of several rules the last one wins.

    Every pattern given must match. A pattern is the exact text, or a glob where it holds `*` or
    `?`. A rule that matches no node is an error, unless it goes by role: not every UNet has all.

    Attributes:
        action: `leave` or `quantize`.
        node: the node's name.
        weight: the name of its weight's initializer.
        module: the module path in the node's metadata.
        op: the operator type.
        role: what the layer is for in a diffusion UNet (see `onnxq.unet`).
        below: counts only where the recipe's level is lower; 0: always.
    """

    action: Choice
    node: str = ""
    weight: str = ""
    module: str = ""
    op: str = ""
    role: str = ""
    below: float = 0.0

    def __post_init__(self) -> None:
        if not (self.node or self.weight or self.module or self.op or self.role):
            raise OnnxqError(
                f"the rule '{self.action}' has no pattern, and would match everything",
                "give it node=, weight=, module=, op= or role= with a name or a glob such as *",
            )
        if self.role:
            check_choice(f"the rule '{self.action}'", "role", self.role, ROLES)

    def as_dict(self) -> dict[str, Any]:
        """The action and the patterns given."""
        return {name: value for name, value in asdict(self).items() if value}

    def __str__(self) -> str:
        patterns = [
            f"{k}={v:g}" if k == "below" else f"{k}={v}"
            for k, v in self.as_dict().items()
            if k != "action"
        ]
        return " ".join((self.action, *patterns))


def rule_from(content: Any, where: str) -> Rule:
    """A rule from its text or its fields.

    Raises:
        OnnxqError: it cannot be read; the message starts with `where`.
    """
    if isinstance(content, str):
        return parse_rule(content)
    allowed = [f.name for f in fields(Rule)]
    if not isinstance(content, Mapping) or not set(content) <= set(allowed):
        raise OnnxqError(
            f"{where}: a rule cannot be read: {content!r}",
            f"a rule has an action and patterns: {', '.join(allowed[1:])}",
        )
    check_choice(where, "action", content.get("action"), CHOICES)
    level = content.get("below", 0.0)
    if not all(isinstance(v, str) for k, v in content.items() if k != "below"):
        raise OnnxqError(f"{where}: a rule's patterns are text: {content!r}", "quote them")
    try:
        return Rule(**{**content, "below": float(level)})
    except (TypeError, ValueError):
        raise OnnxqError(f"{where}: below={level!r} is no level", "give a number") from None


def parse_rule(text: str) -> Rule:
    """Read `leave module=model.layers.0.*` or `quantize op=Gemm node=/fc1`."""
    action, _, rest = text.strip().partition(" ")
    content = {"action": action}
    for pattern in re.split(r"\s+(?=\w+=)", rest.strip()):
        key, _, value = pattern.partition("=")
        if key in content:
            raise OnnxqError(f"the rule {text!r} has two patterns for {key}", "write two rules")
        content[key] = value
    return rule_from(content, f"the rule {text!r}")


def check_choice(where: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not among those allowed."""
    if value not in allowed:
        raise OnnxqError(f"{where}: {name} is {value!r}", f"choose one of: {', '.join(allowed)}")
