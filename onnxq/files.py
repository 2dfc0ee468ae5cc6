"""Files that are never half there: written beside the target, then renamed over it.

Before a rename the new file's bytes are on the disk, not only in memory: after a power failure too
there is the old file or the new one. What a killed run left is removed by the next one; the files
of a running process are locked, and stay.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxq.errors import OnnxqError

TEMPORARY_PREFIX = ".onnxq-"
_SCRATCH_PREFIX = "scratch-"
_LONGEST_STEM = 128  # bytes
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Yield one temporary path per target, in the targets' folder; rename all on success.

    On any exception the temporaries are removed and the targets are as they were. Targets behind
    the first describe it: a killed run leaves those of the file that is there, or none. Two runs
    that replace the same targets leave those of one of them.

    Raises:
        OnnxqError: the folder does not exist or cannot be written, the disk is full, or a target
            is something else than a file.
    """
    with contextlib.ExitStack() as stack, reporting(targets[0]):
        temporaries = [stack.enter_context(temporary_beside(target)) for target in targets]
        yield temporaries
        for temporary in temporaries:
            flush(temporary)
        with alone_in(targets[0].parent):
            _put_in_place(list(zip(temporaries, targets, strict=True)))


def _put_in_place(pairs: list[tuple[Path, Path]]) -> None:
    """Rename each (temporary, target): the old companions go first, the new ones come last."""
    (temporary, target), *companions = pairs
    with contextlib.ExitStack() as stack, _undisturbed():
        asides = []
        try:
            for _, companion in companions:
                if companion.exists():
                    aside = stack.enter_context(temporary_beside(companion))
                    companion.replace(aside)
                    asides.append((aside, companion))
            flush_folder(target.parent)
            temporary.replace(target)
        except BaseException:
            companions = asides
            raise
        finally:
            flush_folder(target.parent)
            for new, companion in companions:
                new.replace(companion)
            flush_folder(target.parent)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """A Ctrl-C waits until the end: renames are too quick to be worth an exception among them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


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
    for stale in left_behind(target):
        with contextlib.suppress(OSError):
            stale.unlink()
    _remove_stale_folders(target.parent, f"{TEMPORARY_PREFIX}{_SCRATCH_PREFIX}")
    with locked_beside(target) as path:
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def locked_beside(target: Path, prefix: str = TEMPORARY_PREFIX) -> Iterator[Path]:
    """A new empty file in the target's folder, which stays; for `left_behind` it is not there."""
    path, handle = _create(target.parent, _stem(target, prefix))
    try:
        yield path
    finally:
        os.close(handle)


def left_behind(target: Path, prefix: str = TEMPORARY_PREFIX) -> Iterator[Path]:
    """What killed runs left beside `target`, each locked against others while it is looked at."""
    for path in target.parent.glob(f"{glob.escape(_stem(target, prefix))}*"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                if stat.S_ISREG(os.fstat(handle).st_mode) and _lock(handle, wait=False):
                    yield path
            finally:
                os.close(handle)


@contextlib.contextmanager
def scratch(beside: Path | None = None) -> Iterator[Path]:
    """A folder for what is needed meanwhile, removed at the end.

    What killed runs of the same user left there goes first. That another is alive is told by a lock
    on the folder around it: outputs can be written into this one, which takes a lock of its own.

    Args:
        beside: a file, in whose folder it is; None: in the system's folder for such.

    Raises:
        OnnxqError: there is no such folder, or it is full.
    """
    hint = "free some, or set TMPDIR to a folder that has it"
    parent, prefix = Path(tempfile.gettempdir()), f"onnxq-{_SCRATCH_PREFIX}"
    if beside is not None:
        hint = "free some, or write the output to another disk"
        parent, prefix = beside.parent, f"{TEMPORARY_PREFIX}{_SCRATCH_PREFIX}"
    with contextlib.ExitStack() as stack:
        try:
            _remove_stale_folders(parent, prefix)
            folder = _create_folder(stack, parent, prefix) / "files"
            folder.mkdir()
        except OSError as error:
            raise OnnxqError(f"no room for temporary files: {error}", hint) from error
        try:
            yield folder
        except OSError as error:
            if error.errno not in _FULL:
                raise
            message = f"no room for temporary files in {parent}: {error.strerror}"
            raise OnnxqError(message, hint) from error


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


def take(handle: int) -> bool:
    """Lock an open file for this process, until it is closed; False: another one has it.

    File systems without locks give it to everyone.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def flush(path: Path) -> None:
    """Wait until the file's bytes are on the disk; a full one may be noticed only here."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flush_folder(folder: Path) -> None:
    """Wait until the renames in a folder are on the disk, where the file system can say so."""
    with contextlib.suppress(OSError):
        flush(folder)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, content: str) -> None:
    """Write a text file in UTF-8, atomically."""
    with replacing(path) as (temporary,):
        temporary.write_text(content, encoding="utf-8")


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def refuse_unreadable(path: Path, what: str, hint: str) -> None:
    """Refuse what is no regular file: a pipe is waited for without end, a device may have no end.

    Args:
        what: the file's part in the run, for the message: `the text`.

    Raises:
        OnnxqError: it is not there, or no file.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or error
        raise OnnxqError(f"cannot read {what} {path}: {reason}", hint) from None
    if not stat.S_ISREG(mode):
        raise OnnxqError(f"cannot read {what} {path}: it is not a file", hint)


def refuse_unwritable(path: Path) -> None:
    """Refuse, before anything is computed, a target that could not be written in the end.

    Raises:
        OnnxqError: as `replacing`.
    """
    with reporting(path), temporary_beside(path):
        pass


def _stem(target: Path, prefix: str) -> str:
    start = target.name.encode(errors="replace")[:_LONGEST_STEM].decode(errors="ignore")
    return f"{prefix}{start}."


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


def _create_folder(stack: contextlib.ExitStack, parent: Path, prefix: str) -> Path:
    """A new locked folder, which `stack` removes."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        # Until it is locked, another run may take it for a killed one's.
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            _lock(handle, wait=True)
            if folder.exists():
                return folder


def _remove_stale_folders(parent: Path, prefix: str) -> None:
    for path in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(handle).st_uid == os.geteuid() and _lock(handle, wait=False):
                    shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(handle)


def _lock(handle: int, *, wait: bool) -> bool:
    """Whether the file is ours now; without locks in the file system it never is."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True
