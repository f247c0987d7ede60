"""The arrays of workers in the files of a checkpoint, of which a process may have saved parts."""

import io
import math
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Box = list[tuple[int, int]]
"""From where to where a part of an array goes along each of its axes."""


class SavedArray(NamedTuple):
    """Name and type of an array of one worker's state."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def arrays_of(state: Any) -> list[SavedArray]:
    """The arrays of one worker's state, from the state of all workers."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return [SavedArray(jax.tree_util.keystr(path), x.dtype.name, x.shape[2:]) for path, x in leaves]


def loaded(opened: BinaryIO) -> np.lib.npyio.NpzFile:
    """The arrays in a file; none may claim to be larger than the file, in which nothing is compressed.

    Raises:
      ValueError: if one does.
    """
    size = opened.seek(0, io.SEEK_END)
    with zipfile.ZipFile(opened) as archive:
        for member in archive.infolist():
            with archive.open(member) as array:
                np.lib.format.read_magic(array)
                shape, _, dtype = np.lib.format.read_array_header_1_0(array)
            claimed = max(member.file_size, math.prod(shape) * dtype.itemsize)
            if claimed > size:
                raise ValueError(f"{member.filename} claims {claimed:,} bytes in a file of {size:,}")
    opened.seek(0)
    return np.load(opened)


class Part(NamedTuple):
    """What one process has saved of a worker."""

    row: np.ndarray
    """The bytes of its arrays, or of a part of each, one after the other."""
    ends: np.ndarray | None
    """The start and the end of the parts along each axis of each array, [axis, 2]; None: they are whole."""

    def values(self, arrays: list[SavedArray]) -> Iterator[tuple[Box, np.ndarray]]:
        """Where the part of each array goes, and its values.

        Raises:
          ValueError: if they are not parts of these arrays.
        """
        whole = [(0, n) for array in arrays for n in array.shape]
        ends = whole if self.ends is None else [(int(start), int(end)) for start, end in self.ends]
        if len(ends) != len(whole) or not all(0 <= a <= b <= n for (a, b), (_, n) in zip(ends, whole, strict=True)):
            raise ValueError("there are parts of other arrays")
        axes, first = iter(ends), 0
        for array in arrays:
            box, dtype = [next(axes) for _ in array.shape], jnp.dtype(array.dtype)
            shape = [end - start for start, end in box]
            last = first + math.prod(shape) * dtype.itemsize
            yield box, self.row[first:last].view(dtype).reshape(shape)
            first = last
        if first != self.row.size:
            raise ValueError("there are more bytes than the arrays take")


def joined(parts: list[Part], arrays: list[SavedArray]) -> list[np.ndarray]:
    """The arrays of one worker, from all parts of them; where processes have saved the same, one of both.

    Raises:
      ValueError: if parts are missing, or are not parts of these arrays.
    """
    if len(parts) == 1 and parts[0].ends is None:
        return [values for _, values in parts[0].values(arrays)]
    whole = [np.empty(array.shape, jnp.dtype(array.dtype)) for array in arrays]
    missing, seen = [array.size for array in whole], set[tuple]()
    for part in parts:
        for i, (box, values) in enumerate(part.values(arrays)):
            whole[i][tuple(slice(*ends) for ends in box)] = values
            if (i, *box) not in seen:
                seen.add((i, *box))
                missing[i] -= values.size
    if any(missing):
        raise ValueError("parts of a worker are missing")
    return whole
