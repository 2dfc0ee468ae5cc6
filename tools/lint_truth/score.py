"""Precision and recall of lint's first two severities against what the compiler did."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnxq.errors import OnnxqError
from onnxq.gpus import target as find_target
from onnxq.graph.model import Model
from onnxq.linting.finding import Finding, Severity
from onnxq.linting.run import Lint, lint
from tools.lint_truth.truth import Truth, judge


@dataclass
class Score:
    """Counts of one severity; `misses` says which were wrong."""

    right: int = 0
    false: int = 0
    missed: int = 0
    misses: list[str] = field(default_factory=list)

    @property
    def precision(self) -> float:
        return self.right / (self.right + self.false) if self.right + self.false else 1.0

    @property
    def recall(self) -> float:
        return self.right / (self.right + self.missed) if self.right + self.missed else 1.0

    def add(self, other: Score) -> None:
        self.right += other.right
        self.false += other.false
        self.missed += other.missed
        self.misses += other.misses

    def line(self, name: str) -> str:
        return (
            f"{name:36s} precision {self.precision:.3f} ({self.false} false), "
            f"recall {self.recall:.3f} ({self.missed} missed), {self.right} right"
        )


@dataclass(frozen=True)
class Graph:
    """One graph to be judged."""

    name: str
    path: Path
    target: str = "sm89"
    shapes: Sequence[str] = ()


@dataclass
class Scores:
    """`refused` counts graphs; `slow` quantized products, of graphs that compiled; `graphs` the
    graphs with such products; `raw` products whose bare sums are stored in FP16."""

    refused: Score = field(default_factory=Score)
    slow: Score = field(default_factory=Score)
    graphs: Score = field(default_factory=Score)
    raw: Score = field(default_factory=Score)
    count: int = 0
    products: int = 0

    def add(self, other: Scores) -> None:
        """Count another group's graphs too."""
        for name in ("refused", "slow", "graphs", "raw"):
            getattr(self, name).add(getattr(other, name))
        self.count += other.count
        self.products += other.products

    def reach(self, bar: float) -> bool:
        """Whether both severities have that precision and recall, by graphs and by products."""
        parts = (self.refused, self.slow, self.graphs)
        return all(min(part.precision, part.recall) >= bar for part in parts)

    def lines(self) -> list[str]:
        return [
            f"{self.count} graphs; {self.products} quantized products in those that compile",
            self.refused.line("refused (graphs)"),
            self.slow.line("not in low precision (products)"),
            self.graphs.line("not in low precision (graphs)"),
            self.raw.line("bare sums in FP16 (products)"),
        ]


def score(graphs: Sequence[Graph]) -> Scores:
    """Compile and lint every graph."""
    truths = judge([(g.path, g.target, g.shapes) for g in graphs])
    scores = Scores()
    for graph, truth in zip(graphs, truths, strict=True):
        try:
            found = lint(Model.load(graph.path), find_target(graph.target))
        except OnnxqError as error:  # what lint does not even load, it refuses
            bad = Finding("load", Severity.REFUSED, graph.name, "", str(error), "", False)
            found = Lint((bad,))
        _count(scores, graph.name, found, truth)
    return scores


def _count(scores: Scores, name: str, found: Lint, truth: Truth) -> None:
    scores.count += 1
    refused = found.of(Severity.REFUSED)
    said = "; ".join(sorted({f.rule for f in refused}))
    _one(scores.refused, bool(refused), bool(truth.refused), f"{name}: {said or truth.refused}")
    if truth.refused or not truth.readable:
        return
    scores.products += truth.products
    slow = found.of(Severity.SLOW)
    items = {node: names for names in truth.slow for node in names}
    told = {items.get(f.node, (f.node,)): f for f in slow}
    for names in told.keys() | truth.slow.keys():
        what = told[names].rule if names in told else truth.slow[names]
        _one(scores.slow, names in told, names in truth.slow, f"{name}: {names[0]}: {what}")
    _one(scores.graphs, bool(told), bool(truth.slow), name)
    behind = ("raw-sums", "merged-scales", "blocked-weight")
    raw = {f.node for f in found.of(Severity.NUMBERS) if f.rule in behind}
    for node in raw | truth.raw:
        _one(scores.raw, node in raw, node in truth.raw, f"{name}: {node}")


def _one(score: Score, predicted: bool, true: bool, what: str) -> None:
    if predicted and true:
        score.right += 1
    elif predicted:
        score.false += 1
        score.misses.append(f"false: {what}")
    elif true:
        score.missed += 1
        score.misses.append(f"missed: {what}")


def misses(scores: Scores) -> Iterable[str]:
    """Every wrong verdict, by severity."""
    for title in ("refused", "slow", "raw"):
        for text in getattr(scores, title).misses:
            yield f"{title}: {text}"
