"""PP-OCRv4's text recognizer, a trained CNN, with rendered lines of text to calibrate and test it.

    python -m models.ppocr [--out DIR] [--force]
    python -m models.ppocr cer MODEL.onnx

The first writes into models/out/ppocr_rec/

    model.onnx      as the rapidocr-onnxruntime wheel ships it: opset 12, every weight in a Constant
                    node; x float32 [batch, 3, 48, width] -> probabilities [batch, width / 8, 6625]
    characters.txt  the characters of classes 1 to 6623, one a line (0 is CTC's blank, 6624 a space)
    calib.npz       x [32, 3, 48, 480]: lines of wiki_calib
    heldout.npz     x [60, 3, 48, 480]: lines of wiki_eval, and what they say in heldout.txt

The second reads the 60 held-out lines with a model and prints the character error rate: edits
(insert, delete, replace) for each character of the truth, spaces at either end aside. 1.98 % for
the model as shipped, most of it spaces between words.

Lines are 12 to 30 printable ASCII characters, set in Pillow's own font, dark on light, in sizes and
shades drawn from a fixed seed. As in PaddleOCR, an image is scaled to 48 rows, mapped to -1..1 and
filled up with zeros on the right.

Needs Pillow; no torch. License: Apache-2.0 (PaddleOCR, and the wheel).
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from models import packages, wiki
from models.files import OUT, finished, shown, size, staged

Images = NDArray[np.float32]

FOLDER = OUT / "ppocr_rec"
HEIGHT, WIDTH = 48, 480
CALIBRATION, HELDOUT = 32, 60

_MODEL = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
_SHORTEST, _LONGEST = 12, 30
_READABLE = set(string.ascii_letters + string.digits + string.punctuation + " ")


def lines(text: str, count: int, seed: int) -> list[str]:
    """`count` pieces of the text, each of whole words and of 12 to 30 ASCII characters."""
    rng = np.random.default_rng(seed)
    paragraphs = [paragraph for paragraph in text.split("\n\n") if len(paragraph) > 4 * _LONGEST]
    found: list[str] = []
    while len(found) < count:
        words = paragraphs[rng.integers(len(paragraphs))].split()
        first, limit = rng.integers(len(words)), rng.integers(_SHORTEST, _LONGEST + 1)
        line = ""
        for word in words[first:]:
            if len(line) + 1 + len(word) > limit:
                break
            line = f"{line} {word}".strip()
        if len(line) >= _SHORTEST and set(line) <= _READABLE and line not in found:
            found.append(line)
    return found


def render(line: str, rng: np.random.Generator) -> Image.Image:
    """The line in a random size and shade, with a margin around it and faint noise over it."""
    font = ImageFont.load_default(size=int(rng.integers(14, 33)))
    left, top, right, bottom = font.getbbox(line)
    margin = int(rng.integers(3, 9))
    ink, paper = int(rng.integers(0, 80)), int(rng.integers(190, 256))
    extent = (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin)
    image = Image.new("L", extent, paper)
    ImageDraw.Draw(image).text((margin - left, margin - top), line, font=font, fill=ink)
    noisy = np.asarray(image) + rng.normal(0, 4, image.size[::-1])
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def preprocess(image: Image.Image) -> Images:
    """[3, 48, 480]: 48 rows, -1..1, zeros to the right of the image."""
    width = min(WIDTH, round(image.width * HEIGHT / image.height))
    scaled = image.convert("RGB").resize((width, HEIGHT), Image.Resampling.BILINEAR)
    made = np.zeros((3, HEIGHT, WIDTH), np.float32)
    made[:, :, :width] = np.asarray(scaled, np.float32).transpose(2, 0, 1) / 127.5 - 1
    return made


def dataset(source: Path, count: int, seed: int) -> tuple[list[str], Images]:
    """(what the images say, images [count, 3, 48, 480])"""
    rng = np.random.default_rng([seed, 1])
    truth = lines(wiki.text(source), count, seed)
    return truth, np.stack([preprocess(render(line, rng)) for line in truth])


def decode(probabilities: NDArray[np.float32], characters: list[str]) -> str:
    """CTC's best path [time, classes]: repeats merged, then blanks removed (Graves et al. 2006)."""
    classes = ["", *characters, " "]
    best = probabilities.argmax(axis=-1)
    changed = np.append(True, best[1:] != best[:-1])
    return "".join(classes[index] for index in best[changed])


def edits(read: str, truth: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements."""
    row = list(range(len(truth) + 1))
    for i, left in enumerate(read, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(truth, 1):
            best = min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
            diagonal, row[j] = row[j], best
    return row[-1]


def character_error_rate(run: Callable[[Images], Images], folder: Path = FOLDER) -> float:
    """Edits over characters, on the held-out lines in `folder`.

    `run` maps one image [1, 3, 48, 480] to probabilities [1, steps, characters].
    """
    characters = (folder / "characters.txt").read_text("utf-8").split("\n")
    truth = (folder / "heldout.txt").read_text("utf-8").split("\n")
    wrong = 0
    for image, line in zip(np.load(folder / "heldout.npz")["x"], truth, strict=True):
        wrong += edits(decode(run(image[None])[0], characters).strip(), line)
    return wrong / sum(map(len, truth))


def character_error_rate_of(model: Path, folder: Path = FOLDER) -> float:
    """`character_error_rate` of an ONNX model through onnxruntime, one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return character_error_rate(lambda image: session.run(None, {"x": image})[0], folder)


def build(folder: Path = FOLDER) -> None:
    """Write the model, its characters and the images into `folder`."""
    source = packages.extract(packages.RAPIDOCR, _MODEL)
    metadata = {item.key: item.value for item in onnx.load(source).metadata_props}
    with staged(folder) as stage:
        (stage / "model.onnx").write_bytes(source.read_bytes())
        (stage / "characters.txt").write_text(metadata["character"], encoding="utf-8")
        for name, text, count in (
            ("calib", wiki.CALIB, CALIBRATION),
            ("heldout", wiki.EVAL, HELDOUT),
        ):
            truth, images = dataset(text, count, seed=0)
            np.savez_compressed(stage / f"{name}.npz", x=images)
            (stage / f"{name}.txt").write_text("\n".join(truth), encoding="utf-8")
            print(f"{shown(folder / name)}.npz: {count} lines, {size(stage / f'{name}.npz')}")
        print(f"{shown(folder / 'model.onnx')}: {size(stage / 'model.onnx')}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m models.ppocr", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR")
    parser.add_argument("--force", action="store_true", help="rebuild what is there")
    verbs = parser.add_subparsers(dest="verb")
    verbs.add_parser("cer", help="print a model's character error rate").add_argument(
        "model", type=Path
    )
    options = parser.parse_args()
    if options.verb == "cer":
        rate = character_error_rate_of(options.model, options.out)
        print(f"character error rate {rate:.2%} on {HELDOUT} lines")
        return
    targets = [options.out / name for name in ("model.onnx", "calib.npz", "heldout.npz")]
    if not finished(*targets, force=options.force):
        build(options.out)


if __name__ == "__main__":
    packages.script(main)
