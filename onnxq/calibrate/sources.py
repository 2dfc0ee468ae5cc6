"""Where calibration data lies: files and scripts read as they are, one step's arrays at a time.

A source gives the steps a model is fed, in order, as {input name: array}; it can be read again from
the start, and it never holds more than a step (Polygraphy's JSON, which is one document, excepted).
Whether the arrays fit a model is `onnxq.calibrate.data`'s business.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from onnxq.calibrate.session import one_line
from onnxq.errors import OnnxqError
from onnxq.files import refuse_unreadable

Array = NDArray[Any]

LARGEST_STEP = 1 << 30
"""Bytes of one array that are read at a time: a few compressed ones could claim terabytes."""

MOST_EMPTY = 1_000_000
"""Samples without a byte each, such as an empty past: a header of 80 bytes could claim any number.
"""

_MOST_ARRAYS = 10_000


class Source(Protocol):
    """Steps of arrays. `description` names it; `label(i)` names step i for a message."""

    description: str

    def __iter__(self) -> Iterator[Mapping[str, Array]]: ...

    def label(self, step: int) -> str: ...


class ArrayStream:
    """One .npy stream: its header at once, its rows as they are asked for."""

    def __init__(self, stream: IO[bytes], name: str, where: str) -> None:
        self.stream, self.name, self.where = stream, name, where
        self.shape, self.by_column, self.dtype = _header(stream, where)
        if self.dtype.kind not in "biuf":
            what = "Python objects" if self.dtype.hasobject else str(self.dtype)
            wanted = "real numbers" if self.dtype.kind == "c" else "numbers"
            raise OnnxqError(
                f"{where} holds {what}, not {wanted}",
                f"save plain arrays of {wanted}; pickled objects are never loaded",
            )
        if self.shape[:1] > (MOST_EMPTY,) and not math.prod(self.shape[1:]):
            raise OnnxqError(f"{where} claims {self.shape[0]} samples of nothing", "save it again")

    def rows(self, count: int) -> Array:
        """The next `count` entries of the first dimension."""
        return self._read((count, *self.shape[1:]))

    def all(self) -> Array:
        """The whole array."""
        if self.by_column and len(self.shape) > 1:
            return self._read(self.shape[::-1]).T
        return self._read(self.shape)

    def _read(self, shape: tuple[int, ...]) -> Array:
        size = math.prod(shape) * self.dtype.itemsize
        if size > LARGEST_STEP:
            raise OnnxqError(
                f"{self.where} takes {size / 1e9:.1f} GB at a time, more than onnxq reads: "
                f"{LARGEST_STEP / 1e9:.1f} GB",
                "save smaller samples, row by row (numpy.ascontiguousarray), or lower --batch",
            )
        with _saying(f"{self.where} cannot be read", "save it again"):
            content = self.stream.read(size)
            if len(content) == size:
                return np.frombuffer(content, self.dtype).reshape(shape)
        raise OnnxqError(
            f"{self.where} ends {size - len(content)} bytes too early", "save it again"
        )


def _header(stream: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether it lies column by column, and type of the array in a .npy stream."""
    with _saying(f"{where} is no readable numpy array", "save it again with numpy.savez"):
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            shape, by_column, dtype = np.lib.format.read_array_header_1_0(stream)
        else:
            shape, by_column, dtype = np.lib.format.read_array_header_2_0(stream)
        if any(size < 0 for size in shape):
            raise ValueError(f"its shape is {shape}")
        return shape, by_column, dtype


@contextmanager
def _saying(what: str, hint: str) -> Iterator[None]:
    """Turn whatever numpy, zipfile and the decompressors raise on damaged files into one line.

    Their parsers were written for good files: the kinds of exceptions have no end.
    """
    try:
        yield
    except OnnxqError:
        raise
    except Exception as error:
        raise OnnxqError(f"{what}: {one_line(error)}", hint) from error


