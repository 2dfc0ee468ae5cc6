"""The one exception a user of onnxq is meant to see."""

from __future__ import annotations

LONGEST_PART = 590
"""Characters of a message or a hint: a name in a damaged file can be as long as the file."""


class OnnxqError(Exception):
    """Bad input or usage: what is wrong and where (`message`), and how to cure it (`hint`).

    The command line shows it as one line and exits with 2; nothing has been written by then.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = _shortened(message)
        self.hint = _shortened(hint)

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


def _shortened(text: str) -> str:
    text = " ".join(text.splitlines())
    return text if len(text) <= LONGEST_PART else f"{text[:LONGEST_PART]}..."


def missing_package(module: str, purpose: str) -> OnnxqError:
    """The error for an optional package that is needed now, naming the extra that brings it."""
    return OnnxqError(
        f"{purpose} needs the package {module!r}, which is not installed",
        "install it with: pip install 'onnxq[cpu]' (or 'onnxq[gpu]' on a machine with a GPU)",
    )
