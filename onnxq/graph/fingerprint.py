"""What identifies a model: its graph, and the head and tail of each weight.

Hashing all of a 5 GB file would cost more than the calibration it guards.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import onnx

from onnxq.graph.dtypes import to_bytes
from onnxq.graph.weights import Extent, SparseValues, StoredValues, array, constant_type

if TYPE_CHECKING:
    from onnxq.graph.model import Model

_EDGE = 4096


def fingerprint(model: Model) -> str:
    """Hexadecimal SHA-256 of a model as it was loaded, whichever files its weights lie in."""
    digest = hashlib.sha256(model.header.SerializeToString(deterministic=True))
    for node in model.graph.nodes:
        digest.update(model.origins[id(node)].SerializeToString(deterministic=True))
    for constant in model.constants():
        values, kind = constant._values, constant_type(constant)
        digest.update(repr((constant.name, kind, tuple(values.shape))).encode())
        if isinstance(values, StoredValues) and values.nbytes > 2 * _EDGE:
            extent = values.extent
            for offset in (extent.offset, extent.offset + extent.length - _EDGE):
                digest.update(Extent(extent.path, offset, _EDGE).read().data)
        elif isinstance(values, SparseValues):
            digest.update(values.sparse.SerializeToString(deterministic=True))
        elif kind == onnx.TensorProto.STRING:
            digest.update(values.tensor.SerializeToString(deterministic=True))
        else:
            digest.update(to_bytes(array(constant), kind))
    return digest.hexdigest()
