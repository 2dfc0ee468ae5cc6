"""Computed weights as files, which ONNX Runtime reads as it reads those of the model.

In a serialized model they would be there three times over while it loads: in the message, in its
bytes, and in what ONNX Runtime makes of these.
"""

from __future__ import annotations

from pathlib import Path

from onnxq.errors import OnnxqError
from onnxq.graph.weights import DerivedValues, Extent


class Spool:
    """A file for each computed weight of the models that are open, in a folder for nothing else.

    Args:
        folder: made with the first file; whoever made the one around it removes it.

    Attributes:
        written: bytes, of all there ever were.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.written = folder.resolve(), 0
        self._files: dict[str, tuple[DerivedValues, Extent]] = {}

    def put(self, values: DerivedValues) -> Extent:
        """Where the values are now; they are computed where they are nowhere yet.

        Raises:
            OnnxqError: the disk is full, or the folder cannot be written.
        """
        name = values.tensor.name
        known = self._files.get(name)
        if known is not None and known[0] is values:
            return known[1]
        path = self.folder / str(len(self._files))
        try:
            self.folder.mkdir(exist_ok=True)
            with path.open("wb") as stream:
                for piece in values.pieces():
                    stream.write(piece)
        except OSError as error:
            raise OnnxqError(
                f"cannot keep rescaled weights in {self.folder}: {error.strerror or error}",
                "write the output to a disk with more space",
            ) from error
        self.written += values.nbytes
        self._files[name] = values, Extent(path, 0, values.nbytes)
        return self._files[name][1]

    def clear(self) -> None:
        """Remove the files. What has been loaded from them stays loaded: it is mapped, or read."""
        for _, extent in self._files.values():
            extent.path.unlink()
        self._files.clear()
