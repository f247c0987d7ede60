"""A board of several processes without a coordinator: each serves its own workers, and tells others what it knows.

Every process beats: ten times a second it exchanges all that it knows with another one, chosen at random. Processes
find each other by files in the run's folder. A worker is taken for dead when its process refuses connections, or was
silent for `SILENCE` beats of this process: time in which this process itself was stopped does not count. Parameters
stay where they are until they are fetched from there.
"""

import asyncio
import concurrent.futures
import contextlib
import itertools
import math
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lsgd_jax.asynchronous import membership
from lsgd_jax.asynchronous.board import Board, Gone, Post
from lsgd_jax.asynchronous.membership import Entry, View
from lsgd_jax.asynchronous.transport import Endpoint, Faults
from lsgd_jax.errors import UsageError

BEAT = 0.1
"""Seconds between two beats."""
QUIET, SILENCE = 5, 12
"""Beats without news of a worker after which its process is asked directly, and after which it is taken for dead."""
SEARCH = 20
"""Beats between two looks for new processes in the run's folder."""
_CLAIM = re.compile(r"worker-(\d{1,9})-life-(\d{1,9})")


class Member(NamedTuple):
    """A process of the run that is alive."""

    positions: tuple[int, ...]
    """Of its workers."""
    life: int
    address: str
    since: float
    """When it began, in seconds since the epoch, by the clock of its host."""


