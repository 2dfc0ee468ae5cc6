"""Weights that stay on disk until they are written.

The values behind a `gs.Constant`. `StoredValues` are bytes of some file, `DerivedValues` are
computed from other values at the moment they are written, one tensor at a time; `InlineValues` and
`SparseValues` are small or rare enough to stay in the graph.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path, PurePosixPath

import numpy as np
import onnx
from onnx_graphsurgeon.ir.tensor import Constant, LazyValues

from onnxq.errors import OnnxqError
from onnxq.graph.dtypes import (
    Array,
    from_bytes,
    graph_dtype,
    numpy_dtype,
    onnx_dtype,
    payload_bytes,
    to_bytes,
)
from onnxq.products import Axes, Factors

__all__ = [
    "Array",
    "Constant",
    "DerivedValues",
    "Extent",
    "InlineValues",
    "SparseValues",
    "StoredValues",
    "Values",
    "array",
    "before_cast",
    "constant_type",
    "numpy_dtype",
    "onnx_dtype",
    "original",
    "payload_bytes",
    "stored",
]

_PIECE = 8 << 20
_DENSE_LIMIT = 1 << 30  # bytes; a few bytes of a file could claim any size


@dataclass(frozen=True)
class Extent:
    """A run of bytes in a file.

    Attributes:
        modified: the file's modification time in nanoseconds when it was found; 0: do not ask.
    """

    path: Path
    offset: int
    length: int
    modified: int = 0

    def pieces(self) -> Iterator[bytes]:
        """The bytes, in pieces of at most 8 MiB, through read(): mapped pages would count as RSS.

        Raises:
            OnnxqError: the file cannot be read, or is not what it was when the model was loaded.
        """
        with self._stream() as stream:
            left = self.length
            while left:
                piece = stream.read(min(left, _PIECE))
                if not piece:
                    raise self._changed()
                left -= len(piece)
                yield piece

    def read(self) -> Array:
        """All of it, as an array of bytes; nothing is kept mapped."""
        raw = np.empty(self.length, np.uint8)
        left = memoryview(raw.data)
        with self._stream() as stream:
            while len(left):
                count = stream.readinto(left[:_PIECE])
                if not count:
                    raise self._changed()
                left = left[count:]
        return raw

    @contextlib.contextmanager
    def _stream(self) -> Iterator[BufferedReader]:
        try:
            with self.path.open("rb") as stream:
                found = os.fstat(stream.fileno()).st_mtime_ns
                if self.modified and self.length and found != self.modified:
                    raise self._changed()
                stream.seek(self.offset)
                yield stream
        except OSError as error:
            raise OnnxqError(
                f"cannot read weights from {self.path}: {error.strerror}", "check the file"
            ) from error

    def _changed(self) -> OnnxqError:
        return OnnxqError(f"{self.path} has changed since the model was loaded", "run it again")


class Values(LazyValues):  # type: ignore[misc]
    """The values of a constant, in the form graphsurgeon takes.

    Attributes:
        tensor: a TensorProto with name, type, dims and metadata; EXTERNAL, and without the bytes,
            where `streamed`.
        onnx_type: TensorProto.DataType.
        streamed: whether the bytes come from `pieces` alone.
        peaks: the largest magnitudes that were looked for, by the axes they are kept along (see
            `scaling`); values never change.
    """

    tensor: onnx.TensorProto
    streamed = True

    def __init__(self, tensor: onnx.TensorProto) -> None:
        # LazyValues.__init__ derives shape and dtype too, but does not know every type.
        self.tensor = tensor
        self.onnx_type = int(tensor.data_type)
        self.shape = tuple(tensor.dims)
        self.dtype = graph_dtype(self.onnx_type)
        self.peaks: dict[Axes, Factors] = {}

    @property
    def nbytes(self) -> int:
        """Bytes the values take in a file."""
        return payload_bytes(self.onnx_type, self.shape)

    def load(self) -> Array:
        """The values as an array; read or computed anew at each call, never kept."""
        raise NotImplementedError

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The values' bytes as they go into a file."""
        yield to_bytes(self.load(), self.onnx_type)


class InlineValues(Values):
    """Values that are in a TensorProto."""

    streamed = False

    def load(self) -> Array:
        return np.asarray(onnx.numpy_helper.to_array(self.tensor))


