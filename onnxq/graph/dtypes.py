"""ONNX element types: their numpy dtypes, how many bytes they take, and how they are packed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx

from onnxq.errors import OnnxqError

Array = npt.NDArray[np.generic]

# graphsurgeon keeps these as the ONNX number, and every other type as its numpy dtype.
_BY_NUMBER: dict[int, np.dtype[np.generic]] = {
    onnx.TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
    onnx.TensorProto.FLOAT8E4M3FN: np.dtype(ml_dtypes.float8_e4m3fn),
    onnx.TensorProto.FLOAT8E4M3FNUZ: np.dtype(ml_dtypes.float8_e4m3fnuz),
    onnx.TensorProto.FLOAT8E5M2: np.dtype(ml_dtypes.float8_e5m2),
    onnx.TensorProto.FLOAT8E5M2FNUZ: np.dtype(ml_dtypes.float8_e5m2fnuz),
}
_KNOWN = frozenset(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}
_NUMBERS = {dtype: number for number, dtype in _BY_NUMBER.items()}

# Bits of the types that share bytes. Older onnx packages do not know all of them.
_PACKED_BITS = {
    getattr(onnx.TensorProto, name): bits
    for name, bits in {
        "INT4": 4,
        "UINT4": 4,
        "FLOAT4E2M1": 4,
        "INT2": 2,
        "UINT2": 2,
        "FLOAT6E2M3": 6,
        "FLOAT6E3M2": 6,
    }.items()
    if hasattr(onnx.TensorProto, name)
}


def is_known(onnx_type: int) -> bool:
    """Whether this is a TensorProto.DataType that the installed onnx package has."""
    return onnx_type in _KNOWN


def numpy_dtype(onnx_type: int) -> np.dtype[np.generic]:
    """The numpy (or ml_dtypes) dtype of an ONNX tensor type, one element each."""
    if onnx_type in _BY_NUMBER:
        return _BY_NUMBER[onnx_type]
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_type))


def onnx_dtype(dtype: npt.DTypeLike) -> int:
    """The TensorProto.DataType of a numpy (or ml_dtypes) dtype."""
    found = _NUMBERS.get(np.dtype(dtype))
    return found if found is not None else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


def graph_dtype(onnx_type: int) -> int | np.dtype[np.generic]:
    """The type as graphsurgeon keeps it on a tensor."""
    return onnx_type if onnx_type in _BY_NUMBER else numpy_dtype(onnx_type)


def value_dtype(graph_type: object) -> np.dtype[np.generic]:
    """The numpy (or ml_dtypes) dtype of a type as graphsurgeon keeps it."""
    return numpy_dtype(graph_type) if isinstance(graph_type, int) else np.dtype(graph_type)  # type: ignore[call-overload]


def onnx_number(graph_type: object) -> int:
    """The TensorProto.DataType of a type as graphsurgeon keeps it; 0 where it is unknown."""
    if graph_type is None:
        return 0
    return graph_type if isinstance(graph_type, int) else onnx_dtype(graph_type)  # type: ignore[arg-type]


def is_packed(onnx_type: int) -> bool:
    """Whether several elements share a byte."""
    return onnx_type in _PACKED_BITS


def payload_bytes(onnx_type: int, shape: Sequence[int]) -> int:
    """Bytes of a tensor's raw data.

    Raises:
        OnnxqError: strings, which have none.
    """
    count = math.prod(shape)
    if onnx_type in _PACKED_BITS:
        return (count * _PACKED_BITS[onnx_type] + 7) // 8
    if onnx_type == onnx.TensorProto.STRING:
        raise OnnxqError("strings have no raw data", "export the model again")
    return count * numpy_dtype(onnx_type).itemsize


def to_bytes(values: Array, onnx_type: int) -> memoryview:
    """The raw data of an array; types that share bytes are packed."""
    if is_packed(onnx_type):
        typed = np.ascontiguousarray(values).astype(numpy_dtype(onnx_type), copy=False)
        if _PACKED_BITS[onnx_type] == 4:
            return memoryview(_nibbles(typed.reshape(-1).view(np.uint8)).data)
        return memoryview(onnx.numpy_helper.from_array(typed).raw_data)
    return memoryview(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _nibbles(codes: Array) -> Array:
    """Two codes a byte, the first in the lower half; the last has one alone if they are odd."""
    if codes.size % 2:
        codes = np.append(codes, np.uint8(0))
    pairs = codes.view("<u2")
    packed = np.right_shift(pairs, 4)
    np.bitwise_and(packed, 0xF0, out=packed)
    np.bitwise_or(packed, np.bitwise_and(pairs, 0x0F), out=packed)
    return np.asarray(packed.astype(np.uint8))


def from_bytes(raw: Array, onnx_type: int, shape: Sequence[int]) -> Array:
    """The inverse of `to_bytes`; `raw` is an array of bytes."""
    if is_packed(onnx_type):
        proto = onnx.TensorProto(data_type=onnx_type, dims=shape, raw_data=raw.tobytes())
        return np.asarray(onnx.numpy_helper.to_array(proto))
    return raw.view(numpy_dtype(onnx_type)).reshape(shape)