class GossipBoard(Board):
    """The board of several processes, any of which may die, hang or join."""

    def __init__(
        self,
        folder: Path,
        positions: Sequence[int],
        like: optax.Params,
        *,
        secret: bytes,
        host: str = "127.0.0.1",
        faults: Faults | None = None,
        log: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """Join the run: learn what others know, and begin a new life of this process's workers.

        Args:
          folder: of the run; the addresses of its processes are in its subfolder `members`.
          positions: of the workers of this process.
          like: one worker's parameters, or their shapes and dtypes.
          secret: of the run.
          host: address or name of the network interface at which to listen, and at which others reach this process.
          faults: injected into requests; None: none.
          log: takes the name of an event and its values, from any thread: "alive" and "dead" with a worker, its life,
            the time in `seconds` since the epoch, and the first worker of this process (`seen_by`); "dropped" with what
            came from a stranger.

        Raises:
          UsageError: if it can't listen there, or the folder can't be written.
        """
        super().__init__()
        self._folder, self._own, self._log = folder / "members", tuple(positions), log
        leaves, self._structure = jax.tree.flatten(like)
        self._like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves]
        self._view: View = {}
        self._heard: dict[int, int] = {}
        """Own beat at which each worker's newest version came."""
        self._unreachable: set[str] = set()
        self._alive: dict[int, int] = {}
        """Life of each worker that was last taken to be alive."""
        self._beat, self._contacts = 0, dict[str, asyncio.Task]()
        self._fetches: dict[str, set[asyncio.Task]] = {}
        self._endpoint = Endpoint(self._answer, secret=secret, host=host, faults=faults, closed=self._contact, log=log)
        self.address = self._endpoint.address
        self._since = time.time()
        self.life = _claim(self._folder, self._own, self.address)
        self._endpoint.start(self._learn()).result()
        self.steps = {position: self._view[position].step if position in self._view else 0 for position in self._own}
        """Steps of this process's workers in their earlier lives."""
        self._steps |= self.steps
        self._beating = self._endpoint.start(self._beats())

    @property
    def replaced(self) -> bool:
        """Whether a newer life of a worker of this process has begun elsewhere, so that this process has to end."""
        view = self._view
        return any(position in view and view[position].life > self.life for position in self._own)

    def members(self) -> list[Member]:
        """The processes that are alive, this one included, oldest first; all that know the same tell the same order."""
        members = [Member(self._own, self.life, self.address, self._since)]
        workers = sorted(
            (entry.address, position, entry)
            for position, entry in self._view.items()
            if position not in self._own and self._lives(position, entry)
        )
        for address, group in itertools.groupby(workers, lambda worker: worker[0]):
            positions, entries = zip(*((position, entry) for _, position, entry in group), strict=True)
            members.append(Member(positions, entries[0].life, address, entries[0].since))
        return sorted(members, key=lambda member: (member.since, member.positions))

    def read(self) -> tuple[dict[int, Post], dict[int, int]]:
        """The last posts of the workers that are alive, and the steps of all workers ever known; asks nobody."""
        if self._beating.done() and not self._beating.cancelled():
            self._beating.result()  # Raises what has ended it, such as a log that can't be written.
        posts, steps = super().read()
        for position, entry in self._view.items():
            if position not in self._own:
                steps[position] = entry.step
                if entry.posted_step >= 0 and self._lives(position, entry):
                    posts[position] = Post(entry.life, entry.posted_step, entry.score, entry.eligible, None)
        return posts, steps

    def take(self, position: int, post: Post, device: jax.Device) -> tuple[optax.Params, Post]:
        """The newest parameters of a worker, on a device, and the post that they are of.

        Raises:
          Gone: if they do not come within the deadline that their size is granted, or their process dies before.
        """
        if post.params is not None:
            return super().take(position, post, device)
        try:
            arrays, taken = self._endpoint.start(self._fetch(position)).result()
        except (OSError, ValueError, concurrent.futures.CancelledError) as error:
            raise Gone(f"worker {position}: {str(error) or type(error).__name__}") from None
        return jax.device_put(jax.tree.unflatten(self._structure, arrays), device), taken

    def close(self) -> None:
        """Leave: others see this process as dead at once."""
        self._endpoint.close()

    # What follows runs in the endpoint's thread.

    async def _learn(self) -> None:
        """Contact all processes in the folder."""
        for address in _addresses(self._folder) - {self.address}:
            self._contact(address)
        await asyncio.gather(*self._contacts.values())

    async def _beats(self) -> None:
        """Exchange views forever."""
        while True:
            self._beat += 1
            with self._lock:
                own = {position: self._entry(position) for position in self._own}
            self._view = membership.merge(self._view, own)
            self._note_lives()
            for address in self._due():
                self._contact(address)
            await asyncio.sleep(BEAT)

    def _entry(self, position: int) -> Entry:
        step, post = self._steps[position], self._posts.get(position)
        posted = (-1, 0.0, False) if post is None else _told(post)
        return Entry(self.life, self._beat, self._since, self.address, *posted, int(step))

    def _due(self) -> set[str]:
        """The addresses to contact at this beat."""
        others = {entry.address for entry in self._view.values()} - {self.address}
        self._unreachable &= others
        due = {
            entry.address
            for position, entry in self._view.items()
            if position not in self._own and self._silence(position) > QUIET
        }
        if self._beat % SEARCH == 0:
            due |= _addresses(self._folder) - others
        for addresses in (others - self._unreachable, others & self._unreachable):
            if addresses:
                due.add(random.choice(sorted(addresses)))
        return due - {self.address}

    def _contact(self, address: str) -> None:
        """Exchange views with a process, unless that is under way."""
        if address not in self._contacts:
            self._contacts[address] = asyncio.create_task(self._exchange(address))

    async def _exchange(self, address: str) -> None:
        try:
            answer = await self._endpoint.ask(address, {"view": membership.dump(self._view)})
            self._hear(membership.parse(answer))
            self._unreachable.discard(address)
        except (OSError, ValueError):
            self._unreachable.add(address)
            for fetch in self._fetches.get(address, ()):
                fetch.cancel()
        finally:
            del self._contacts[address]

    def _hear(self, view: View) -> None:
        """Merge what another process knows."""
        merged = membership.merge(self._view, view)
        for position, entry in merged.items():
            known = self._view.get(position)
            if known is None or entry[:2] > known[:2]:
                self._heard[position] = self._beat
                if known is None or entry.address != known.address:
                    self._contact(entry.address)
        self._view = merged

    def _silence(self, position: int) -> int:
        return self._beat - self._heard[position]

    def _lives(self, position: int, entry: Entry) -> bool:
        return self._silence(position) <= SILENCE and entry.address not in self._unreachable

    def _note_lives(self) -> None:
        """Log who has died, and who lives."""
        view = self._view
        alive = {
            position: e.life for position, e in view.items() if position not in self._own and self._lives(position, e)
        }
        for name, some, others in (("dead", self._alive, alive), ("alive", alive, self._alive)):
            for position, life in some.items():
                if others.get(position) != life:
                    self._log(name, worker=position, life=life, seconds=time.time(), seen_by=self._own[0])
        self._alive = alive

    async def _answer(self, request: Any) -> tuple[Any, Sequence[Any]]:
        match request:
            case {"view": view}:
                self._hear(membership.parse(view))
                return membership.dump(self._view), ()
            case {"take": int(position)}:
                with self._lock:
                    post = self._posts.get(position)
                if post is None:
                    return None, ()
                return [post.life, *_told(post)], _bytes_of(post.params)
        raise ValueError(f"not a request: {str(request)[:200]}")

    async def _fetch(self, position: int) -> tuple[list[np.ndarray], Post]:
        entry = self._view.get(position)
        if entry is None:
            raise ConnectionError("nobody knows it")
        task = asyncio.current_task()
        assert task is not None
        fetches = self._fetches.setdefault(entry.address, set())
        fetches.add(task)
        try:
            arrays = _aligned(self._like)
            match await self._endpoint.ask(
                entry.address, {"take": position}, [x.reshape(-1).view(np.uint8) for x in arrays]
            ):
                case [int(life), int(step), float(score), bool(eligible)]:
                    return arrays, Post(life, step, score, eligible, None)
            raise ConnectionError("it has not posted any")
        except OSError:
            self._contact(entry.address)
            raise
        finally:
            fetches.discard(task)


