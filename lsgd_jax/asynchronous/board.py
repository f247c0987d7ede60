"""The board on which asynchronous workers post themselves and from which they fetch their leaders' models."""

import math
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax


class Gone(Exception):  # noqa: N818 - it is the worker that is gone.
    """A worker's parameters can't be had: its process has ended, or does not answer in time."""


class Post(NamedTuple):
    """What a worker shows the others."""

    life: int
    """Of the worker: 1 at first, one more after each replacement."""
    step: int
    """Steps that the worker had taken, in all its lives, when it posted."""
    score: float
    eligible: bool
    """Whether it may lead: all its parameters are finite and, after a replacement, its window of losses is full."""
    params: Any
    """Its `Model`, by reference; None if it is in another process."""


class Board:
    """The board of one process: nothing is copied until a worker fetches its leader's model."""

    def __init__(self, life: int = 1, steps: Mapping[int, int] | None = None) -> None:
        """Start with an empty board.

        Args:
          life: of the workers.
          steps: that workers have taken in earlier lives, by position.
        """
        self.life = life
        self._lock = threading.Lock()
        self._posts: dict[int, Post] = {}
        self._steps = dict(steps or {})

    def write(self, position: int, step: int, post: Post | None) -> None:
        """Write a worker's steps so far, and replace its last post unless `post` is None."""
        with self._lock:
            self._steps[position] = step
            if post is not None:
                self._posts[position] = post

    def read(self) -> tuple[dict[int, Post], dict[int, int]]:
        """The last posts of the living workers, and the steps that each worker ever known has taken, by position."""
        with self._lock:
            return dict(self._posts), dict(self._steps)

    def take(self, position: int, post: Post, device: jax.Device) -> tuple[Any, Post]:
        """A worker's model on a device, and the post that it is of.

        Args:
          position: of the worker.
          post: of the worker, as read; its model may be a newer one.
          device: of the worker who takes it.

        Raises:
          Gone: if it can't be had in time.
        """
        return jax.device_put(post.params, device), post

    def close(self) -> None:
        """Serve no more requests."""


def ranked(posts: Mapping[int, Post]) -> list[int]:
    """The positions of those who may lead, the best first: by score, ties to the lower position."""
    able = [position for position, post in posts.items() if post.eligible and math.isfinite(post.score)]
    return sorted(able, key=lambda position: (posts[position].score, position))
