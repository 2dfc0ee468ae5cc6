"""Files that are never half there: written beside the target, then renamed over it."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from onnxq.errors import OnnxqError

_TEMPORARY_PREFIX = ".onnxq-"


@contextlib.contextmanager
def replacing(*targets: Path) -> Iterator[list[Path]]:
    """Yield one temporary path per target, in the target's folder; rename all on success.

    On any exception the temporaries are removed and the targets are as they were. The first
    target is renamed last: it is the file that refers to the others.

    Raises:
        OnnxqError: the folder does not exist or cannot be written, or the disk is full.
    """
    temporaries: list[Path] = []
    try:
        for target in targets:
            temporaries.append(temporary_beside(target))
        yield temporaries
        for temporary, target in reversed(list(zip(temporaries, targets, strict=True))):
            temporary.replace(target)
    except OSError as error:
        raise OnnxqError(
            f"cannot write {targets[0]}: {error.strerror or error}",
            "check the folder, its permissions and the free space",
        ) from error
    finally:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)


def temporary_beside(target: Path) -> Path:
    """A new empty file in the target's folder, with the permissions a new file would have.

    Its name carries the process id: what a killed run left is removed by the next one.
    """
    _remove_stale(target)
    handle, name = tempfile.mkstemp(
        dir=target.parent, prefix=f"{_TEMPORARY_PREFIX}{os.getpid()}-{target.name}."
    )
    os.fchmod(handle, 0o666 & ~_umask())
    os.close(handle)
    return Path(name)


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


def _remove_stale(target: Path) -> None:
    """Remove what a killed run left beside `target`; a running one's files stay."""
    for path in target.parent.glob(f"{_TEMPORARY_PREFIX}*-{glob.escape(target.name)}.*"):
        pid = path.name[len(_TEMPORARY_PREFIX) :].partition("-")[0]
        if pid.isdigit() and not _is_running(int(pid)):
            path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
