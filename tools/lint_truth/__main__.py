"""Precision and recall of lint against the compiler.

    python -m tools.lint_truth                       every form, and its mutants
    python -m tools.lint_truth --real                real models by our recipes, and peers' files
    python -m tools.lint_truth --files a.onnx ...    files of your own
    ... --mutants 300 --seed 2000                    and so many mutants of these

Truth is what tensorrt-rtx makes of each graph for its target: refused (parser or builder fails), or
a quantized product that does not run in the format it is meant to (`engine/coverage.py`). Exits 1
where precision or recall of either is below 0.95. A rule that was mended after a batch of mutants
was seen is to be judged by another seed.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from tools.lint_truth.corpus import ours, peers
from tools.lint_truth.forms import CASES
from tools.lint_truth.mutate import mutated
from tools.lint_truth.score import Graph, Scores, misses, score

BAR = 0.95
LARGEST = 12_000_000
"""Bytes of a file that is mutated: a larger one takes the compiler too long."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", action="store_true", help="what `make models` and peers made")
    parser.add_argument("--files", nargs="*", type=Path, default=[], help="models to judge")
    parser.add_argument("--target", default="sm89", help="of the files")
    parser.add_argument("--mutants", type=int, default=0, help="how many, of the small ones")
    parser.add_argument("--seed", type=int, default=0, help="of the first mutant")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        groups = _groups(given, Path(folder))
        if given.mutants:
            bases = [graph for graphs in groups.values() for graph in graphs]
            last = given.seed + given.mutants - 1
            groups[f"mutants {given.seed} to {last}"] = _mutants(
                bases, given.seed, given.mutants, Path(folder)
            )
        total = Scores()
        for name, graphs in groups.items():
            found = score(graphs)
            _print(name, found)
            for line in misses(found):
                print(f"    {line}", flush=True)
            total.add(found)
    _print("all", total)
    if not total.reach(BAR):
        sys.exit(1)


def _print(name: str, scores: Scores) -> None:
    print(name, *(f"  {line}" for line in scores.lines()), sep="\n", flush=True)


def _groups(given: argparse.Namespace, folder: Path) -> dict[str, list[Graph]]:
    groups: dict[str, list[Graph]] = {}
    if given.real:
        groups |= {"ours": list(ours(folder)), "peers": list(peers())}
    if given.files:
        groups["files"] = [Graph(p.stem, p, given.target, _profile(p)) for p in given.files]
    return groups or {"forms": _forms(folder)}


def _forms(folder: Path) -> list[Graph]:
    graphs = []
    for index, (name, case) in enumerate(CASES.items()):
        path = folder / f"{index}.onnx"
        onnx.save(case.model, path)
        graphs.append(Graph(name, path, case.target, case.shapes))
    return graphs


def _mutants(graphs: Sequence[Graph], first: int, count: int, folder: Path) -> list[Graph]:
    bases = [g for g in graphs if g.path.stat().st_size <= LARGEST]
    found = []
    for seed in range(first, first + count):
        choice = random.Random(seed)
        base = choice.choice(bases)
        mutant = mutated(onnx.load(base.path), seed, choice.choice([1, 1, 2, 3]))
        path = folder / f"mutant{seed}.onnx"
        onnx.save(mutant.model, path)
        name = f"{seed} {base.name} {mutant.done}"
        found.append(Graph(name, path, base.target, base.shapes))
    return found


def _profile(path: Path) -> tuple[str, ...]:
    """A profile for open dimensions: batches of 1 to 4, everything else 32 to 64."""
    graph = onnx.load(path, load_external_data=False).graph
    known = {t.name for t in graph.initializer}
    texts = []
    for value in graph.input:
        dims = value.type.tensor_type.shape.dim
        if value.name in known or all(d.HasField("dim_value") for d in dims):
            continue
        shapes = [
            "x".join(
                str(d.dim_value if d.HasField("dim_value") else (batch if i == 0 else size))
                for i, d in enumerate(dims)
            )
            for batch, size in ((1, 32), (2, 32), (4, 64))
        ]
        texts.append(f"{value.name}:{','.join(shapes)}")
    return tuple(texts)


if __name__ == "__main__":
    main()