class ArrayFiles:
    """The arrays of one .npz, or of a folder of .npy: opened together, closed together."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, stack: ExitStack) -> dict[str, ArrayStream]:
        """A stream for each array, by name; `stack` closes them."""
        if self.path.is_dir():
            return {file.stem: _open_npy(file, stack) for file in sorted(self.path.glob("*.npy"))}
        archive = stack.enter_context(open_npz(self.path))
        if len(archive.namelist()) > _MOST_ARRAYS:
            raise OnnxqError(f"{self.path} holds more than {_MOST_ARRAYS} arrays", "one per input")
        streams = {}
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            where = f"array {name!r} in {self.path}"
            with _saying(f"{where} cannot be read", "save it again with numpy.savez"):
                stream = stack.enter_context(archive.open(member))
            streams[name] = ArrayStream(stream, name, where)
        return streams


def _open_npy(file: Path, stack: ExitStack) -> ArrayStream:
    hint = "keep only the data's .npy files in the folder"
    refuse_unreadable(file, "the data", hint)
    with _saying(f"{file} cannot be read", hint):
        stream = stack.enter_context(file.open("rb"))
    return ArrayStream(stream, file.stem, str(file))


def open_npz(path: Path) -> zipfile.ZipFile:
    """The zip archive that a .npz is.

    Raises:
        OnnxqError: missing, unreadable, or no archive.
    """
    hint = "give an archive made by numpy.savez, one array per model input"
    refuse_unreadable(path, "the data", hint)
    with _saying(f"{path} cannot be read as .npz", hint):
        return zipfile.ZipFile(path)


class SampleFiles:
    """A folder of .npz: one sample each, in the order of their names, fed as it is."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted(folder.glob("*.npz"))
        self.description = f"{len(self.files)} samples in {folder}"

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        for file in self.files:
            with ExitStack() as stack:
                yield {name: stream.all() for name, stream in ArrayFiles(file).open(stack).items()}

    def label(self, step: int) -> str:
        return f"sample {step} ({self.files[step].name})"


class Feeds:
    """Steps that are in memory already."""

    def __init__(self, feeds: list[Mapping[str, Array]], description: str) -> None:
        self.feeds, self.description = feeds, description

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        return iter(self.feeds)

    def label(self, step: int) -> str:
        return f"sample {step}"


def polygraphy_json(path: Path) -> Feeds:
    """Inputs as `polygraphy run --save-inputs` writes them: a list of feeds.

    Raises:
        OnnxqError: not such a file.
    """
    from polygraphy.json import load_json
    from polygraphy.logger import G_LOGGER

    refuse_unreadable(path, "the data", "give the file that --save-inputs wrote")
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
            content = load_json(str(path))
    except Exception as error:  # Polygraphy's own exception, json's, binascii's, numpy's
        first = str(error).strip().splitlines()[0] if str(error).strip() else "not JSON"
        raise OnnxqError(
            f"{path} cannot be read as Polygraphy's inputs: {first}",
            "write it with: polygraphy run MODEL --onnxrt --save-inputs FILE.json",
        ) from error
    feeds = [content] if isinstance(content, Mapping) else content
    if not isinstance(feeds, list) or not all(isinstance(feed, Mapping) for feed in feeds):
        raise OnnxqError(
            f"{path} holds no list of feeds but a {type(content).__name__}",
            "outputs (--save-outputs) are not inputs: use what --save-inputs writes",
        )
    return Feeds([_as_arrays(feed, str(path)) for feed in feeds], str(path))


class LoaderScript:
    """Polygraphy's data loader script: `load_data()` in FILE.py gives feeds, again at each call."""

    def __init__(self, path: Path, function: str = "load_data") -> None:
        self.path, self.function = path, function
        self.description = f"{path}:{function}"
        self._load = _function(path, function)

    def __iter__(self) -> Iterator[Mapping[str, Array]]:
        try:
            for feed in self._load():
                if not isinstance(feed, Mapping):
                    raise OnnxqError(
                        f"{self.description} gave a {type(feed).__name__}, not a feed",
                        "yield one dict {input name: numpy array} per step",
                    )
                yield _as_arrays(feed, self.description)
        except OnnxqError:
            raise
        except Exception as error:  # it is the user's code: anything can come
            raise OnnxqError(
                f"{self.description} failed: {type(error).__name__}: {error}", "run it by itself"
            ) from error

    def label(self, step: int) -> str:
        return f"sample {step}"


def _function(path: Path, name: str) -> Any:
    """The function `name` of a script; its folder is importable while it loads.

    Polygraphy's import_from_script imports by the file's name, so a script called `data.py` can
    get another module of that name; this one cannot.
    """
    spec = importlib.util.spec_from_file_location(f"onnxq_loader_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise OnnxqError(f"{path} is no Python script", "give a .py file that defines load_data()")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
        return getattr(module, name)
    except AttributeError as error:
        raise OnnxqError(
            f"{path} does not define {name}(): {error}",
            "define load_data(), or name the function: FILE.py:FUNCTION",
        ) from error
    except Exception as error:  # it is the user's code: anything can come
        raise OnnxqError(
            f"{path} could not be loaded: {type(error).__name__}: {error}", "run it by itself"
        ) from error
    finally:
        sys.path.remove(str(path.resolve().parent))


def _as_arrays(feed: Mapping[str, Any], where: str) -> dict[str, Array]:
    """Values as numpy arrays; tensors that numpy understands (torch's on the CPU) are taken too."""
    arrays = {}
    for name, value in feed.items():
        with _saying(f"{where} gives {name!r} as no array", "give numpy arrays"):
            array = np.asarray(value)
        if array.dtype.kind not in "biufV":
            raise OnnxqError(
                f"{where} gives {name!r} as {array.dtype}, not as numbers", "give numpy arrays"
            )
        arrays[name] = array
    return arrays
