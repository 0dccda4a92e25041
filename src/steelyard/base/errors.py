"""The errors a user meets. Each says in one line what was wrong, where, and what to do."""

from __future__ import annotations


class SteelyardError(Exception):
    """Something was refused or failed. The command line prints the message in one line and exits with `exit_code`."""

    exit_code = 1


class UsageError(SteelyardError):
    """The command, recipe, policy or battery was written wrongly (exit code 2)."""

    exit_code = 2


class FormatError(SteelyardError):
    """A file is not what it claims to be: truncated, lying about sizes, of a refused kind."""


class MissingDependencyError(SteelyardError):
    """An optional extra is needed; the message names the pip command."""


def require_extra(module: str, extra: str) -> MissingDependencyError:
    """The error for a missing optional module, naming the remedy."""
    return MissingDependencyError(f"{module} is not installed: pip install 'steelyard[{extra}]'")
