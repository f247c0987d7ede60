"""A board of several processes without a coordinator: each serves its own workers, and tells others what it knows.

Every process beats: ten times a second it exchanges all that it knows with another one, chosen at random. Processes
find each other by files in the run's folder. A worker is taken for dead when its process refuses connections, or was
silent for `SILENCE` beats of this process: time in which this process itself was stopped does not count. Parameters
stay where they are until they are fetched from there.
"""

import asyncio
import concurrent.futures
import itertools
import math
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from lsgd_jax.asynchronous import membership
from lsgd_jax.asynchronous.board import Board, Gone, Post
from lsgd_jax.asynchronous.membership import Entry, View
from lsgd_jax.asynchronous.rendezvous import addresses_in, begin_life
from lsgd_jax.asynchronous.transport import Endpoint, Faults

BEAT = 0.1
"""Seconds between two beats."""
QUIET, SILENCE = 5, 10
"""Beats without news of a worker after which its process is asked directly, and after which it is taken for dead."""
SEARCH = 20
"""Beats between two looks for new processes in the run's folder."""


class Member(NamedTuple):
    """A process of the run that is alive."""

    positions: tuple[int, ...]
    """Of its workers."""
    life: int
    address: str
    since: float
    """When it began, in seconds since the epoch, by the clock of its host, but after all whom it knew then."""


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
          log: takes the name of an event and its values, in a thread of the board's own: "alive" and "dead" with a
            worker, its life, the time in `seconds` since the epoch, and the first worker of this process (`seen_by`);
            "dropped" with where a connection came from and why it was dropped. All have the steps of all workers that
            are known (`count`).

        Raises:
          UsageError: if it can't listen there, or the folder can't be written.
        """
        super().__init__()
        self._folder, self._own, self._log = folder / "members", tuple(positions), log
        self._like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        self._view: View = {}
        self._heard: dict[int, int] = {}
        """Own beat at which each worker's newest version came."""
        self._unreachable: set[str] = set()
        """Addresses that have refused connections, or not sent parameters in time, and have not answered since."""
        self._alive: dict[int, tuple[int, str]] = {}
        """Life and address of each worker of other processes that was alive at the last beat."""
        self._beat, self._contacts = 0, dict[str, asyncio.Task[bool]]()
        self._asking: dict[str, set[asyncio.Task]] = {}
        """Tasks that wait for arrays, by the address that they have asked."""
        self._serving: tuple[Any, Callable[[Any], Any]] | None = None
        self._endpoint = Endpoint(
            self._answer, room=self._room, secret=secret, host=host, faults=faults, closed=self._contact, log=self._note
        )
        self.address = self._endpoint.address
        """host:port, at which others reach this process."""
        try:
            self.life = begin_life(self._folder, self._own, self.address)
            self._endpoint.start(self._learn()).result()
        except BaseException:
            self._endpoint.close()
            raise
        # Clocks of hosts differ, but who comes later is never the older.
        self._since = max([time.time(), *(entry.since + 1e-6 for entry in self._view.values())])
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

    def living(self) -> set[int]:
        """The positions of the workers whose processes are alive."""
        return {position for member in self.members() for position in member.positions}

    def oldest(self) -> str | None:
        """The address of the living process that has been in the run for the longest time; None if it is this one."""
        address = self.members()[0].address
        return None if address == self.address else address

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
        params, taken = self._wait(f"worker {position}", self._fetch(position))
        return jax.device_put(params, device), taken

    def serve(self, function: Callable[[Any], Any], like: Any) -> None:
        """Let others call a function here, in a thread of its own for each call.

        Args:
          function: from a tree of NumPy arrays to a tree of arrays like it.
          like: such a tree, or its shapes and dtypes.
        """
        self._serving = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like), function

    def call(self, address: str, tree: Any) -> Any:
        """Call the function that a process serves.

        Args:
          address: of a member.
          tree: arrays like those that it serves.

        Returns:
          Its result, in NumPy arrays.

        Raises:
          Gone: if it does not come within the deadline that its size is granted; the function may have been called.
        """
        if address == self.address and self._serving is not None:
            return self._serving[1](tree)
        return self._wait(address, self._call(address, tree))

    def _wait(self, whom: str, coroutine: Coroutine) -> Any:
        try:
            return self._endpoint.start(coroutine).result()
        except (OSError, ValueError, concurrent.futures.CancelledError) as error:
            raise Gone(f"{whom}: {str(error) or type(error).__name__}") from None

    def close(self) -> None:
        """Leave: others see this process as dead at once."""
        self._endpoint.close()

    # What follows runs in the endpoint's thread.

    async def _learn(self) -> None:
        """Hear from all processes in the folder."""
        await self._search()
        answered = await asyncio.gather(*self._contacts.values())
        self.unanswered = bool(answered) and not any(answered)

    async def _beats(self) -> None:
        """Exchange views forever."""
        searching = asyncio.create_task(self._search())
        while True:
            self._beat += 1
            with self._lock:
                own = {position: self._entry(position) for position in self._own}
            self._view = membership.merge(self._view, own)
            self._note_lives()
            for address in self._due():
                self._contact(address)
            if searching.done() and self._beat % SEARCH == 0:
                searching = asyncio.create_task(self._search())
            await asyncio.sleep(BEAT)

    async def _search(self) -> None:
        """Contact the processes in the folder of whom nothing was heard yet; the file system may be slow."""
        known = {entry.address for entry in self._view.values()} | {self.address}
        for address in await asyncio.to_thread(addresses_in, self._folder) - known:
            self._contact(address)

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
        if self._beat == 1:  # All are to know that this process lives.
            due |= others
        for addresses in (others - self._unreachable, others & self._unreachable):
            if addresses:
                due.add(random.choice(sorted(addresses)))
        return due - {self.address}

    def _contact(self, address: str) -> None:
        """Exchange views with a process, unless that is under way."""
        if address not in self._contacts:
            self._contacts[address] = asyncio.create_task(self._exchange(address))

    async def _exchange(self, address: str) -> bool:
        """Exchange views with a process; returns whether it has answered."""
        try:
            self._hear(membership.parse(await self._endpoint.ask(address, {"view": membership.dump(self._view)})))
            self._unreachable.discard(address)
            return True
        except TimeoutError:
            return False  # Silence tells, and on a loaded machine there may be none.
        except (OSError, ValueError):
            self._unreachable.add(address)
            return False
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
        """Log who has died and who lives, and give up what is being fetched from the dead."""
        view = self._view
        alive = {
            position: (entry.life, entry.address)
            for position, entry in view.items()
            if position not in self._own and self._lives(position, entry)
        }
        for position, (life, address) in self._alive.items() - alive.items():
            for task in self._asking.get(address, ()):
                task.cancel()
            self._note("dead", worker=position, life=life, seconds=time.time(), seen_by=self._own[0])
        for position, (life, _) in alive.items() - self._alive.items():
            self._note("alive", worker=position, life=life, seconds=time.time(), seen_by=self._own[0])
        self._alive = alive

    def _note(self, event: str, **values: Any) -> None:
        others = sum(entry.step for position, entry in self._view.items() if position not in self._own)
        with self._lock:
            count = others + sum(self._steps.values())
        self._log(event, count=count, **values)

    def _room(self, request: Any) -> list[np.ndarray]:
        if request != "call" or self._serving is None:
            raise ValueError("nothing here takes arrays")
        return _bytes_of(_aligned(self._serving[0]))

    async def _answer(self, request: Any, arrays: Sequence[np.ndarray]) -> tuple[Any, Sequence[np.ndarray]]:
        match request:
            case {"view": view}:
                self._hear(membership.parse(view))
                return membership.dump(self._view), ()
            case {"take": int(position)}:
                with self._lock:
                    post = self._posts.get(position)
                if post is None:
                    return None, ()
                return [post.life, *_told(post)], await asyncio.to_thread(_bytes_of, post.params)
            case "call" if arrays and self._serving is not None:
                like, function = self._serving
                return True, await asyncio.to_thread(lambda: _bytes_of(function(_of_bytes(arrays, like))))
        raise ValueError(f"not a request: {str(request)[:200]}")

    async def _fetch(self, position: int) -> tuple[optax.Params, Post]:
        if (entry := self._view.get(position)) is None:
            raise ConnectionError("nobody knows it")
        params = _aligned(self._like)
        match await self._ask(entry.address, {"take": position}, (), _bytes_of(params)):
            case [int(life), int(step), float(score), bool(eligible)]:
                return params, Post(life, step, score, eligible, None)
        raise ConnectionError("it has not posted any")

    async def _call(self, address: str, tree: Any) -> Any:
        result = _aligned(tree)
        if await self._ask(address, "call", await asyncio.to_thread(_bytes_of, tree), _bytes_of(result)) is None:
            raise ConnectionError("it has answered nothing")
        return result

    async def _ask(self, address: str, request: Any, arrays: Sequence[np.ndarray], into: Sequence[np.ndarray]) -> Any:
        """Ask for arrays; cancelled when the process is seen dead."""
        task = asyncio.current_task()
        assert task is not None
        asking = self._asking.setdefault(address, set())
        asking.add(task)
        try:
            return await self._endpoint.ask(address, request, arrays, into)
        except OSError:
            self._unreachable.add(address)
            self._contact(address)
            raise
        finally:
            asking.discard(task)
            if not asking:
                self._asking.pop(address, None)


def _told(post: Post) -> tuple[int, float, bool]:
    """Step, score and eligibility as others are told: NaN has no place in an order."""
    return int(post.step), math.inf if math.isnan(post.score) else float(post.score), bool(post.eligible)


def _bytes_of(tree: Any) -> list[np.ndarray]:
    """The bytes of arrays; on a CPU they are not copied."""
    return [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in jax.tree.leaves(tree)]


def _of_bytes(arrays: Sequence[np.ndarray], like: Any) -> Any:
    """Inverse of `_bytes_of`."""
    leaves, structure = jax.tree.flatten(like)
    views = [array.view(x.dtype).reshape(x.shape) for array, x in zip(arrays, leaves, strict=True)]
    return jax.tree.unflatten(structure, views)


def _aligned(like: Any) -> Any:
    """Uninitialized arrays at multiples of 64 bytes: JAX uses such an array on a CPU without copying it."""
    sizes = [math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(like)]
    starts = [0, *itertools.accumulate(-(-size // 64) * 64 for size in sizes)]
    whole = np.empty(starts[-1] + 64, np.uint8)
    whole = whole[-whole.ctypes.data % 64 :]
    return _of_bytes([whole[start : start + size] for start, size in zip(starts, sizes, strict=False)], like)
