"""Training in virtual time: workers' steps and exchanges in the order of an event log.

Steps are those of `lsgd_jax.train.step`, exchanges those of the methods themselves: `lsgd_jax.leader_sgd`, with no
step of its own before it, elects and pulls whoever takes part, and a center meets one worker at a time.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float

from lsgd_jax.config import Config
from lsgd_jax.distributed import Placement, place
from lsgd_jax.errors import UsageError
from lsgd_jax.exchange import NOBODY, mean
from lsgd_jax.methods import METHODS, mean_of_workers
from lsgd_jax.methods.data_parallel import data_parallel
from lsgd_jax.simulate.cluster import SECOND
from lsgd_jax.simulate.events import Event, EventLog, Schedule
from lsgd_jax.simulate.exchanges import SIMULATED, exchanges_of, reported
from lsgd_jax.train.evaluate import evaluation
from lsgd_jax.train.learning_rates import learning_rate_factor
from lsgd_jax.train.setup import make_feed, make_model, make_optimizer, step_key
from lsgd_jax.train.step import TrainState, init_state, local_steps
from lsgd_jax.train.task_checks import check_functions


class Problem(Protocol):
    """What is trained."""

    def start(self) -> TrainState:
        """A worker's state at the start, in arrays of its own.

        The optimizer's state is that of `lsgd_jax.methods.independent`, which holds the score.
        """
        ...

    def step(self, state: TrainState, worker: int, number: int, progress: float, seconds: float) -> TrainState:
        """A worker's state after its own step of that number, counted from 0; the state may be given up.

        Args:
          state: before it.
          worker: whose.
          number: of the step.
          progress: all workers' steps so far, divided by the workers.
          seconds: of virtual time.
        """
        ...

    def step_together(
        self, states: list[TrainState], workers: Sequence[int], numbers: list[int], progress: float, seconds: float
    ) -> list[TrainState]:
        """The states of several workers after a step with the mean of their gradients."""
        ...

    def test(self, states: list[TrainState], center: optax.Params | None) -> tuple[float, np.ndarray]:
        """A measure, lower is better, of a model and of all workers; without a model, of the mean of the workers."""
        ...


class History(NamedTuple):
    """What came of training along an event log."""

    seconds: Float[np.ndarray, " evaluations"]
    """Of virtual time."""
    steps: Float[np.ndarray, " evaluations"]
    """Of all workers, divided by the workers."""
    center: Float[np.ndarray, " evaluations"]
    """Headline measure of the evaluated model."""
    worker_values: Float[np.ndarray, "evaluations workers"]
    """Headline measure of each worker, NaN for those that are away."""
    leaders: list[tuple[Event, int]]
    """LSGD's exchanges, each with the worker that led it, or `NOBODY`."""
    states: list[TrainState]
    """Every worker's at the end."""

    def seconds_to(self, target: float) -> float | None:
        """Virtual seconds until the first evaluation at which the center reached the target; None if there was none."""
        reached = np.flatnonzero(self.center <= target)
        return float(self.seconds[reached[0]]) if len(reached) else None


def train_on(
    log: EventLog,
    schedule: Schedule,
    config: Config,
    problem: Problem,
    watch: Callable[[], object] = lambda: None,
) -> History:
    """Train along an event log.

    The same arguments give the same bits on the same platform and versions. Evaluations come every
    `config.eval_every` steps of the average worker, and take no time.

    Args:
      log: what happens when, from `event_log` with the same schedule and configuration.
      schedule: of the method.
      config: of the method's strengths, the groups and the evaluations.
      problem: what is trained.
      watch: is called after each event.

    Raises:
      UsageError: for options of the configuration that are not simulated.
    """
    for name in config.method_options:
        if name not in SIMULATED:
            raise UsageError(f"training in virtual time is without {name}: leave it out, or simulate costs only.")
    return _Replay(log, schedule, config, problem).run(watch)


