"""Run the rules over a model."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from onnxq.errors import OnnxqError
from onnxq.gpus import Target
from onnxq.graph.model import Model
from onnxq.graph.query import label
from onnxq.graph.survey import body_models, survey
from onnxq.linting.finding import Finding, Found, Rule, Severity
from onnxq.linting.rules import BY_ID, RULES
from onnxq.linting.subject import Subject

_ORDER = {severity: index for index, severity in enumerate(Severity)}


@dataclass(frozen=True)
class Lint:
    """What the rules found, worst first, and what they had to say besides.

    Attributes:
        products: how many products the main graph has.
        quantized: how many of them have an operand that comes from codes.
    """

    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = field(default=())
    products: int = 0
    quantized: int = 0

    def of(self, *severities: Severity) -> tuple[Finding, ...]:
        """The findings of some severities."""
        return tuple(f for f in self.findings if f.severity in severities)


def lint(model: Model, target: Target, ignore: Collection[str] = ()) -> Lint:
    """Look a model over; its weights are not read, its scales are.

    The model's Constant nodes become initializers; nothing else of it changes.

    Args:
        ignore: ids of rules, or severities, to leave out.

    Raises:
        OnnxqError: `ignore` names what is neither a rule nor a severity.
    """
    _check_ignored(ignore)
    model, notes = survey(model)
    subject = Subject(model, target)
    found = [*_findings(subject, "", notes)]
    kept = [f for f in found if f.rule not in ignore and f.severity.value not in ignore]
    kept.sort(key=lambda f: _ORDER[f.severity])
    quantized = sum(any(o.source for o in product.operands) for product in subject.products)
    return Lint(tuple(kept), tuple(dict.fromkeys(notes)), len(subject.products), quantized)


def _findings(subject: Subject, where: str, notes: list[str]) -> Iterator[Finding]:
    for rule in RULES:
        if rule.tensorrt and not subject.target.tensorrt:
            continue
        for found in rule.check(subject):
            yield _finding(rule, found, where)
    notes += subject.notes
    for node, body in body_models(subject.model):
        inner, said = survey(body)
        notes += said
        yield from _findings(Subject(inner, subject.target), f" (in a body of {node})", notes)


def _finding(rule: Rule, found: Found, where: str) -> Finding:
    named = isinstance(found.node, str)
    return Finding(
        rule.id,
        found.severity or rule.severity,
        found.node if isinstance(found.node, str) else label(found.node),
        "" if named else str(found.node.op),  # type: ignore[union-attr]
        found.reason + where,
        rule.cure,
        rule.fixable and found.curable and not where,
    )


def _check_ignored(ignore: Collection[str]) -> None:
    known = {*BY_ID, *(s.value for s in Severity)}
    for name in ignore:
        if name not in known:
            raise OnnxqError(
                f"--ignore names {name!r}, which is no rule",
                f"rules: {', '.join(BY_ID)}; severities: {', '.join(s.value for s in Severity)}",
            )
