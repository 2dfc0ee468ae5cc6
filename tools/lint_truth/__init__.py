"""Lint against the compiler: `python -m tools.lint_truth --help`."""
