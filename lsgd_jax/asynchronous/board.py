"""The board on which asynchronous workers post themselves and from which they fetch their leaders' parameters."""

import itertools
import socket
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax._src.distributed import global_state
from jax.sharding import SingleDeviceSharding

from lsgd_jax.errors import UsageError


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
    """Whether it can be elected: all its parameters are finite, and its window of losses is full in this life."""
    params: optax.Params | None
    """Those of its `Model`, by reference; None if they are in another process."""


class Board:
    """The board of one process: nothing is copied until a worker fetches its leader's parameters."""

    life = 1
    """Of the workers of this process."""

    def __init__(self) -> None:
        """Start with an empty board."""
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

    def take(self, position: int, post: Post, device: jax.Device) -> tuple[optax.Params, Post]:
        """The newest parameters of a worker, on a device, and the post that they are of.

        Args:
          position: of the worker.
          post: its post, as read.
          device: where the parameters are to be.

        Raises:
          Gone: if they can't be had.
        """
        return jax.device_put(post.params, device), post

    def close(self) -> None:
        """Serve no more requests."""


class SharedBoard(Board):
    """The board of several processes.

    Posts without parameters are in the key-value store of JAX's coordination service. Parameters stay where they are
    until they are requested: then a thread of the owning process offers the worker's newest posted parameters through
    its transfer server, and the requesting process fetches them from there. No worker waits for another.
    """

    _numbers = itertools.count()

    def __init__(self, owners: Sequence[int], like: optax.Params) -> None:
        """Start with an empty board and publish this process's address.

        Args:
          owners: the process of each worker.
          like: one worker's parameters, or their shapes and dtypes.

        Raises:
          UsageError: if this JAX can't send arrays from one process to another.
        """
        super().__init__()
        assert global_state.client is not None  # Where there are several processes, they are connected.
        self._store = global_state.client
        self._owners, self._like, self._own = owners, like, global_state.process_id
        self._name = f"lsgd_jax/board/{next(self._numbers)}"  # All processes create theirs in the same order.
        try:
            from jax.experimental.transfer import start_transfer_server

            address = f"{_own_address()}:0"
            self._server = start_transfer_server(jax.local_devices()[0].client, address, [address])
        except (ImportError, RuntimeError, NotImplementedError) as error:
            raise UsageError(
                f"this JAX can't send arrays between processes for posted ({error}): use joined."
            ) from None
        self._store.key_value_set(f"{self._name}/addresses/{self._own}", self._server.address())
        self._connections: dict[int, Any] = {}
        self._serving = threading.Thread(target=self._serve, daemon=True)
        self._serving.start()

    def write(self, position: int, step: int, post: Post | None) -> None:
        """Write as in one process; costs one message."""
        super().write(position, step, post)
        last = self._posts.get(position)
        posted = "" if last is None else f" {last.step} {last.score!r} {int(last.eligible)}"
        self._store.key_value_set(f"{self._name}/posts/{position}", f"{step}{posted}", allow_overwrite=True)

    def read(self) -> tuple[dict[int, Post], dict[int, int]]:
        """Read as in one process; costs one message."""
        posts, steps = super().read()
        for key, value in self._store.key_value_dir_get(f"{self._name}/posts/"):
            position = int(key.rpartition("/")[2])
            if self._owners[position] != self._own:
                step, *posted = value.split()
                steps[position] = int(step)
                if posted:
                    posts[position] = Post(1, int(posted[0]), float(posted[1]), posted[2] == "1", None)
        return posts, steps

    def take(self, position: int, post: Post, device: jax.Device) -> tuple[optax.Params, Post]:
        """A worker's parameters on a device; from another process, the newest that the worker has posted."""
        if post.params is not None:
            return super().take(position, post, device)
        owner = self._owners[position]
        number = self._ask(owner, str(position))
        sharding = SingleDeviceSharding(device)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), self._like)
        return self._connection(owner).pull(number, shapes), post

    def close(self) -> None:
        """Serve no more requests; call it when no worker of any process fetches any more."""
        self._ask(self._own, "")
        self._serving.join()

    def _ask(self, owner: int, what: str) -> int:
        requests = f"{self._name}/requests/{owner}"
        number = self._store.key_value_increment(f"{requests}/count", 1)
        self._store.key_value_set(f"{requests}/{number}", what)
        return number

    def _connection(self, owner: int) -> Any:
        with self._lock:
            if owner not in self._connections:
                address = self._store.blocking_key_value_get(f"{self._name}/addresses/{owner}", 60_000)
                self._connections[owner] = self._server.connect(address)
            return self._connections[owner]

    def _serve(self) -> None:
        for number in itertools.count(1):
            key = f"{self._name}/requests/{self._own}/{number}"
            position = self._wanted(key)
            if not position:
                return
            self._store.key_value_delete(key)
            self._server.await_pull(number, super().read()[0][int(position)].params)

    def _wanted(self, key: str) -> str:
        while True:
            try:
                return self._store.blocking_key_value_get(key, 60_000)
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):  # The service has ended, and the run with it.
                    return ""


def _own_address() -> str:
    """The address at which other processes reach this one: where it reaches the coordination service from."""
    host, _, port = str(global_state.coordinator_address).rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # Nothing is sent.
        return probe.getsockname()[0]
