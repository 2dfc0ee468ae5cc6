"""Samples side by side as a PNG, with nothing but zlib."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.files import replacing

Array = NDArray[Any]
Pixels = NDArray[np.uint8]

_COLUMNS = 10
_GAP = 2  # pixels between pictures, before they are enlarged
_SMALLEST = 64  # pixels of a side that an eye can judge
_PAPER = 255


def side_by_side(originals: Array, candidates: Array, path: Path) -> None:
    """Write bands of two rows: originals above, candidates below.

    Args:
        originals, candidates: [samples, channels, height, width]; one channel is grey, the first
            three of more are red, green and blue. Both are scaled by the originals' extremes.
    """
    low, high = float(originals.min()), float(originals.max())
    pictures = [_pixels(batch, low, high) for batch in (originals, candidates)]
    bands, columns = [], min(_COLUMNS, len(originals))
    for start in range(0, len(originals), columns):
        for batch in pictures:
            bands.append(_row(batch[start : start + columns], columns))
        bands.append(np.full((_GAP, *bands[-1].shape[1:]), _PAPER, np.uint8))
    whole = np.concatenate(bands[:-1])
    times = max(1, -(-_SMALLEST // max(originals.shape[2:])))
    write_png(path, whole.repeat(times, axis=0).repeat(times, axis=1))


def refuse_picture(path: Path, size: tuple[int, ...]) -> None:
    """Refuse, before anything is run, what could not be written in the end.

    Raises:
        OnnxqError: samples of `size` are no pictures, or there is no folder for one.
    """
    if len(size) != 3:
        raise OnnxqError(f"samples of {'x'.join(map(str, size))} are no pictures", "no --picture")
    if not path.parent.is_dir():
        raise OnnxqError(f"cannot write {path}: there is no folder {path.parent}")


def write_png(path: Path, pixels: Pixels) -> None:
    """Write pixels [height, width, 1 or 3] (PNG specification, W3C 2003, section 11)."""
    height, width, channels = pixels.shape
    lines = np.concatenate(
        [np.zeros((height, 1), np.uint8), pixels.reshape(height, width * channels)], axis=1
    )  # each line begins with its filter: none
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    with replacing(path) as (temporary,):
        temporary.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*part) for part in parts))


def _chunk(kind: bytes, content: bytes) -> bytes:
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def _pixels(samples: Array, low: float, high: float) -> Pixels:
    """[samples, height, width, 1 or 3] in 0 to 255."""
    shown = samples[:, : 3 if samples.shape[1] >= 3 else 1].astype(np.float64)
    scaled = np.nan_to_num((shown - low) / max(high - low, 1e-30)).clip(0, 1)
    return np.asarray((255 * scaled).round(), np.uint8).transpose(0, 2, 3, 1)


def _row(pictures: Pixels, columns: int) -> Pixels:
    """Pictures beside each other, a row as wide as `columns` of them, with paper between."""
    count, height, width, channels = pictures.shape
    row = np.full((height + _GAP, columns * (width + _GAP), channels), _PAPER, np.uint8)
    for index in range(count):
        left = index * (width + _GAP)
        row[:height, left : left + width] = pictures[index]
    return row
