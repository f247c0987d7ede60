"""Exceptions that the command line reports in one sentence."""

import sys
import traceback
from pathlib import Path


class UsageError(ValueError):
    """User error (exit code 2); the message says in one sentence what is wrong and what would be right."""


class InUseError(UsageError):
    """User error: another process writes the folder."""


class RunFailed(RuntimeError):  # noqa: N818 - it is the run that failed.
    """Failure of a run that is not a user error (exit code 1); the message says why in one sentence."""


class AgreedError(UsageError):
    """User error that all processes of a run raise together."""


class Interrupted(Exception):  # noqa: N818 - like KeyboardInterrupt, it is not an error.
    """Stop of a run by a signal; the message says how to resume."""

    def __init__(self, message: str, number: int) -> None:
        """Create the exception from its message and the signal's number."""
        super().__init__(message)
        self.number = number


def sentence_of(error: Exception, module: str) -> str:
    """Describe an exception in a sentence: its type, the last line of a module that it passed, and its message."""
    file = getattr(sys.modules.get(module), "__file__", None)
    frames = traceback.extract_tb(error.__traceback__)
    places = [
        frame for frame in frames if frame.filename == file or Path(frame.filename).stem == module.rpartition(".")[2]
    ]
    where = f" in line {places[-1].lineno} of {places[-1].filename}" if places else ""
    message = " ".join(str(error).split())[:300].rstrip(".")
    return f"{type(error).__name__}{where}{': ' if message else ''}{message}."
