"""Outputs of compared models as Polygraphy's RunResults, for `polygraphy run --load-outputs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError
from onnxq.evaluate.metrics import is_float
from onnxq.files import replacing

Array = NDArray[Any]
SaveOutputs = Callable[[Mapping[str, Mapping[str, Array]]], None]  # label -> output -> array

# As Polygraphy names the files of a folder, so that it reads them back in order.
_INDEX_WIDTH = 10


@contextmanager
def saving_outputs(path: Path | None) -> Iterator[SaveOutputs | None]:
    """Yield a function to call with each sample's outputs of all models; None if `path` is None.

    As in Polygraphy: a path with a suffix becomes one file, written at the end (it holds all
    outputs in memory until then); a path without one becomes a folder, a file a sample.

    Raises:
        OnnxqError: the folder is not empty, or nothing can be written there.
    """
    if path is None:
        yield None
    elif path.suffix:
        gathered: list[Any] = []
        # _plain copies: a runner may reuse its buffers at the next sample.
        yield lambda found: gathered.append(
            {label: _plain(outputs) for label, outputs in found.items()}
        )
        _write(path, gathered)
    else:
        yield _into_folder(path)


def _into_folder(folder: Path) -> SaveOutputs:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    except OSError as error:
        raise OnnxqError(f"cannot write into {folder}: {error.strerror or error}") from error
    if not empty:
        raise OnnxqError(
            f"{folder} is not empty", "name a new folder, or a file such as outputs.json"
        )
    count = 0

    def save(found: Mapping[str, Mapping[str, Array]]) -> None:
        nonlocal count
        one = {label: _plain(outputs) for label, outputs in found.items()}
        _write(folder / f"{count:0{_INDEX_WIDTH}d}.json", [one])
        count += 1

    return save


def _write(path: Path, samples: list[dict[str, dict[str, Array]]]) -> None:
    from polygraphy.comparator import RunResults

    from onnxq.evaluate.runners import quiet

    results = RunResults()
    for label in samples[0] if samples else ():
        results.add([outputs[label] for outputs in samples], runtime=0.0, runner_name=label)
    with quiet(), replacing(path) as (temporary,):
        results.save(str(temporary))


def _plain(outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The .npy inside Polygraphy's JSON lacks ml_dtypes: FP32 or INT8 holds them exactly."""
    wider = {
        name: np.dtype(np.float32 if is_float(array) else np.int8)
        for name, array in outputs.items()
        if array.dtype.kind == "V"
    }
    # np.array: a new, plain array, which a memory map of the spool is not.
    return {name: np.array(array, wider.get(name)) for name, array in outputs.items()}