def _told(post: Post) -> tuple[int, float, bool]:
    """Step, score and eligibility as others are told: NaN has no place in an order."""
    return int(post.step), math.inf if math.isnan(post.score) else float(post.score), bool(post.eligible)


def _bytes_of(params: optax.Params) -> list[np.ndarray]:
    """Bytes of arrays, not copied on a CPU."""
    return [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in jax.tree.leaves(params)]


def _aligned(like: Sequence[jax.ShapeDtypeStruct]) -> list[np.ndarray]:
    """Uninitialized arrays at multiples of 64 bytes: JAX uses such an array on a CPU without copying it."""
    sizes = [int(np.prod(x.shape)) * x.dtype.itemsize for x in like]
    starts = np.cumsum([0, *(-(-size // 64) * 64 for size in sizes)])
    whole = np.empty(starts[-1] + 64, np.uint8)
    whole = whole[-whole.ctypes.data % 64 :]
    return [
        whole[start : start + size].view(x.dtype).reshape(x.shape)
        for x, start, size in zip(like, starts, sizes, strict=False)
    ]


def claims(folder: Path) -> Iterator[tuple[int, int, Path]]:
    """Position, life and file of every worker that has a file in the folder."""
    for path in folder.iterdir():
        if match := _CLAIM.fullmatch(path.name):
            yield int(match[1]), int(match[2]), path


def _claim(folder: Path, positions: Sequence[int], address: str) -> int:
    """Begin the next life of some workers, by files that nobody else can create; returns the life."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            older = [(life, path) for position, life, path in claims(folder) if position in positions]
            life = 1 + max((life for life, _ in older), default=0)
            created = []
            try:
                for position in positions:
                    path = folder / f"worker-{position}-life-{life}"
                    with path.open("x") as file:
                        created.append(path)
                        file.write(f"{address}\n")
            except FileExistsError:  # Another process has been faster.
                for path in created:
                    path.unlink()
                continue
            for _, path in older:
                path.unlink(missing_ok=True)
            return life
    except OSError as error:
        raise UsageError(
            f"{folder} can't be written ({error.strerror}): a process needs a file there to join."
        ) from None


def _addresses(folder: Path) -> set[str]:
    """The addresses of the newest lives of all workers that have a file in the folder."""
    newest: dict[int, tuple[int, Path]] = {}
    addresses = set()
    with contextlib.suppress(OSError):
        for position, life, path in claims(folder):
            newest[position] = max(newest.get(position, (0, path)), (life, path))
    for _, path in newest.values():
        with contextlib.suppress(OSError, ValueError):
            text = path.read_text()
            if text.endswith("\n"):  # Else it is being written.
                addresses.add(text.strip())
    return addresses
