"""Files that are never half there: written beside the target, then renamed over it."""

from __future__ import annotations

import contextlib
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
            handle, name = tempfile.mkstemp(
                dir=target.parent, prefix=f"{_TEMPORARY_PREFIX}{target.name}."
            )
            os.close(handle)
            temporaries.append(Path(name))
        yield temporaries
        for temporary in temporaries:
            with temporary.open("rb") as stream:
                os.fsync(stream.fileno())
            temporary.chmod(0o666 & ~_umask())
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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
