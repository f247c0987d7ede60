"""The board on which asynchronous workers post themselves and from which they fetch their leaders' models."""

import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax


class Gone(Exception):  # noqa: N818 - the worker is, and nothing is wrong here.
    """A worker's parameters can't be had: its process has ended, hangs, or can't be reached."""


class Post(NamedTuple):
    """What a worker shows the others."""

    life: int
    """The worker's, from 1; it has one more after each replacement."""
    step: int
    """Local steps that the worker had taken when it posted, in all its lives."""
    score: float
    eligible: bool
    """Whether it can be elected: all its parameters are finite and, in a replacement, its window of losses is full."""
    params: Any
    """Its `Model`, with all that goes with the parameters, by reference; None if it is in another process."""


class Board:
    """The board of one process: nothing is copied until a worker fetches its leader's model."""

    def __init__(self, life: int = 1) -> None:
        """Start with an empty board.

        Args:
          life: of the workers of this process.
        """
        self.life = life
        self._lock = threading.Lock()
        self._posts: dict[int, Post] = {}
        self._steps: dict[int, int] = {}

    def write(self, position: int, step: int, post: Post | None) -> None:
        """Write a worker's steps in all its lives, and replace its last post unless `post` is None."""
        with self._lock:
            self._steps[position] = step
            if post is not None:
                self._posts[position] = post

    def read(self) -> tuple[dict[int, Post], dict[int, int]]:
        """The last posts of the workers that are alive, and the steps of all workers that have ever written any."""
        with self._lock:
            return dict(self._posts), dict(self._steps)

    def take(self, position: int, post: Post, device: jax.Device) -> tuple[Any, Post]:
        """The newest model of a worker, on a device, and the post that it is of.

        Args:
          position: of the worker.
          post: its post, as read.
          device: where the model is to be.

        Raises:
          Gone: if it can't be had.
        """
        return jax.device_put(post.params, device), post

    def close(self) -> None:
        """Serve no more requests."""


def ranked(posts: Mapping[int, Post]) -> list[int]:
    """The positions of those who may lead, the best first: by score, ties to the lower position."""
    able = [position for position, post in posts.items() if post.eligible and math.isfinite(post.score)]
    return sorted(able, key=lambda position: (posts[position].score, position))