class SparseValues(Values):
    """Values that are in a SparseTensorProto; `load` gives the dense array."""

    streamed = False

    def __init__(self, sparse: onnx.SparseTensorProto) -> None:
        super().__init__(sparse.values)
        self.sparse = sparse
        self.shape = tuple(sparse.dims)

    def load(self) -> Array:
        values = onnx.numpy_helper.to_array(self.sparse.values)
        indices = np.asarray(onnx.numpy_helper.to_array(self.sparse.indices))
        limits = np.array(self.shape if indices.ndim > 1 else math.prod(self.shape))
        if self.nbytes > _DENSE_LIMIT or (indices < 0).any() or (indices >= limits).any():
            raise OnnxqError(
                f"the sparse tensor {self.tensor.name!r} does not fit its shape {self.shape}",
                "the file is damaged; export it again",
            )
        dense = np.zeros(self.shape, values.dtype)
        if indices.ndim == 1:  # [NNZ]: positions in the flattened tensor
            dense.reshape(-1)[indices] = values
        else:  # [NNZ, rank]
            dense[tuple(indices.T)] = values
        return dense


class StoredValues(Values):
    """Values that lie in a file.

    Args:
        tensor: what it says of itself, the bytes or references to them left out.
    """

    def __init__(self, tensor: onnx.TensorProto, extent: Extent) -> None:
        super().__init__(_without_data(tensor))
        self.extent = extent

    def load(self) -> Array:
        return from_bytes(self.extent.read(), self.onnx_type, self.shape)

    def pieces(self) -> Iterator[bytes | memoryview]:
        yield from self.extent.pieces()


class DerivedValues(Values):
    """Values computed when they are needed: `produce()` returns an array of `shape`.

    `origin` is the constant they were cast from, if they are a mere cast: quantization reads that,
    so that weights are not rounded twice.
    """

    def __init__(
        self,
        name: str,
        onnx_type: int,
        shape: tuple[int, ...],
        produce: Callable[[], Array],
        origin: Constant | None = None,
    ) -> None:
        super().__init__(
            onnx.TensorProto(
                name=name,
                data_type=onnx_type,
                dims=shape,
                data_location=onnx.TensorProto.EXTERNAL,
            )
        )
        self.produce = produce
        self.origin = origin

    def load(self) -> Array:
        return self.produce()


def array(constant: Constant) -> Array:
    """The values of a constant, without keeping them on it.

    Never use `constant.values`: graphsurgeon then holds the array for good.
    """
    values = constant._values
    if isinstance(values, Values):
        return values.load()
    if isinstance(values, LazyValues):
        return np.asarray(onnx.numpy_helper.to_array(values.tensor))
    return np.asarray(values)


def before_cast(constant: Constant) -> Constant:
    """The constant that one is a mere cast of; itself if it is none."""
    values = constant._values
    return constant if not isinstance(values, DerivedValues) else values.origin or constant


def original(constant: Constant) -> Array:
    """As `array`, but before any cast of the base precision."""
    return array(before_cast(constant))


def constant_type(constant: Constant) -> int:
    """TensorProto.DataType of a constant."""
    values = constant._values
    return (
        int(values.tensor.data_type) if isinstance(values, LazyValues) else onnx_dtype(values.dtype)
    )


def stored(tensor: onnx.TensorProto, folder: Path) -> StoredValues:
    """The values of an EXTERNAL TensorProto, checked against the file they lie in.

    A link is followed wherever it leads (model caches link their files); a `location` that is
    absolute or climbs out of the folder is refused.

    Raises:
        OnnxqError: the file is missing, no regular file, too short, or outside the folder.
    """
    entry = {e.key: e.value for e in tensor.external_data}
    needed = payload_bytes(tensor.data_type, tensor.dims)
    path = _data_file(tensor.name, str(entry.get("location", "")), folder)
    try:
        status = path.stat()
        offset, length = int(entry.get("offset") or 0), int(entry.get("length") or needed)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OnnxqError(
            f"weight {tensor.name!r}: cannot read its data file {path}: {reason}",
            "the external data must lie beside the model file",
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise OnnxqError(
            f"weight {tensor.name!r}: its data file {path} is not a regular file",
            "save the model again with its data file beside it",
        )
    if length != needed or offset < 0 or offset + length > status.st_size:
        raise OnnxqError(
            f"weight {tensor.name!r} needs {needed} bytes at {offset} of {path}, "
            f"which holds {status.st_size} (declared: {length})",
            "the data file is truncated or belongs to another model",
        )
    return StoredValues(tensor, Extent(path, offset, length, status.st_mtime_ns))


def _data_file(name: str, location: str, folder: Path) -> Path:
    relative = PurePosixPath(location)
    if not relative.parts or relative.is_absolute() or ".." in relative.parts:
        raise OnnxqError(
            f"weight {name!r} points outside the model's folder: {location!r}",
            "save the model again with its data file beside it",
        )
    return folder / relative


def _without_data(tensor: onnx.TensorProto) -> onnx.TensorProto:
    bare = onnx.TensorProto()
    bare.CopyFrom(tensor)
    for name in ("external_data", "raw_data", "float_data"):
        bare.ClearField(name)
    bare.data_location = onnx.TensorProto.EXTERNAL
    return bare
