"""Precision and recall of lint against the compiler.

    python -m tools.lint_truth                       every form, and its mutants
    python -m tools.lint_truth --files a.onnx ...    files of your own, and their mutants
    python -m tools.lint_truth --mutants 300 --seed 2000

Truth is what tensorrt-rtx makes of each graph for its target: refused (parser or builder fails), or
a quantized product that does not run in the format it is meant to (`engine/coverage.py`).
"""

from __future__ import annotations

import argparse
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path

import onnx

from tools.lint_truth.forms import CASES
from tools.lint_truth.mutate import Mutant
from tools.lint_truth.score import Graph, misses, score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", nargs="*", type=Path, default=[], help="models to judge")
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--mutants", type=int, default=0, help="how many of the files, or forms")
    parser.add_argument("--seed", type=int, default=0, help="of the first mutant")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        graphs = _originals(given.files, given.target, Path(folder))
        print("originals")
        _judge(graphs)
        if given.mutants:
            print(f"mutants {given.seed} to {given.seed + given.mutants - 1}")
            _judge(_mutants(graphs, given.seed, given.mutants, Path(folder)))


def _judge(graphs: Sequence[Graph]) -> None:
    scores = score(graphs)
    print(*(f"  {line}" for line in scores.lines()), sep="\n")
    print(*(f"    {line}" for line in misses(scores)), sep="\n")


def _originals(files: Sequence[Path], target: str, folder: Path) -> list[Graph]:
    if files:
        return [Graph(p.stem, p, target, _profile(p)) for p in files]
    graphs = []
    for index, (name, case) in enumerate(CASES.items()):
        path = folder / f"{index}.onnx"
        onnx.save(case.model, path)
        graphs.append(Graph(name, path, case.target, case.shapes))
    return graphs


def _mutants(graphs: Sequence[Graph], first: int, count: int, folder: Path) -> list[Graph]:
    found = []
    for seed in range(first, first + count):
        choice = random.Random(seed)
        base = choice.choice(graphs)
        mutant = Mutant(onnx.load(base.path), seed)
        mutant.mutate(choice.choice([1, 1, 2, 3]))
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
