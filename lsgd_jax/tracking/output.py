"""Output streams that survive a closed pipe, a full device or a closed terminal, and texts that fit a terminal."""

import os
import shutil
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any, TextIO


class Output:
    """A text stream that never fails: after the first failure, everything written to its descriptor is dropped."""

    def __init__(self, stream: TextIO) -> None:
        """Wrap a stream such as `sys.stdout`."""
        self._stream = stream
        self.problem: OSError | None = None
        """The first failure."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text; returns its length."""
        self._attempt(partial(self._stream.write, text))
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[[], object]) -> None:
        try:
            action()
        except OSError as problem:
            self.problem = self.problem or problem
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())  # Otherwise flushing the buffer would fail again at exit.
            os.close(nowhere)


def say(text: str, file: TextIO | None = None, indent: int = 0) -> None:
    """Print a text, on a terminal in lines that break between words, and otherwise in one line.

    Args:
      text: sentences without line breaks.
      file: where to; by default `sys.stdout`.
      indent: blanks before all lines but the first.
    """
    file = file or sys.stdout
    if file.isatty():
        columns = shutil.get_terminal_size().columns
        wrapped = textwrap.TextWrapper(columns, break_long_words=False, break_on_hyphens=False)
        wrapped.subsequent_indent = " " * indent
        text = wrapped.fill(text)
    print(text, file=file, flush=True)
