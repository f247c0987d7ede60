"""Replay of a posted run from its events: every worker is trained again, in one process, and compared to the bit.

Events say which workers there were, where each of them started, and at which of its steps it was pulled towards which
snapshot of which leader. Everything else follows from the configuration, so the replay takes the same steps on the same
batches and the same pulls, with the code of the run itself. If processes died, hung or joined meanwhile and the bits
are equal all the same, these faults have changed who was there and nothing else.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsgd_jax import files
from lsgd_jax.asynchronous import Model
from lsgd_jax.asynchronous.exchanges import pulled_towards
from lsgd_jax.config import Config
from lsgd_jax.distributed import SHARED, place
from lsgd_jax.errors import UsageError
from lsgd_jax.exchange import NOBODY
from lsgd_jax.methods import METHODS
from lsgd_jax.tracking.run_folder import MOST_BYTES, making_sense_of, read_config, read_metrics
from lsgd_jax.train.asynchronous_step import local_step
from lsgd_jax.train.asynchronous_workers import worker_optimizer, worker_rate_factor
from lsgd_jax.train.saved_worker import checksum
from lsgd_jax.train.setup import make_feed, make_model, step_key
from lsgd_jax.train.step import TrainState, init_state


class Replay(NamedTuple):
    """What was replayed and compared."""

    lives: int
    """Lives of workers: one per worker, and one more after each replacement."""
    steps: int
    """Local steps."""
    pulls: int
    """Pulls, each with the distance that was recorded at it."""
    checksums: int
    """Parameters whose checksum was recorded."""
    differences: list[str]
    """The first difference in each life that has one, as sentences."""

    def __str__(self) -> str:
        """The verdict, and a line per difference."""
        found = f"{self.steps:,} steps and {self.pulls:,} pulls of {self.lives} lives"
        if self.differences:
            return "\n".join([f"replayed {found}, which differ from the run's:", *self.differences])
        return f"replayed {found}: all distances and {self.checksums} checksums of parameters are equal to the bit"


class Snapshot(NamedTuple):
    """A worker as it posts itself: after one of its local steps, before its own pull there."""

    worker: int
    life: int
    step: int


class SavedState(NamedTuple):
    """A worker with its optimizer's state, as it is saved."""

    worker: int
    life: int
    step: int
    pulled: bool
    """Whether it is that after the pull at this step."""


class _Pull(NamedTuple):
    """A pull at one level."""

    level: str
    """Prefix of the event's fields."""
    leader: Snapshot
    strength: np.float32
    distance: float | None
    """As recorded."""


class _Life:
    """A worker from one of its starts to its end or death."""

    def __init__(self, start: Snapshot, source: Snapshot | SavedState | None) -> None:
        """Know nothing but the start, and from where it is if not from the start that all have in common."""
        self.start, self.source = start, source
        self.pulls: dict[int, list[list[_Pull]]] = {}
        """Of each exchange at a step."""
        self.checksums: dict[tuple[int, bool], str] = {}
        """By step, and whether it is that after the pull at this step."""
        self.last = start.step
        """The last step that is known of."""
        self.step = start.step
        self.state: TrainState | None = None
        """None until it has started."""
        self.batches: Iterator[Any] = iter(())
        self.key: jax.Array | None = None
        """Of its steps."""
        self.difference: str | None = None
        """The first one: later ones follow from it."""


def device_count(path: Path | str) -> int:
    """Devices of a process of the run in a folder: its replay needs as many.

    XLA's threads depend on their number, and the order in which they sum.

    Raises:
      UsageError: if it is not known.
    """
    try:
        environment = json.loads(files.read_text(Path(path) / "environment.json", MOST_BYTES))
        return int(environment["devices"].split(" x ")[0])
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path} is not a run folder, its environment.json can't be read ({error}).") from None


def replay(path: Path | str, data_dir: Path | str | None = None) -> Replay:
    """Replay the posted run in a folder.

    Args:
      path: run folder.
      data_dir: where data sets have been prepared; None: the default of tensorflow-datasets.

    Raises:
      UsageError: if the folder has no run that its events determine, or they contradict each other.
    """
    path, config = Path(path), read_config(path)
    if config.asynchronous != "posted" or not METHODS[config.method].elects:
        raise UsageError(f"only posted runs of a method with leaders can be replayed, but {path} has another.")
    if config.learning_rate_drops and config.learning_rate_drops_in == "seconds":
        raise UsageError(f"the run in {path} can't be replayed: its learning rate drops by the clock.")
    events = read_metrics(path, "start", "exchange", "checksum", "end")
    with making_sense_of(path):
        replayed = _Replayed(config, _lives(config, events), data_dir)
        exchanges = (event for event in events if event["event"] == "exchange")
        return replayed.all(Snapshot(event["worker"], event["life"], event["worker_step"]) for event in exchanges)


