"""Errors that a command reports in one line."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right: wrong input, missing files. Exit status 2."""


class FailedCheck(Exception):
    """A check that the command was asked to make has failed. Exit status 1."""


class Interrupted(Exception):
    """Ctrl-C, with a word on how to go on. Exit status 130."""


def one_line(error: BaseException) -> str:
    """An error's message on one line, readable also where Python's own is not."""
    if isinstance(error, OSError) and error.strerror is not None:
        return f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    return " ".join(str(error).split()) or type(error).__name__
