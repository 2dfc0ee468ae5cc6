"""Whether the disk holds what a command of the Makefile writes, asked before it writes anything.

    python -m tools.room demo|models|test        # exit code 2 and one line where it does not

What is there already needs no room. Runs before any environment is made: only Python itself.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MB = 10**6

# What is written once and stays: the file that shows that it is there, and the MB it takes.
DEMO = {
    ".venv-demo/ready": 700,
    "models/out/smollm2-fp32/model.onnx": 740,  # and the package that it comes from
    "models/out/wiki/wiki_eval.txt": 40,
}
MODELS = {
    ".venv-test/ready": 900,
    ".venv-export/ready": 1450,
    "models/out/smollm2-fp32/model.onnx": 740,
    "models/out/wiki/wiki_eval.txt": 40,
    "models/out/smollm2-fp16/model.onnx": 280,
    "models/out/ppocr_rec/model.onnx": 50,
    "models/out/minilm/model.onnx": 280,
    "models/out/minilm-legacy/model.onnx": 100,
    "models/out/smollm2-torch/model.onnx": 550,
    "models/out/smollm2-torch-fp16/model.onnx": 280,
    "models/out/smollm2-torch-decode/model.onnx": 550,
    "models/out/sdxl-unet-tiny-fp16/model.onnx": 25,
    "models/out/sdxl-unet-tiny-fp16-dynamic/model.onnx": 25,
    "models/out/sdxl-unet-full-fp16/model.onnx": 5200,
}
KEPT = {"demo": DEMO, "models": MODELS, "test": MODELS}
# What each run writes anew, at its largest: beside the models, and in the system's temporary folder
# (where pip unpacks what it installs).
RESULTS = {"demo": 400, "models": 0, "test": 0}
TEMPORARY = {"demo": 500, "models": 500, "test": 3300}


def lacking(command: str, root: Path = ROOT, temporary: Path | None = None) -> str | None:
    """One line on the first disk that is too small for `make COMMAND`, if one is."""
    for folder, need in needed(command, root, temporary or Path(tempfile.gettempdir())).items():
        free = shutil.disk_usage(folder).free
        if free < need:
            return (
                f"make {command} needs about {need / 1e9:.1f} GB free at {folder}, "
                f"which has {free / 1e9:.1f} GB"
            )
    return None


def needed(command: str, root: Path, temporary: Path) -> Mapping[Path, int]:
    """Bytes for each disk, named by the first folder that lies on it."""
    places: dict[int, Path] = {}
    found: Counter[Path] = Counter()

    def add(path: Path, size: int) -> None:
        while not path.is_dir():
            path = path.parent
        found[places.setdefault(path.stat().st_dev, path)] += size * MB

    add(root, 0)
    for name, size in KEPT[command].items():
        if not (root / name).exists():
            add(root / name, size)
    add(root / "models/out", RESULTS[command])
    add(temporary, TEMPORARY[command])
    return found


def main() -> None:
    (command,) = sys.argv[1:]
    if said := lacking(command):
        sys.stderr.write(f"error: {said}\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