class _Replay:
    """The workers, by their numbers, and what is shared between them."""

    def __init__(self, log: EventLog, schedule: Schedule, config: Config, problem: Problem) -> None:
        self.log, self.schedule, self.config, self.problem = log, schedule, config, problem
        self.states = [problem.start() for _ in range(log.workers)]
        self.present = [True] * log.workers
        self.numbers = [0] * log.workers
        self.total = 0
        self.leaders: list[tuple[Event, int]] = []
        self.method = METHODS[schedule.method]
        self.center: optax.Params | None = None
        if self.method.meeting is not None:
            self.meeting = jax.jit(self.method.meeting(config.options, log.workers))
            self.center = problem.start().params
            self.last_center = [self.center] * log.workers
        elif self.method.exchanges == "period":
            self.exchanges = [exchanges_of(schedule.method, tuple(level.options.items())) for level in config.levels]
            kept = [exchange.init(problem.start().params) for exchange in self.exchanges]
            self.kept = [[of_level] * log.workers for of_level in kept]
            """By level: what each worker keeps of its exchanges, such as a center."""
        self.has_board = self.method.elects and schedule.waits == "server"
        if self.has_board:  # Parameters and scores are on it.
            nothing = problem.start()
            self.board = [(nothing.params, _score(nothing))] * log.workers

    def run(self, watch: Callable[[], object]) -> History:
        evaluations: list[tuple[float, float, float, np.ndarray]] = []
        every, due = self.config.eval_every * self.log.workers, 0
        happens: dict[str, Callable[[Event], None]] = {"step": self.step, "leave": self.leave, "join": self.join}
        happens["exchange"] = self.exchange
        for event, following in zip(self.log.events, [*self.log.events[1:], None], strict=True):
            happens[event.kind](event)
            watch()
            if following is None or (self.total >= due and following.time > event.time):
                due = (self.total // every + 1) * every
                evaluations.append((event.time / SECOND, self.total / self.log.workers, *self.test()))
        seconds, steps, center, workers = (np.array(of) for of in zip(*evaluations, strict=True))
        return History(seconds, steps, center, workers, self.leaders, self.states)

    def progress(self, event: Event) -> tuple[float, float]:
        return self.total / self.log.workers, event.time / SECOND

    def step(self, event: Event) -> None:
        [worker] = event.workers
        if self.method.exchanges != "step":
            number, (progress, seconds) = self.numbers[worker], self.progress(event)
            self.states[worker] = self.problem.step(self.states[worker], worker, number, progress, seconds)
            self.numbers[worker] += 1
        self.total += 1

    def exchange(self, event: Event) -> None:
        who = event.workers
        if self.method.exchanges == "step":
            numbers, states = [self.numbers[worker] for worker in who], [self.states[worker] for worker in who]
            after = self.problem.step_together(states, who, numbers, *self.progress(event))
            for worker, state in zip(who, after, strict=True):
                self.states[worker] = state
                self.numbers[worker] += 1
        elif self.method.meeting is not None:
            self.meet_center(who[0])
        elif self.has_board:
            self.meet_board(event)
        else:
            params, scores = [self.params(worker) for worker in who], [_score(self.states[worker]) for worker in who]
            kept = self.kept[event.level]
            moved, now, position = self.exchanges[event.level].meet(params, scores, [kept[worker] for worker in who])
            for worker, of_worker, kept[worker] in zip(who, moved, now, strict=True):
                self.place(worker, of_worker)
            self.note_leader(event, who, position)

    def meet_center(self, worker: int) -> None:
        params, self.center = self.meeting(self.params(worker), self.center, self.last_center[worker])
        self.last_center[worker] = self.center
        self.place(worker, jax.tree.map(jnp.copy, params))  # Since a step gives up its arrays.

    def meet_board(self, event: Event) -> None:
        """Post, and be drawn where an exchange of all who have posted would draw to, had they stayed there."""
        [worker] = event.workers
        # A copy, since a step gives up its arrays.
        self.board[worker] = jax.tree.map(jnp.copy, (self.params(worker), _score(self.states[worker])))
        group = worker // self.config.workers
        of_group = range(group * self.config.workers, (group + 1) * self.config.workers)
        for level, rows in enumerate([of_group, range(self.log.workers)][: event.level + 1]):
            params = [self.board[row][0] for row in rows]
            params[rows.index(worker)] = self.params(worker)
            scores = [self.board[row][1] for row in rows]
            moved, _, position = self.exchanges[level].meet(params, scores, [self.kept[level][row] for row in rows])
            self.place(worker, moved[rows.index(worker)])
        self.note_leader(event, rows, position)

    def leave(self, event: Event) -> None:
        [worker] = event.workers
        self.present[worker] = False
        if self.has_board:
            params, score = self.board[worker]
            self.board[worker] = params, jnp.full_like(score, jnp.inf)  # Nobody to be elected.

    def join(self, event: Event) -> None:
        """Restart from the center, from the best worker, or from the first; alone, from what was left."""
        [worker] = event.workers
        there = [other for other in range(self.log.workers) if self.present[other]]
        source = self.params(worker)
        if self.center is not None:
            source = self.last_center[worker] = self.center
        elif there:
            elects = self.method.elects
            scores = [float(np.squeeze(_score(self.states[other]))) if elects else 0.0 for other in there]
            best = there[int(np.argmin(np.nan_to_num(scores, nan=np.inf)))]
            source = self.params(best)
            if self.method.exchanges == "period":
                for kept in self.kept:
                    kept[worker] = kept[best]
        self.present[worker] = True
        self.states[worker] = self.problem.start()._replace(params=jax.tree.map(jnp.copy, source))

    def params(self, worker: int) -> optax.Params:
        return self.states[worker].params

    def place(self, worker: int, params: optax.Params) -> None:
        self.states[worker] = self.states[worker]._replace(params=params)

    def note_leader(self, event: Event, who: Sequence[int], position: Array) -> None:
        if self.method.elects:
            self.leaders.append((event, NOBODY if position == NOBODY else who[int(position)]))

    def test(self) -> tuple[float, np.ndarray]:
        there = [worker for worker in range(self.log.workers) if self.present[worker]] or [0]
        states, center = [self.states[worker] for worker in there], self.center
        if self.method.exchanges == "period" and self.center is None and self.method.center is not mean_of_workers:
            center = reported(self.method.center)([x.params for x in states], [self.kept[-1][i] for i in there])
        of_center, of_workers = self.problem.test(states, center)
        values = np.full(self.log.workers, np.nan)
        values[there] = of_workers
        return of_center, values


def _score(state: TrainState) -> Array:
    optimizer: Any = state.optimizer
    return optimizer.score


class Network:
    """A `Problem`: the network of a task, as `lsgd train` trains it, all workers on one device."""

    def __init__(self, config: Config, data_dir: Path | str | None = None) -> None:
        """Load the data and make the network.

        Args:
          config: of the run; its method does not matter.
          data_dir: where data sets have been prepared; None: tensorflow-datasets' own default.

        Raises:
          UsageError: if the configuration is not one for the data, or one that is not simulated.
        """
        for name in ("elect_by", "evaluated_model", "corrupt_workers"):
            if getattr(config, name) != Config.__dataclass_fields__[name].default:
                raise UsageError(f"training in virtual time is without {name}: leave it out, or simulate costs only.")
        if config.learning_rates != "equal":
            raise UsageError("training in virtual time is with equal learning_rates.")
        alone = {"method": "independent", "groups": 1, "workers": config.groups * config.workers}
        self._config = config.replace(**alone, chips_per_worker=1)
        workers = range(self._config.workers)
        feed, self._model = make_feed(config, data_dir), make_model(config)
        check_functions(config.task, self._model, feed, config.worker_batch_size)
        self._feeds = [feed.of_workers([worker]) for worker in workers]
        if jax.tree.leaves(nnx.state(self._model, nnx.BatchStat)):
            raise UsageError(f"training in virtual time is without batch statistics, which {config.task} has.")
        self._keys = [jax.random.fold_in(step_key(config.seed), worker) for worker in workers]
        self._shared = jax.device_put(self._feeds[0].shared, jax.devices()[0])
        self._alone = self._placement(1)
        optimizer = make_optimizer(self._config, self._alone)
        self._program = local_steps(config.task, self._model, optimizer, self._alone, self._feeds[0])
        self._start = init_state(self._model, optimizer, self._alone)
        self._together: dict[int, Callable] = {}
        self._tests: dict[tuple[int, bool], Callable] = {}

    def start(self) -> TrainState:
        """All workers start alike."""
        return jax.tree.map(jnp.copy, self._start)

    def step(self, state: TrainState, worker: int, number: int, progress: float, seconds: float) -> TrainState:
        """A step on the worker's next batch."""
        factor = self._rate_factor(int(progress), seconds)
        batch, key = self._batch(worker, number), self._keys[worker]
        state, _ = self._program(state, self._shared, batch, np.int32(number), factor, key)
        return state

    def step_together(
        self, states: list[TrainState], workers: Sequence[int], numbers: list[int], progress: float, seconds: float
    ) -> list[TrainState]:
        """A step of the same program as `lsgd train` has it."""
        count = len(workers)
        if count not in self._together:
            placement = self._placement(count)
            optimizer = data_parallel(make_optimizer(self._config, placement), axis_name=placement.axes)
            program = local_steps(self._config.task, self._model, optimizer, placement, self._feeds[0])

            def step(states: list[TrainState], *rest: Any) -> list[TrainState]:
                after, _ = program(jax.tree.map(lambda *xs: jnp.concatenate(xs, 1), *states), *rest)
                return [jax.tree.map(lambda x, i=i: x[:, i : i + 1], after) for i in range(count)]

            self._together[count] = jax.jit(step)
        factor = self._rate_factor(int(progress), seconds)
        batches = [self._batch(*each) for each in zip(workers, numbers, strict=True)]
        batches = jax.tree.map(lambda *of: np.concatenate(of, 1), *batches)
        key = step_key(self._config.seed)
        return self._together[count](states, self._shared, batches, np.int32(max(numbers)), factor, key)

    def test(self, states: list[TrainState], center: optax.Params | None) -> tuple[float, np.ndarray]:
        """On the test data."""
        count, has_center = len(states), center is not None
        if (count, has_center) not in self._tests:
            self._tests[count, has_center] = evaluation(
                self._config.task,
                self._model,
                (lambda params, center, axes: mean(center, axes)) if has_center else mean_of_workers,
                self._placement(count),
                self._feeds[0],
                batch_statistics="own",
                statistics_batches=1,
                key=self._keys[0],
            )
        params, centers = (
            jax.tree.map(lambda *xs: jnp.concatenate(xs, 1), *trees)
            for trees in ([state.params for state in states], [center] * count if has_center else [()])
        )
        result = self._tests[count, has_center](TrainState(params, states[0].statistics, centers), self._shared)
        return result.center[self._config.task.headline.name], np.ravel(result.workers)

    def _rate_factor(self, step: int, seconds: float) -> np.ndarray:
        return learning_rate_factor(self._config, step, self._feeds[0].epochs(step), seconds)

    def _placement(self, workers: int) -> Placement:
        return place(1, workers, jax.devices()[:1])

    def _batch(self, worker: int, number: int) -> Any:
        """[group, worker, step, ...], one of each."""
        batch = next(self._feeds[worker].batches(number, number + 1))
        return jax.tree.map(lambda x: np.asarray(x)[None, :, None], batch)
