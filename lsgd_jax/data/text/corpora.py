"""Texts as rows of tokens: the embedded tragedies, a user's own file, and corpora made by `lsgd data prepare`."""

import json
import lzma
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt

from lsgd_jax import files, spelling
from lsgd_jax.checks import check_path
from lsgd_jax.data.examples import Stream
from lsgd_jax.data.folders import data_folder
from lsgd_jax.errors import UsageError

TEST_SHARE = 0.1
"""Share of a user's own text, its end, that is for testing."""


class Corpus(NamedTuple):
    """A text in two parts, each a row of tokens, which may be a memory-mapped file."""

    train: UInt[np.ndarray, " train"]
    test: UInt[np.ndarray, " test"]
    vocabulary: int
    """Number of different tokens: all are smaller."""


class Windows(Stream):
    """A row of tokens as a stream of windows of equal length.

    Each window starts with the last token of the one before it, so that every token but the first is predicted once.

    Args:
      tokens: the row, in memory or a whole memory-mapped file.
      context: number of tokens of a window that are followed by a token in it.

    Example:
      >>> Windows(np.arange(8), context=3).read(np.array([1, 0]))
      array([[3, 4, 5, 6],
             [0, 1, 2, 3]])
    """

    def __init__(self, tokens: UInt[np.ndarray, " tokens"], context: int) -> None:
        self._tokens, self._context = tokens, context

    def __len__(self) -> int:
        """Return the number of windows; tokens at the end that fill none are left out."""
        return max(0, (len(self._tokens) - 1) // self._context)

    def read(self, indices: Int[np.ndarray, " windows"]) -> UInt[np.ndarray, "windows context+1"]:
        """Return some of the windows."""
        starts = np.asarray(indices, np.int64)[:, None] * self._context
        return self._tokens[starts + np.arange(self._context + 1)]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle a memory-mapped row by its file: pickled by itself, it would be copied."""
        tokens = self._tokens
        if isinstance(tokens, np.memmap):
            return _windows_of_file, (tokens.filename, tokens.dtype, tokens.offset, tokens.shape, self._context)
        return Windows, (tokens, self._context)


def _windows_of_file(path: Path, dtype: np.dtype, offset: int, shape: tuple[int, ...], context: int) -> Windows:
    return Windows(np.memmap(path, dtype, "r", offset, shape), context)


def load(text: str, data_dir: Path | str | None = None) -> Corpus:
    """Load a text; tokens of files are memory-mapped.

    Args:
      text: "tragedies"; a file, which is read byte by byte; or a folder in `data_dir` with tokens in train.npy and
        test.npy, as `lsgd data prepare` makes it.
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.

    Raises:
      UsageError: if there is no such text, it can't be read, or `data_dir` has no effect.
    """
    path = check_path("text", text)
    if text == "tragedies" or path.is_file():
        if data_dir is not None:
            raise UsageError(f"data_dir has no effect with the text {text}.")
        return _tragedies() if text == "tragedies" else _file(path)
    folder = data_folder(data_dir) / path
    if not folder.is_dir():
        known = ["tragedies", "dialects"]
        others = f"a file or, in {folder.parent}, a folder that lsgd data prepare has made"
        raise UsageError(spelling.unknown("text", text, known, f"name {', '.join(known)}, {others}"))
    return _folder(folder)


def _tragedies() -> Corpus:
    """Load seven tragedies of Shakespeare, byte by byte; the last one, Timon of Athens, is for testing."""
    packed = (resources.files("lsgd_jax.data.text") / "tragedies.txt.xz").read_bytes()
    text = lzma.decompress(packed)
    train, test = np.split(np.frombuffer(text, np.uint8), [text.index(b"Timon of Athens")])
    return Corpus(train, test, 128)


def _file(path: Path) -> Corpus:
    size = path.stat().st_size
    first = size - round(TEST_SHARE * size)
    try:
        train = np.memmap(path, np.uint8, "r", 0, (first,))
        test = np.memmap(path, np.uint8, "r", first, (size - first,))
    except (OSError, ValueError) as error:  # A part without a byte can't be mapped.
        raise UsageError(f"the text {path} of {size} bytes can't be read ({error}).") from None
    return Corpus(train, test, _vocabulary((train, test)))


def _folder(folder: Path) -> Corpus:
    parts = []
    for name in ("train.npy", "test.npy"):
        try:
            tokens = np.load(folder / name, mmap_mode="r")
        except (OSError, ValueError, EOFError) as error:
            raise UsageError(f"{folder / name} can't be read as an array ({error}).") from None
        if tokens.ndim != 1 or tokens.dtype.kind != "u":
            raise UsageError(
                f"{folder / name} must be a row of unsigned integers, got {tokens.dtype} of shape {tokens.shape}."
            )
        parts.append(tokens)
    try:
        vocabulary = int(json.loads(files.read_text(folder / "corpus.json"))["vocabulary"])
    except (OSError, ValueError, KeyError, TypeError):  # The tokens are not ours: look at all of them.
        vocabulary = _vocabulary(parts)
    train, test = parts
    return Corpus(train, test, vocabulary)


def _vocabulary(parts: Sequence[np.ndarray]) -> int:
    return 1 + max(int(tokens.max(initial=0)) for tokens in parts)