def _lives(config: Config, events: Iterable[dict[str, Any]]) -> dict[tuple[int, int], _Life]:
    """The lives of all workers, by worker and life, from a run's events in any order.

    Raises:
      ValueError: if an event is of a life that had not started by then.
    """
    of_kind: dict[str, list[dict[str, Any]]] = {"start": [], "exchange": [], "checksum": [], "end": []}
    for event in events:
        of_kind[event["event"]].append(event)
    lives = {}
    for event in of_kind["start"]:
        start = Snapshot(event["worker"], event["life"], event["step"])
        lives[start.worker, start.life] = _Life(start, _source(start.worker, event["from"]))

    def life_at(worker: int, life: int, step: int) -> _Life:
        found = lives.get((worker, life))
        if found is None or step < found.start.step:
            raise ValueError(f"worker {worker} has no life {life} at step {step}")
        found.last = max(found.last, step)
        return found

    for event in of_kind["checksum"]:
        life = life_at(event["worker"], event["life"], event["step"])
        life.checksums[event["step"], event["pulled"]] = event["sha256"]
    for event in of_kind["exchange"]:
        step, pulls = event["worker_step"], list(_pulls(config, event))
        life_at(event["worker"], event["life"], step).pulls.setdefault(step, []).append(pulls)
        for pull in pulls:
            life_at(*pull.leader)
    for event in of_kind["end"]:
        life_at(event["worker"], event["life"], event["step"])
    for life in list(lives.values()):
        if life.source is not None:
            life_at(*life.source[:3])
    return lives


def _source(worker: int, source: dict[str, Any] | None) -> Snapshot | SavedState | None:
    """What a worker has started from, by its event."""
    if source is None:
        return None
    if "saved" in source:
        return SavedState(worker, source["life"], source["saved"], source["pulled"])
    return Snapshot(source["worker"], source["life"], source["step"])


def _pulls(config: Config, event: dict[str, Any]) -> Iterator[_Pull]:
    """The pulls of an exchange, those within a group first."""
    for level in config.levels:
        name = "local_" if level.workers < config.groups * config.workers else ""
        leader = event.get(f"{name}leader", NOBODY)
        if leader == NOBODY:
            continue
        worker = event["worker"] - event["worker"] % level.workers + leader
        if worker != event["worker"]:
            snapshot = Snapshot(worker, event[f"{name}leader_life"], event[f"{name}leader_step"])
            yield _Pull(name, snapshot, np.float32(level.options.get("pull", 0.0)), event[f"{name}distance"])


