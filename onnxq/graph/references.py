"""External-data references: which file of which folder holds a weight's bytes."""

from __future__ import annotations

import os
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from onnxq.errors import OnnxqError
from onnxq.graph.reading import is_external
from onnxq.graph.spool import Spool
from onnxq.graph.weights import DerivedValues, Extent

LARGEST_MESSAGE = 2_000_000_000
"""Bytes: a serialized protobuf message must stay below 2 GiB."""


@dataclass(frozen=True)
class Reference:
    """Bytes of a file in `folder` or below it."""

    extent: Extent
    folder: Path


def refer(proto: onnx.ModelProto, references: Mapping[str, Reference]) -> None:
    """Point the EXTERNAL initializers at their files, relative to the model's folder."""
    for tensor in filter(is_external, proto.graph.initializer):
        reference = _find(tensor, references)
        point(tensor, reference.extent, reference.extent.path.relative_to(reference.folder))


def fill_in(
    proto: onnx.ModelProto,
    computed: Mapping[str, DerivedValues],
    folder: Path,
    spool: Spool | None = None,
) -> None:
    """Compute the initializers that lie in no file, and put their values into the model.

    Args:
        folder: what locations are relative to.
        spool: takes the values, to which the model then refers.

    Raises:
        OnnxqError: they do not fit a message, or the spool's disk.
    """
    found = [t for t in proto.graph.initializer if is_external(t) and t.name in computed]
    if spool is not None:
        for tensor in found:
            extent = spool.put(computed[tensor.name])
            point(tensor, extent, extent.path.relative_to(folder))
        return
    total = sum(computed[t.name].nbytes for t in found)
    if total > LARGEST_MESSAGE:
        raise OnnxqError(
            f"{total / 1e9:.1f} GB of weights have been changed: too many to run the model unsaved",
            "run it before they are changed, or save it first",
        )
    for tensor in found:
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        tensor.raw_data = b"".join(computed[tensor.name].pieces())


def refer_resolved(
    proto: onnx.ModelProto,
    references: Mapping[str, Reference],
    folder: Path,
    computed: Container[str] = (),
    spool: Spool | None = None,
) -> Path:
    """As `refer`, with links followed: ONNX Runtime refuses one that leads out of the folder.

    Args:
        computed: names of initializers that `fill_in` sees to, with the help of `spool`.

    Returns:
        What the locations are relative to: the folder that holds all files; `folder` for none.
    """
    external = list(filter(is_external, proto.graph.initializer))
    extents = [(t, _find(t, references).extent) for t in external if t.name not in computed]
    paths = {path: path.resolve() for path in {extent.path for _, extent in extents}}
    folders = [path.parent for path in paths.values()]
    if spool is not None and len(extents) < len(external):
        folders.append(spool.folder)
    if folders:
        folder = Path(os.path.commonpath(folders))
    for tensor, extent in extents:
        point(tensor, extent, paths[extent.path].relative_to(folder))
    return folder


def _find(tensor: onnx.TensorProto, references: Mapping[str, Reference]) -> Reference:
    if tensor.name not in references:
        raise AssertionError(f"{tensor.name!r} is computed when the model is saved: save it first")
    return references[tensor.name]


def point(tensor: onnx.TensorProto, extent: Extent, location: Path) -> None:
    """Let the tensor be EXTERNAL at `extent`, under the name `location`."""
    set_reference(tensor, location.as_posix(), extent.offset, extent.length)


def set_reference(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Replace the tensor's `external_data`."""
    tensor.ClearField("external_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
