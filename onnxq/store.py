"""Arrays that wait outside of memory until a model is written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxq.errors import OnnxqError

Array = NDArray[Any]


class Store:
    """Arrays in a nameless temporary file, each read back when it is asked for."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this does)

    def put(self, values: Array) -> Callable[[], Array]:
        shape, dtype = values.shape, values.dtype
        try:
            with self._lock:
                start = self._file.seek(0, 2)
                self._file.write(values.tobytes())
                self._file.flush()
        except OSError as error:
            raise OnnxqError(
                f"cannot keep rounded weights in {tempfile.gettempdir()}: {error}",
                "set TMPDIR to a folder with more space",
            ) from error

        def get() -> Array:
            size = int(np.prod(shape)) * dtype.itemsize
            read = os.pread(self._file.fileno(), size, start)  # from any thread
            return np.frombuffer(read, dtype).reshape(shape)

        return get