class _Replayed:
    """The workers, as far as they have been trained again."""

    def __init__(self, config: Config, lives: dict[tuple[int, int], _Life], data_dir: Path | str | None) -> None:
        """Begin before the first step."""
        self._config, self._lives = config, lives
        self._feed, model = make_feed(config, data_dir), make_model(config)
        placement = place(1, 1, jax.devices()[:1])
        optimizer = worker_optimizer(config, placement)
        [self._start] = placement.parts(init_state(model, optimizer, placement))
        [self._shared] = placement.parts(placement.put(self._feed.shared, SHARED))
        self._new_optimizer = jax.jit(lambda params: _stacked(optimizer.init(_single(params))))
        self._program = local_step(config.task, model, optimizer, self._feed)
        self._key = step_key(config.seed)
        self._uses = Counter(
            pull.leader for life in lives.values() for pulls in life.pulls.values() for each in pulls for pull in each
        ) + Counter(life.source for life in lives.values() if life.source is not None)
        """How often each snapshot and saved state is yet to be used."""
        self._kept: dict[Snapshot | SavedState, TrainState] = {}
        self._steps = self._pulls = self._checksums = 0

    def all(self, order: Iterable[Snapshot]) -> Replay:
        """Train every worker to the end of every life.

        Args:
          order: where workers come to in about this order; the nearer it is to that of the run, the fewer parameters
            are kept for those who follow.

        Raises:
          ValueError: if a worker follows another who can't have come there before.
        """
        for worker, life, step in order:
            self._come(self._lives[worker, life], step)
        for each in self._lives.values():
            self._come(each, math.inf)
        differences = [life.difference for life in self._lives.values() if life.difference is not None]
        return Replay(len(self._lives), self._steps, self._pulls, self._checksums, differences)

    def _come(self, life: _Life, step: float) -> None:
        """Train a worker until it has come to a step, and before it those whom it follows."""
        under_way = [(life, step)]
        while under_way:
            missing = self._train(*under_way[-1])
            if missing is None:
                under_way.pop()
                continue
            other = self._lives[missing.worker, missing.life]
            if any(other is follower for follower, _ in under_way):
                raise ValueError(f"worker {missing.worker} was followed at step {missing.step}, before it came there")
            beyond = isinstance(missing, SavedState) and missing.pulled  # Then it has to leave that step.
            under_way.append((other, missing.step + beyond))

    def _train(self, life: _Life, end: float) -> Snapshot | SavedState | None:
        """Train a worker until it has come to a step, or has left the last one that is known of it.

        Returns:
          What has to be there first; None if the worker has come there.
        """
        if life.state is None:
            if life.source is not None and life.source not in self._kept:
                return life.source
            self._begin(life)
        while life.step < end:
            for pull in (pull for pulls in life.pulls.get(life.step, []) for pull in pulls):
                if pull.leader not in self._kept:
                    return pull.leader
            for pulls in life.pulls.pop(life.step, []):
                self._pull(life, pulls)
            self._check(life, pulled=True)
            if life.step == life.last:
                return None
            self._take_step(life)
        return None

    def _begin(self, life: _Life) -> None:
        source = self._start if life.source is None else self._take(life.source)
        optimizer = self._new_optimizer(source.params)
        if isinstance(life.source, SavedState):
            optimizer = jax.tree.map(jnp.copy, source.optimizer)  # The next step donates it.
        life.state = source._replace(optimizer=optimizer)
        life.batches = self._feed.of_workers([life.start.worker]).batches(life.start.step, life.last)
        life.key = jax.random.fold_in(self._key, life.start.worker)
        self._arrive(life)

    def _take_step(self, life: _Life) -> None:
        assert life.state is not None
        params, statistics, optimizer = life.state
        worker, step = life.start.worker, life.step
        batch = jax.tree.map(lambda x: x[0], next(life.batches))
        factor = worker_rate_factor(self._config, self._feed, worker, step, seconds=0.0)
        model, optimizer, _ = self._program(
            Model(params, statistics), optimizer, self._shared, batch, np.int32(step), factor, life.key
        )
        life.state, life.step = TrainState(model.params, model.statistics, optimizer), step + 1
        self._steps += 1
        self._arrive(life)

    def _arrive(self, life: _Life) -> None:
        """Keep the worker as it posts itself, if it will be followed."""
        assert life.state is not None
        snapshot = life.start._replace(step=life.step)
        if self._uses[snapshot]:
            self._kept[snapshot] = life.state._replace(optimizer=())
        self._check(life, pulled=False)

    def _pull(self, life: _Life, pulls: Sequence[_Pull]) -> None:
        assert life.state is not None
        if not pulls:
            return
        params, distances = pulled_towards(
            life.state.params,
            tuple(self._take(pull.leader).params for pull in pulls),
            tuple(pull.strength for pull in pulls),
            np.int32(life.step),
        )
        life.state = life.state._replace(params=params)
        self._pulls += len(pulls)
        for pull, distance in zip(pulls, map(float, distances), strict=True):
            if (distance if math.isfinite(distance) else None) != pull.distance:
                where = (
                    f"at {distance!r} from {pull.level}leader {pull.leader.worker}, where {pull.distance!r} was logged"
                )
                self._note(life, f"{where}, after step {life.step}")

    def _check(self, life: _Life, *, pulled: bool) -> None:
        """Keep the worker as it was saved, if it will start from there; compare it where its checksum was recorded."""
        assert life.state is not None
        saved = SavedState(*life.start._replace(step=life.step), pulled)
        if self._uses[saved] and saved not in self._kept:
            self._kept[saved] = life.state._replace(optimizer=jax.tree.map(jnp.copy, life.state.optimizer))
        if recorded := life.checksums.pop((life.step, pulled), None):
            self._checksums += 1
            if checksum(life.state.params) != recorded:
                self._note(life, f"other parameters after step {life.step}")

    def _note(self, life: _Life, difference: str) -> None:
        life.difference = life.difference or f"worker {life.start.worker}, life {life.start.life}: {difference}"

    def _take(self, which: Snapshot | SavedState) -> TrainState:
        state = self._kept[which]
        self._uses[which] -= 1
        if not self._uses[which]:
            del self._kept[which]
        return state


def _single(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0, 0], tree)


def _stacked(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None, None], tree)
