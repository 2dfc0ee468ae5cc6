"""Weights that stay on disk until they are written.

graphsurgeon passes `LazyValues.tensor` through its export untouched; a TensorProto marked EXTERNAL
therefore keeps its bytes out of memory. `StoredValues` are bytes of some file, `DerivedValues` are
computed from other values at the moment they are written, one tensor at a time.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx_graphsurgeon.ir.tensor import Constant, LazyValues

from onnxq.errors import OnnxqError

Array = npt.NDArray[np.generic]

_PIECE = 8 << 20

_DTYPES: dict[int, np.dtype[np.generic]] = {
    onnx.TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    onnx.TensorProto.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    onnx.TensorProto.FLOAT8E4M3FNUZ: np.dtype(ml_dtypes.float8_e4m3fnuz),
    onnx.TensorProto.FLOAT8E5M2: np.dtype(ml_dtypes.float8_e5m2),
    onnx.TensorProto.FLOAT8E5M2FNUZ: np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_PACKED = {
    getattr(onnx.TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1", "INT2", "UINT2")
    if hasattr(onnx.TensorProto, name)
}
_ONNX_TYPES = {dtype: number for number, dtype in _DTYPES.items()}


def numpy_dtype(onnx_type: int) -> np.dtype[np.generic]:
    """The numpy (or ml_dtypes) dtype with the same bits as an unpacked ONNX tensor type."""
    if onnx_type in _DTYPES:
        return _DTYPES[onnx_type]
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_type))


def onnx_dtype(dtype: npt.DTypeLike) -> int:
    """The TensorProto.DataType of a numpy (or ml_dtypes) dtype."""
    found = _ONNX_TYPES.get(np.dtype(dtype))
    return found if found is not None else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


@dataclass(frozen=True)
class Extent:
    """A run of bytes in a file."""

    path: Path
    offset: int
    length: int

    def pieces(self) -> Iterator[bytes]:
        """The bytes, in pieces of at most 8 MiB, through read(): mapped pages would count as RSS.

        Raises:
            OnnxqError: the file has become shorter than it was.
        """
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            left = self.length
            while left:
                piece = stream.read(min(left, _PIECE))
                if not piece:
                    raise OnnxqError(
                        f"{self.path} ended {left} bytes early", "was it changed meanwhile?"
                    )
                left -= len(piece)
                yield piece

    def array(self, dtype: np.dtype[np.generic], shape: tuple[int, ...]) -> Array:
        """Read as an array of `shape`; nothing is kept mapped."""
        raw = np.empty(self.length, np.uint8)
        position = 0
        for piece in self.pieces():
            raw[position : position + len(piece)] = np.frombuffer(piece, np.uint8)
            position += len(piece)
        return raw.view(dtype).reshape(shape)


class Values(LazyValues):  # type: ignore[misc]
    """Constant values outside the graph: `tensor` is an EXTERNAL TensorProto without bytes."""

    tensor: onnx.TensorProto

    def __init__(self, name: str, onnx_type: int, shape: tuple[int, ...]) -> None:
        # LazyValues.__init__ derives shape and dtype from the proto but knows no 4-bit types.
        self.tensor = onnx.TensorProto(
            name=name,
            data_type=onnx_type,
            dims=shape,
            data_location=onnx.TensorProto.EXTERNAL,
        )
        self.shape = shape
        self.dtype = numpy_dtype(onnx_type) if onnx_type not in _PACKED else onnx_type

    @property
    def nbytes(self) -> int:
        """Bytes the values take in a file."""
        return payload_bytes(self.tensor.data_type, self.shape)

    @nbytes.setter
    def nbytes(self, value: int) -> None: ...

    def load(self) -> Array:
        """The values as an array; read or computed anew at each call, never kept."""
        raise NotImplementedError

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The values' bytes as they go into a file."""
        yield memoryview(np.ascontiguousarray(self.load()).reshape(-1).view(np.uint8))


class StoredValues(Values):
    """Values that lie in a file."""

    def __init__(self, name: str, onnx_type: int, shape: tuple[int, ...], extent: Extent) -> None:
        super().__init__(name, onnx_type, shape)
        self.extent = extent

    def load(self) -> Array:
        if self.tensor.data_type in _PACKED:
            return self.extent.array(np.dtype(np.uint8), (self.extent.length,))
        return self.extent.array(numpy_dtype(self.tensor.data_type), tuple(self.shape))

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
        super().__init__(name, onnx_type, shape)
        self.produce = produce
        self.origin = origin

    def load(self) -> Array:
        return self.produce()


def payload_bytes(onnx_type: int, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor's raw data (4-bit types hold two elements a byte)."""
    count = int(np.prod(shape, dtype=np.int64)) if shape else 1
    if onnx_type in _PACKED:
        bits = 2 if "INT2" in onnx.TensorProto.DataType.Name(onnx_type) else 4
        return (count * bits + 7) // 8
    return count * numpy_dtype(onnx_type).itemsize


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


def original(constant: Constant) -> Array:
    """As `array`, but before any cast of the base precision."""
    values = constant._values
    if isinstance(values, DerivedValues) and values.origin is not None:
        return array(values.origin)
    return array(constant)


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
    location = PurePosixPath(entry.get("location", ""))
    if not location.parts or location.is_absolute() or ".." in location.parts:
        raise OnnxqError(
            f"weight {tensor.name!r} points outside the model's folder: {str(location)!r}",
            "save the model again with its data file beside it",
        )
    path = folder / location
    shape = tuple(int(d) for d in tensor.dims)
    if any(d < 0 for d in shape):
        raise OnnxqError(
            f"weight {tensor.name!r} has a negative dimension: {shape}", "export again"
        )
    needed = payload_bytes(tensor.data_type, shape)
    try:
        status = os.stat(path)
        offset, length = int(entry.get("offset") or 0), int(entry.get("length") or needed)
    except (OSError, ValueError) as error:
        raise OnnxqError(
            f"weight {tensor.name!r}: cannot read its data file {path}: {error}",
            "the external data must lie beside the model file",
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise OnnxqError(f"weight {tensor.name!r}: {path} is not a regular file", "")
    if length != needed or offset < 0 or offset + length > status.st_size:
        raise OnnxqError(
            f"weight {tensor.name!r} needs {needed} bytes at {offset} of {path}, "
            f"which holds {status.st_size} (declared: {length})",
            "the data file is truncated or belongs to another model",
        )
    values = StoredValues(tensor.name, tensor.data_type, shape, Extent(path, offset, length))
    values.tensor.doc_string = tensor.doc_string
    values.tensor.metadata_props.extend(tensor.metadata_props)
    return values
