"""The board on which asynchronous workers post themselves and from which they fetch their leaders' models."""

import math
import threading
from collections.abc import Callable, Mapping
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
        self.unanswered = False
        """Whether other processes had joined the run before this one, and none of them answered it."""
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

    def living(self) -> set[int]:
        """The positions of the workers whose processes are alive."""
        return set(self.read()[1])

    def oldest(self) -> str | None:
        """The address of the living process that has been in the run for the longest time; None if it is this one."""
        return None

    @property
    def replaced(self) -> bool:
        """Whether a newer life of a worker of this process has begun elsewhere, so that this process has to end."""
        return False

    def serve(self, function: Callable[[Any], Any], like: Any) -> None:
        """Let other processes call a function here.

        Args:
          function: from a tree of arrays to a tree of arrays like it.
          like: such a tree, or its shapes and dtypes.
        """

    def call(self, address: str, tree: Any) -> Any:
        """The result of the function that another process serves.

        Args:
          address: of the process.
          tree: arrays like those that it serves.

        Raises:
          Gone: if it does not come in time; the function may have been called.
        """
        raise Gone(address)

    def close(self) -> None:
        """Serve no more requests."""


def ranked(posts: Mapping[int, Post]) -> list[int]:
    """The positions of those who may lead, the best first: by score, ties to the lower position."""
    able = [position for position, post in posts.items() if post.eligible and math.isfinite(post.score)]
    return sorted(able, key=lambda position: (posts[position].score, position))
