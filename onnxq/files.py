"""Files that are never half there: written beside the target, then renamed over it."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxq.errors import OnnxqError

_TEMPORARY_PREFIX = ".onnxq-"
_LONGEST_STEM = 128


@contextlib.contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Yield one temporary path per target, in the target's folder; rename all on success.

    On any exception the temporaries are removed and the targets are as they were. The first
    target is renamed last: it is the file that refers to the others.

    Raises:
        OnnxqError: the folder does not exist or cannot be written, the disk is full, or a target
            is something else than a file.
    """
    with contextlib.ExitStack() as stack, reporting(targets[0]):
        temporaries = [stack.enter_context(temporary_beside(target)) for target in targets]
        yield temporaries
        for temporary, target in reversed(list(zip(temporaries, targets, strict=True))):
            temporary.replace(target)


@contextlib.contextmanager
def reporting(target: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line about `target`."""
    try:
        yield
    except OSError as error:
        raise OnnxqError(
            f"cannot write {target}: {error.strerror or error}",
            "check the folder, its permissions and the free space",
        ) from error


@contextlib.contextmanager
def temporary_beside(target: Path) -> Iterator[Path]:
    """A new empty file in the target's folder; removed at the end unless it was renamed.

    It is locked while it is in use. What a killed run left is not, and the next run removes it.
    """
    _refuse_special(target)
    stem = f"{_TEMPORARY_PREFIX}{target.name[:_LONGEST_STEM]}."
    _remove_stale(target.parent, stem)
    path, handle = _create(target.parent, stem)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other onnxq processes from replacing files in `folder` meanwhile.

    File systems without locks, and folders that cannot be read, let them.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            _lock(handle, wait=True)
        yield


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    with replacing(path) as (temporary,):
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _refuse_special(target: Path) -> None:
    """A rename would put a file in the place of /dev/null, a pipe or a folder."""
    if target.exists() and not stat.S_ISREG(target.stat().st_mode):
        raise OnnxqError(f"cannot write {target}: it is not a file", "name the file to write")


def _create(folder: Path, stem: str) -> tuple[Path, int]:
    """A new locked file, with the permissions that a new file has by the process's mask."""
    while True:
        path = folder / f"{stem}{os.getpid()}-{secrets.token_hex(4)}"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        _lock(handle, wait=True)
        if os.fstat(handle).st_nlink:
            return path, handle
        os.close(handle)  # taken for a killed run's, in the moment before it was locked


def _remove_stale(folder: Path, stem: str) -> None:
    """Remove what killed runs left; the files of a running one are locked, and stay."""
    for path in folder.glob(f"{glob.escape(stem)}*"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                if _lock(handle, wait=False):
                    path.unlink()
            finally:
                os.close(handle)


def _lock(handle: int, *, wait: bool) -> bool:
    """Whether the file is ours now; without locks in the file system it never is."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
