"""ImageNet, decoded on the way to the workers by several processes.

What the workers see at a step is that of `BatchIndices`, whatever the number of processes: training goes on from any
step by starting there. Images come out 8-bit, for `lsgd_jax.data.preprocessing.IMAGENET`.
"""

import copy
import io
import math
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import grain
import numpy as np
from absl import flags
from jaxtyping import Int32, UInt8
from PIL import Image

from lsgd_jax.data.preparation import encoded_examples
from lsgd_jax.data.sources import held_and_kept
from lsgd_jax.data.streams import BatchIndices, Stretch

Training = tuple[UInt8[np.ndarray, "workers batch size size 3"], Int32[np.ndarray, "workers batch"]]
Test = tuple[UInt8[np.ndarray, "chunk size size 3"], Int32[np.ndarray, " chunk"]]


class ImageNetStream:
    """The batches that all workers take, of randomly cropped and mirrored training images.

    Which examples they are tells `BatchIndices`, as for data in memory.
    """

    def __init__(
        self,
        data_dir: Path | str | None = None,
        *,
        workers: int,
        batch_size: int,
        sampling: Literal["shards", "independent"] = "shards",
        seed: int,
        held_out: float = 0.0,
        rows: Sequence[int] | None = None,
        image_size: int = 224,
    ) -> None:
        """Open the data.

        Args:
          data_dir: where imagenet2012 is prepared; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
          workers: in all groups together.
          batch_size: examples a worker takes a step.
          sampling: how the data reaches the workers, see `BatchIndices`.
          seed: of the shuffles, crops and flips.
          held_out: the share of the training images that is left for testing.
          rows: the workers whose batches are wanted; by default all. What they see does not depend on it.
          image_size: the side of the square images.

        Raises:
          UsageError: if the data are not prepared, or too few for one step.
        """
        self._source = encoded_examples("imagenet2012", "train", data_dir)
        self._kept = held_and_kept(len(self._source), held_out)[1] if held_out else np.arange(len(self._source))
        self._indices = BatchIndices(
            examples=len(self._kept), workers=workers, batch_size=batch_size, sampling=sampling, seed=seed
        )
        self.steps_per_epoch = self._indices.steps_per_epoch
        self._rows, self._seed, self._image_size = list(range(workers) if rows is None else rows), seed, image_size

    def of_workers(self, rows: Sequence[int]) -> "ImageNetStream":
        """The same stream for the workers at these positions alone."""
        stream = copy.copy(self)
        stream._rows, stream._indices = list(rows), copy.copy(self._indices)
        return stream

    def after(self, earlier: Sequence[Stretch]) -> "ImageNetStream":
        """The same stream once other workers have taken the first steps; see `BatchIndices.after`."""
        stream = copy.copy(self)
        stream._indices = self._indices.after(earlier)
        return stream

    def epochs(self, step: int) -> float:
        """Epochs that the workers have gone through before a step."""
        return self._indices.epochs(step)

    def batch(self, step: int) -> Training:
        """The images and labels at a step, counted from 0; the worker axis first, with the wanted workers."""
        indices = self._kept[self._indices(step)[self._rows]]
        x = np.empty((*indices.shape, self._image_size, self._image_size, 3), np.uint8)
        y = np.empty(indices.shape, np.int32)
        for i, worker in enumerate(self._rows):
            for j, example in enumerate(self._source.__getitems__(indices[i].tolist())):
                rng = np.random.default_rng([self._seed, step, worker, j])
                x[i, j], y[i, j] = _random_crop(example["image"], self._image_size, rng), example["label"]
        return x, y

    def batches(self, first: int, end: int, processes: int = 0) -> Iterator[Training]:
        """The batches from one step to before another, made ahead by so many processes."""
        return _ahead(self.batch, first, end, processes)


class ImageNetTest:
    """The validation images, or held-out training images, in chunks of one size, cropped to their centre."""

    def __init__(self, data_dir: Path | str | None = None, *, held_out: float = 0.0, image_size: int = 224) -> None:
        """Open the data.

        Args:
          data_dir: where imagenet2012 is prepared; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
          held_out: the share of the training images that is used in place of the validation images, if it is not 0.
          image_size: the side of the square images.

        Raises:
          UsageError: if the data are not prepared, or none are held out.
        """
        self._source = encoded_examples("imagenet2012", "train" if held_out else "validation", data_dir)
        count = len(self._source)
        self._indices = held_and_kept(count, held_out)[0] if held_out else np.arange(count)
        self._image_size = image_size
        self.examples = len(self._indices)

    def chunk(self, size: int, number: int) -> Test:
        """The images and labels of a chunk, counted from 0; what is missing in the last has the label -1."""
        x = np.zeros((size, self._image_size, self._image_size, 3), np.uint8)
        y = np.full(size, -1, np.int32)
        indices = self._indices[number * size : (number + 1) * size].tolist()
        for i, example in enumerate(self._source.__getitems__(indices)):
            x[i], y[i] = _central_crop(example["image"], self._image_size), example["label"]
        return x, y

    def chunks(self, size: int, processes: int = 0) -> Iterator[Test]:
        """All images in chunks of that size, made ahead by so many processes."""
        return _ahead(partial(self.chunk, size), 0, -(-self.examples // size), processes)


def _ahead(make: Callable, first: int, end: int, processes: int) -> Iterator:
    flags.FLAGS.mark_as_parsed()  # Of grain, which starts no process before: https://github.com/google/grain/issues/1355.
    numbers = grain.MapDataset.range(first, end).map(make)
    dataset = numbers.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    if processes:
        # Through pipes: batches in shared memory would outlive an iteration that is broken off.
        through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, through_pipes)
        options = grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, _end_with_parent)
    batches = iter(dataset)
    try:
        yield from batches
    finally:  # Also if the last batches are not taken.
        batches.close()


def _end_with_parent(number: int, count: int) -> None:
    """Let this process, which decodes images, end when the one that trains does, however it ends, and not before."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # Which has started this process.
        parent.join()  # A pipe that the kernel closes.
        os._exit(1)

    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # All of a terminal's or a job's processes get it.
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _random_crop(encoded: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """A part of 8 % to 100 % of the image's area and of sides 3:4 to 4:3, scaled, and mirrored half of the time."""
    image = Image.open(io.BytesIO(encoded))
    mirrored = rng.random() < 0.5
    for _ in range(10):  # Parts that don't fit are drawn anew.
        area = rng.uniform(0.08, 1) * image.width * image.height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = (int(rng.integers(spare + 1)) for spare in (image.width - width, image.height - height))
            x = _scaled(image, (left, top, left + width, top + height), size)
            return x[:, ::-1] if mirrored else x
    return _central_crop(encoded, size)


def _central_crop(encoded: bytes, size: int) -> np.ndarray:
    """The central square, of 224/256 of the shorter side, scaled."""
    image = Image.open(io.BytesIO(encoded))
    side = min(image.size) * 224 / 256
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return _scaled(image, (left, top, left + side, top + side), size)


def _scaled(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box))
