"""ImageNet input pipeline: several processes decode images while the workers train.

`BatchIndices` determines the examples of a step, whatever the number of processes, so training can resume from any
step. Images are 8-bit, for `lsgd_jax.data.preprocessing.IMAGENET`.
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
    """Batches of randomly cropped and flipped training images for all workers.

    `BatchIndices` determines the examples, as for data in memory.
    """

    def __init__(
        self,
        data_dir: Path | str | None = None,
        *,
        workers: int,
        batch_size: int,
        sampling: Literal["shards", "independent", "partitions"] = "shards",
        seed: int,
        held_out: float = 0.0,
        rows: Sequence[int] | None = None,
        image_size: int = 224,
    ) -> None:
        """Open the data set.

        Args:
          data_dir: folder in which imagenet2012 is prepared; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
          workers: number of workers in all groups.
          batch_size: examples per worker per step.
          sampling: how examples are assigned to workers; see `BatchIndices`.
          seed: random seed of shuffles, crops and flips.
          held_out: share of the training images held out for testing.
          rows: indices of the workers to feed; by default all. It does not affect the batches of a worker.
          image_size: side of the square images in pixels.

        Raises:
          UsageError: if the data set is not prepared, or has too few examples for one step.
        """
        self._source = encoded_examples("imagenet2012", "train", data_dir)
        self._kept = held_and_kept(len(self._source), held_out)[1] if held_out else np.arange(len(self._source))
        self._indices = BatchIndices(
            examples=len(self._kept), workers=workers, batch_size=batch_size, sampling=sampling, seed=seed
        )
        self.steps_per_epoch = self._indices.steps_per_epoch
        self._rows, self._seed, self._image_size = list(range(workers) if rows is None else rows), seed, image_size

    def of_workers(self, rows: Sequence[int]) -> "ImageNetStream":
        """Return a stream for the workers with these indices only."""
        stream = copy.copy(self)
        stream._rows, stream._indices = list(rows), copy.copy(self._indices)
        return stream

    def after(self, earlier: Sequence[Stretch]) -> "ImageNetStream":
        """Return a stream that continues after the steps of earlier workers; see `BatchIndices.after`."""
        stream = copy.copy(self)
        stream._indices = self._indices.after(earlier)
        return stream

    def epochs(self, step: int) -> float:
        """Return the number of epochs completed before a step."""
        return self._indices.epochs(step)

    def batch(self, step: int) -> Training:
        """Return the images and labels at a step, counted from 0, of the workers in `rows`; worker axis first."""
        indices = self._kept[self._indices(step)[self._rows]]
        x = np.empty((*indices.shape, self._image_size, self._image_size, 3), np.uint8)
        y = np.empty(indices.shape, np.int32)
        for i, worker in enumerate(self._rows):
            for j, example in enumerate(self._source.__getitems__(indices[i].tolist())):
                rng = np.random.default_rng([self._seed, step, worker, j])
                x[i, j], y[i, j] = _random_crop(example["image"], self._image_size, rng), example["label"]
        return x, y

    def batches(self, first: int, end: int, processes: int = 0) -> Iterator[Training]:
        """Yield the batches of steps [first, end), prefetched by `processes` processes."""
        return _ahead(self.batch, first, end, processes)


class ImageNetTest:
    """Validation images, or held-out training images, in chunks of one size, center-cropped."""

    def __init__(self, data_dir: Path | str | None = None, *, held_out: float = 0.0, image_size: int = 224) -> None:
        """Open the data set.

        Args:
          data_dir: folder in which imagenet2012 is prepared; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
          held_out: share of the training images to test on; 0: test on the validation images.
          image_size: side of the square images in pixels.

        Raises:
          UsageError: if the data set is not prepared, or the share holds out none or all of it.
        """
        self._source = encoded_examples("imagenet2012", "train" if held_out else "validation", data_dir)
        count = len(self._source)
        self._indices = held_and_kept(count, held_out)[0] if held_out else np.arange(count)
        self._image_size = image_size
        self.examples = len(self._indices)

    def chunk(self, size: int, number: int) -> Test:
        """Return the images and labels of a chunk, counted from 0; the last is padded with label -1."""
        x = np.zeros((size, self._image_size, self._image_size, 3), np.uint8)
        y = np.full(size, -1, np.int32)
        indices = self._indices[number * size : (number + 1) * size].tolist()
        for i, example in enumerate(self._source.__getitems__(indices)):
            x[i], y[i] = _central_crop(example["image"], self._image_size), example["label"]
        return x, y

    def chunks(self, size: int, processes: int = 0) -> Iterator[Test]:
        """Yield all images in chunks of one size, prefetched by `processes` processes."""
        return _ahead(partial(self.chunk, size), 0, -(-self.examples // size), processes)


def _ahead(make: Callable, first: int, end: int, processes: int) -> Iterator:
    flags.FLAGS.mark_as_parsed()  # Grain starts no process before: https://github.com/google/grain/issues/1355.
    numbers = grain.MapDataset.range(first, end).map(make)
    dataset = numbers.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))
    if processes:
        # Use pipes: batches in shared memory would outlive an abandoned iteration.
        through_pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
        dataset = grain.experimental.WithOptionsIterDataset(dataset, through_pipes)
        options = grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options, _end_with_parent)
    batches = iter(dataset)
    try:
        yield from batches
    finally:  # Also if the last batches are not consumed.
        batches.close()


def _end_with_parent(number: int, count: int) -> None:
    """Make this decoding process end exactly when the training process ends, however that ends."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None  # It has started this process.
        parent.join()  # Waits for a pipe that the kernel closes.
        os._exit(1)

    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # Sent to all processes of a terminal or a job.
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=watch, daemon=True).start()


def _random_crop(encoded: bytes, size: int, rng: np.random.Generator) -> np.ndarray:
    """Crop 8 % to 100 % of the area with an aspect ratio of 3:4 to 4:3, resize, and flip with probability 1/2."""
    image = Image.open(io.BytesIO(encoded))
    flipped = rng.random() < 0.5
    for _ in range(10):  # Crops that don't fit are resampled.
        area = rng.uniform(0.08, 1) * image.width * image.height
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left, top = (int(rng.integers(spare + 1)) for spare in (image.width - width, image.height - height))
            x = _scaled(image, (left, top, left + width, top + height), size)
            return x[:, ::-1] if flipped else x
    return _central_crop(encoded, size)


def _central_crop(encoded: bytes, size: int) -> np.ndarray:
    """Crop the central square, 224/256 of the shorter side, and resize."""
    image = Image.open(io.BytesIO(encoded))
    side = min(image.size) * 224 / 256
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return _scaled(image, (left, top, left + side, top + side), size)


def _scaled(image: Image.Image, box: tuple[float, float, float, float], size: int) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box))
