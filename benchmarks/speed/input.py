"""What the way of the examples to the network costs, on one core.

    python -m benchmarks.speed.input

For CIFAR-10's shapes: the indices of a batch, their transfer, and the 8-bit images' crops, flips and normalisation on
the device, beside a training step of CNN7 on as many examples, on the same core; the control times the step twice. And
how many JPEG files of ImageNet's usual size the stream of ImageNet decodes. All examples are made up.
"""

import argparse
import io
import os
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from PIL import Image

from benchmarks.speed.interleaved import ratio, report, time_interleaved
from lsgd_jax.data import BatchIndices, Data, feed_of, imagenet
from lsgd_jax.data.preprocessing import CIFAR10
from lsgd_jax.models import CNN7

BATCH, EXAMPLES = 128, 50_000
JPEG_SIZE, JPEGS = (500, 375), 64


class OnCpu:
    """A program that notes how much of the processor's time it takes."""

    def __init__(self, program: Callable[[], Any], samples: int) -> None:
        self._program, self._samples, self._seconds = program, samples, list[float]()

    def __call__(self) -> None:
        """Run it."""
        start = time.process_time()
        self._program()
        self._seconds.append(time.process_time() - start)

    def samples_per_second(self) -> int:
        """Of the processor's time; the first run, which compiles, does not count."""
        return round(self._samples / np.median(self._seconds[1:]))


def input_program(batches: int) -> Callable[[], None]:
    """Some batches from their indices to the network's input, as a training run makes them."""
    rng = np.random.default_rng(0)
    images = jax.device_put(rng.integers(0, 256, (EXAMPLES, 32, 32, 3), dtype=np.uint8))
    indices = BatchIndices(examples=EXAMPLES, workers=1, batch_size=BATCH, sampling="shards", seed=0)
    steps = iter(range(10**9))

    @jax.jit
    def examples(images: jax.Array, batch: jax.Array, step: jax.Array) -> jax.Array:
        return CIFAR10.training(images[batch], jax.random.fold_in(jax.random.key(0), step))

    def run() -> None:
        for step in (next(steps) for _ in range(batches)):
            x = examples(images, jax.device_put(indices(step)[0]), step)
        jax.block_until_ready(x)

    return run


def step_program() -> Callable[[], None]:
    """A training step of CNN7 on a batch that is ready."""
    graphdef, params, rest = nnx.split(CNN7((28, 28, 3), 10, rngs=nnx.Rngs(0)), nnx.Param, ...)
    tx = optax.sgd(0.01, 0.9, nesterov=True)
    x = jax.random.normal(jax.random.key(0), (BATCH, 28, 28, 3))
    y = jnp.arange(BATCH) % 10

    @jax.jit
    def step(params: nnx.State, state: optax.OptState, key: jax.Array) -> tuple:
        def loss(params: nnx.State) -> jax.Array:
            logits = nnx.merge(graphdef, params, rest, copy=True)(x, rngs=nnx.Rngs(dropout=key))
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    return lambda: jax.block_until_ready(step(params, state, jax.random.key(1)))


class Jpegs:
    """Examples like ImageNet's, in memory."""

    def __init__(self) -> None:
        rng, (width, height) = np.random.default_rng(0), JPEG_SIZE
        self._files = []
        for _ in range(JPEGS):
            coarse = Image.fromarray(rng.integers(0, 256, (height // 25, width // 25, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize(JPEG_SIZE), np.int16)
            image = np.clip(smooth + rng.normal(0, 8, smooth.shape), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(file := io.BytesIO(), "JPEG", quality=90)
            self._files.append(file.getvalue())
        self.kilobytes = round(sum(map(len, self._files)) / JPEGS / 1000)

    def __len__(self) -> int:
        return JPEGS

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [{"image": self._files[index], "label": 0} for index in indices]


def imagenet_program(source: Jpegs) -> Callable[[], None]:
    """An epoch of the stream of ImageNet, decoded in this process."""
    with mock.patch.object(imagenet, "encoded_examples", return_value=source):
        images = imagenet.ImageNet("train")
    indices = BatchIndices(examples=len(images), workers=2, batch_size=8, sampling="shards", seed=0)
    feed = feed_of(Data(images, images), indices, range(2))

    def run() -> None:
        for _ in feed.batches(0, indices.steps_per_epoch):
            pass

    return run


def main() -> None:
    """Time, print and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, help="times that everything is timed")
    rounds = parser.parse_args().rounds
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    batches, jpegs, step = 20, Jpegs(), step_program()
    programs = {
        "step": OnCpu(step, BATCH),
        "control": OnCpu(step, BATCH),
        "input": OnCpu(input_program(batches), batches * BATCH),
        "ImageNet": OnCpu(imagenet_program(jpegs), JPEGS),
    }
    seconds = time_interleaved(dict(programs), rounds)
    results = {
        "control / a training step of CNN7": ratio(seconds["control"], seconds["step"]),
        "input / a training step of CNN7 on as many examples": ratio(seconds["input"] / batches, seconds["step"]),
    }
    samples = {name: program.samples_per_second() for name, program in programs.items()}
    settings = {
        "batch": BATCH,
        "rounds": rounds,
        "samples per second of one core": samples,
        "a JPEG": f"{JPEG_SIZE[0]} x {JPEG_SIZE[1]}, {jpegs.kilobytes} kB",
    }
    print(f"samples per second of one core: {samples}")
    report("input", results, settings)


if __name__ == "__main__":
    main()
