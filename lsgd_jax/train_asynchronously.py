"""The training loop of workers at their own speed; how they exchange is in `lsgd_jax.asynchronous`."""

import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.stages import Wrapped
from jaxtyping import Array, PRNGKeyArray

from lsgd_jax.asynchronous import NOTICE, Centred, Exchanges, Joined, Level, Model, Posted, Threads, Told, Worker
from lsgd_jax.board import Board, SharedBoard
from lsgd_jax.config import Config
from lsgd_jax.data import Feed
from lsgd_jax.distributed import (
    SHARED,
    STACKED,
    Placement,
    StepCount,
    failing_together,
    of_all_processes,
    process_count,
    process_index,
)
from lsgd_jax.errors import UsageError
from lsgd_jax.evaluate import evaluation
from lsgd_jax.exchange import all_finite, broadcast_from
from lsgd_jax.learning_rates import rate_factors, scale_by_rate_factor
from lsgd_jax.ledger import bytes_sent
from lsgd_jax.methods import METHODS, downpour, easgd
from lsgd_jax.methods.independent import independent
from lsgd_jax.methods.lsgd import PULL
from lsgd_jax.progress import RunProgress
from lsgd_jax.run_folder import RunFolder
from lsgd_jax.step import TrainState, init_state, leaders_in, worker_step
from lsgd_jax.train import Prepared, learning_rate_factor, local_optimizer, log_exchange, make_method, prepare, step_key


def train_and_evaluate(
    config: Config, run_dir: Path, *, data_dir: Path | str | None = None, lines: bool = True, tensorboard: bool = False
) -> float:
    """Train with workers at their own speed and write the run's folder, as `lsgd_jax.train.train_and_evaluate` does.

    Data, learning rates and what is random in a worker's steps are those of synchronous training; how far each worker
    has come at an exchange depends on the machine. Events tell the steps of all workers together (`count`), and as
    `step` their mean. An event "exchange" of posted workers is one worker's: who it is, how many steps it has taken,
    its leader, the distance to it, and the staleness, how many steps the leader had taken since it posted. One of
    joined workers is that of synchronous training with the steps of each. Joined workers are tested at exchanges, with
    the clock stopped; posted ones at the points where they are, while they go on.

    Args:
      config: what the run depends on, `asynchronous` among it.
      run_dir: a folder that is empty or does not exist.
      data_dir: where data sets have been prepared; None: tensorflow-datasets' own default.
      lines: whether to print a line an evaluation where there is no terminal.
      tensorboard: whether to write event files for TensorBoard, too.

    Returns:
      The center's last test error, in [0, 1].

    Raises:
      UsageError: if the configuration does not fit the machine or the data, or the folder has files in it or can't be
        written.
      RunFailed: if a worker fails; `lsgd_jax.asynchronous.GRACE` seconds after it has or the evaluation at hand has
        ended, at the latest.
    """
    with failing_together():
        if config.method != "lsgd" and process_count() > 1:
            raise UsageError(
                f"the centre of {config.method} is met in one process, but this is one of several: use lsgd."
            )
        prepared = prepare(config, data_dir)
        placement = prepared.placement
        if placement.slots != (1, 1):
            raise UsageError(
                f"asynchronous needs a device a worker, but there are {placement.mesh.size} devices for"
                f" {math.prod(placement.shape)} workers: lower groups or workers."
            )
        joined = config.asynchronous == "joined"
        kind: Callable[..., _Run] = _JoinedRun if joined else _CentredRun
        if config.method == "lsgd" and not joined:
            kind = partial(_PostedRun, board=board_of(prepared))
        folder = RunFolder(run_dir, config, tensorboard=tensorboard)

    with folder, RunProgress(config.steps, log=folder.log, lines=lines) as progress:
        progress.say("compiling")
        run = kind(config, prepared, folder, progress)
        progress.say("training")
        run.start_clock()
        with Threads(run.workers, run.exchanges) as threads:
            while not threads.have_ended(NOTICE):
                if not joined:
                    run.evaluate_if_due(run.count.total)
        return run.finish()


class _Run:
    """The workers of this process, how they exchange, and how they are tested."""

    def __init__(self, config: Config, prepared: Prepared, folder: RunFolder, progress: RunProgress) -> None:
        self.config, self.folder, self.progress = config, folder, progress
        self.placement, self.feed, self.model, _ = prepared
        self.size = math.prod(self.placement.shape)
        self.count = StepCount()
        self.start_clock()
        self.leader: int | None = None
        self._untold: list[dict[str, Any]] = []
        """Events that the first process does not know yet."""
        self.params = nnx.state(self.model, nnx.Param)
        self.shared, self.key = self.placement.put(self.feed.shared, SHARED), step_key(config.seed)
        # Between exchanges a worker is an independent one: its own optimiser, and the mean of its last losses.
        optimizer = independent(
            optax.chain(local_optimizer(config), scale_by_rate_factor()),
            axis_name=self.placement.axes,
            window=config.window,
        )
        program = local_step(self.model, optimizer, self.feed)
        states = self.placement.parts(init_state(self.model, optimizer, self.placement))
        shared = self.placement.parts(self.shared)
        with ThreadPoolExecutor() as pool:  # Programs are compiled for every device.
            make = partial(self._make_worker, program)
            self.workers = list(pool.map(make, self.placement.own_workers, states, shared))
            self.exchanges = self.make_exchanges()
            list(pool.map(self.exchanges.compile, self.workers))
        self._evaluations = 0
        self._test = evaluation(
            self.model,
            self.center,
            self.placement,
            self.feed,
            batch_statistics=config.batch_statistics,
            statistics_batches=config.statistics_batches,
            key=jax.random.fold_in(self.key, config.steps),  # No step's.
        )
        self._for_all = jax.jit(lambda tree: tree, out_shardings=self.placement.sharding(SHARED))

    def make_exchanges(self) -> Exchanges:
        """How the workers exchange."""
        raise NotImplementedError

    @property
    def center(self) -> Callable[[optax.Params, Any, Any], optax.Params]:
        """The method's, of the params and `kept`."""
        return METHODS[self.config.method].center

    def kept(self) -> Any:
        """What the exchanges keep beside the workers, stacked."""
        return ()

    def taken(self, worker: Worker) -> int:
        """How often a worker has taken parameters from another."""
        raise NotImplementedError

    def bytes_sent(self, taken: int) -> float:
        """By a worker so far, the mean over all, who have taken parameters so often."""
        return taken * sum(x.nbytes for x in jax.tree.leaves(self.params)) / self.size

    def finish(self) -> float:
        """Test at the end; returns the center's error."""
        return self.evaluate()

    def start_clock(self, seconds: float = 0.0) -> None:
        """Let so many seconds of training have gone now."""
        self._started = time.perf_counter() - seconds

    def seconds(self) -> float:
        """Of training."""
        return time.perf_counter() - self._started

    def _make_worker(self, program: Wrapped, position: int, state: TrainState, shared: Any) -> Worker:
        config, device = self.config, self.placement.mesh.devices.flat[position]
        batches = self.feed.of_workers([position]).batches(0, config.steps)
        key = jax.device_put(jax.random.fold_in(self.key, position), device)

        def coming_batch() -> Any:
            return jax.device_put(jax.tree.map(lambda x: x[0], next(batches, None)), device)

        def rate_factor(step: int) -> np.float32:
            factor = learning_rate_factor(config, step, self.feed.epochs(step), self.seconds())
            if config.learning_rates != "equal":
                factor *= rate_factors(config.learning_rates, self.placement.shape).flat[position]
            return factor

        def take_step(step: int, model: Model, optimizer: optax.OptState) -> tuple[Model, optax.OptState, Told]:
            nonlocal batch
            result = compiled(model, optimizer, shared, batch, np.int32(step), rate_factor(step), key)
            batch = coming_batch()  # While the device computes.
            return result

        batch, model = coming_batch(), Model(state.params, state.statistics)
        compiled = program.lower(model, state.optimizer, shared, batch, np.int32(0), rate_factor(0), key).compile()
        slowdown = config.slowdowns[position] if position < len(config.slowdowns) else 1.0
        least_seconds = slowdown * config.least_step_seconds
        return Worker(position, config.steps, model, state.optimizer, take_step, least_seconds=least_seconds)

    def log(self, event: str, *, count: int, **values: Any) -> None:
        """Log an event with its time."""
        self.leader = values.get("leader", self.leader)
        values = {"event": event, "step": count // self.size, "seconds": self.seconds(), "count": count, **values}
        if process_index() == 0:
            self.folder.log(**values)
        else:
            self._untold.append(values)

    def evaluate_if_due(self, count: int) -> None:
        """Test if all workers' steps have reached the next multiple of `eval_every`, unless it is the end."""
        due = count // (self.size * self.config.eval_every)
        if due > self._evaluations and count < self.size * self.config.steps:
            self._evaluations = due
            self.evaluate()

    def evaluate(self) -> float:
        """Test the center and the workers as they are now; returns the center's error."""
        joined = self.config.asynchronous == "joined"
        # Workers who do not wait for an evaluation may have finished during the one before.
        seconds = self.seconds() if joined else max(worker.stepped_at for worker in self.workers) - self._started
        params, statistics = self.placement.stacked([worker.model for worker in self.workers])
        told = [(worker.step, worker.mean_loss(), self.taken(worker)) for worker in self.workers]
        told = self.placement.put(tuple(map(np.array, zip(*told, strict=True))), STACKED)
        steps, losses, taken = jax.device_get(self._for_all(told))
        result = self._test(TrainState(params, statistics, self.kept()), self.shared)
        if joined:
            self.start_clock(seconds)
        untold, self._untold = self._untold, []
        for event in itertools.chain(*of_all_processes(untold)):
            self.folder.log(**event)
        step = int(steps.sum()) // self.size
        self.folder.log(
            "evaluation",
            step=step,
            seconds=seconds,
            count=int(steps.sum()),
            worker_steps=steps,
            bytes_sent=self.bytes_sent(int(taken.sum())),
            train_losses=losses,
            center_error=result.center_error,
            center_loss=result.center_loss,
            worker_errors=result.worker_errors,
        )
        self.progress.show(
            step,
            loss=float(np.nanmean(losses)) if np.isfinite(losses).any() else math.nan,
            error=result.center_error,
            leader=self.leader,
            steps_per_second=step / seconds,
        )
        return result.center_error


class _JoinedRun(_Run):
    """The exchange is that of synchronous training: `leader_pull`, with each worker's score as its loss."""

    def make_exchanges(self) -> Joined:
        """LSGD's."""
        config, periods = self.config, [period for _, period in self.config.levels]
        every_time = config.replace(period=1, window=1)
        if config.groups > 1:
            every_time = every_time.replace(global_period=periods[-1] // periods[0])
        pulls = make_method(every_time, self.placement, optax.identity())
        self._pulls = init_state(self.model, pulls, self.placement).optimizer
        self._program = exchange_of_all(pulls, self.placement)
        self._exchange()  # Compiles it and connects the processes, and changes nothing.
        self._exchanged_steps = 0
        return Joined(
            self.count,
            self._meet,
            own_workers=len(self.workers),
            steps_between=self.size * config.period,
            most=config.steps // config.period,
        )

    def kept(self) -> Any:
        """The last leaders."""
        return self._pulls

    def taken(self, worker: Worker) -> int:
        """Nothing: leaders are sent."""
        return 0

    def bytes_sent(self, taken: int) -> float:
        """In all exchanges."""
        return bytes_sent(self.config, self.params, self._exchanged_steps)

    def _exchange(self) -> tuple:
        params = self.placement.stacked([worker.model.params for worker in self.workers])
        scores = np.array([worker.score for worker in self.workers], np.float32)
        steps = np.array([worker.step for worker in self.workers], np.int32)
        scores, steps = self.placement.put((scores, steps), STACKED)
        return jax.block_until_ready(self._program(params, self._pulls, scores, steps))

    def _meet(self, number: int) -> None:
        params, self._pulls, (leaders, steps) = self._exchange()
        for worker, part in zip(self.workers, self.placement.parts(params), strict=True):
            worker.move(part)
        self._exchanged_steps = number * self.config.period
        clock = {"seconds": self.seconds(), "count": self.count.total}
        leaders = jax.device_get(leaders)
        log_exchange(self.folder, self.config, self._exchanged_steps, leaders, worker_steps=steps, staleness=0, **clock)
        self.leader = int(leaders.positions[0, 0, -1])
        self.evaluate_if_due(self._exchanged_steps * self.size)


class _PostedRun(_Run):
    """LSGD on a board."""

    exchanges: Posted

    def __init__(self, *args: Any, board: Board) -> None:
        self._board = board
        super().__init__(*args)

    def make_exchanges(self) -> Posted:
        """With the pulls of the configuration."""
        config = self.config
        pulls = (PULL if pull is None else pull for pull in (config.pull, config.global_pull))
        levels = [
            Level(among, self.size * period, pull)
            for (among, period), pull in zip(config.levels, pulls, strict=False)  # With one group, one level.
        ]
        return Posted(self.count, levels, self._board, workers=self.size, staleness=config.staleness, log=self.log)

    def taken(self, worker: Worker) -> int:
        """From the board."""
        return self.exchanges.taken[worker.position]

    def evaluate_if_due(self, count: int) -> None:
        """As in one process, but of several all test equally often, so that none waits for another for ever."""
        if process_count() > 1:
            count = min(count, (self._evaluations + 1) * self.size * self.config.eval_every)
        super().evaluate_if_due(count)

    def finish(self) -> float:
        """Test as often as all do, take no more requests, and test at the end."""
        if process_count() > 1:
            while self._evaluations < (self.config.steps - 1) // self.config.eval_every:
                self.evaluate_if_due(self.size * self.config.steps - 1)
        error = self.evaluate()
        self._board.close()
        return error


class _CentredRun(_Run):
    """EASGD or DOWNPOUR."""

    exchanges: Centred

    def make_exchanges(self) -> Centred:
        """The method's."""
        config = self.config
        if config.method == "easgd":
            pull, center_pull = easgd.strengths(config.pull, config.center_pull, self.size)

            def meet(x: Any, center: Any, came_from: Any) -> tuple[Any, Any]:
                return easgd.meet_center(x, center, pull, center_pull / self.size)
        else:

            def meet(x: Any, center: Any, came_from: Any) -> tuple[Any, Any]:
                center = downpour.meet_center(x, center, came_from)
                return center, center

        start = self.workers[0].model.params
        return Centred(self.count, start, meet, workers=self.size, period=config.period, log=self.log)

    @property
    def center(self) -> Callable[[optax.Params, Any, Any], optax.Params]:
        """The centre."""
        return lambda params, center, axis_name: broadcast_from(center, 0, axis_name, method="all_reduce")

    def kept(self) -> Any:
        """The centre, on every device."""
        center = self.exchanges.center
        return self.placement.stacked([jax.device_put(center, device) for device in self.placement.mesh.devices.flat])

    def taken(self, worker: Worker) -> int:
        """From the centre, which has taken as much."""
        return 2 * self.exchanges.meetings[worker.position]


def board_of(prepared: Prepared) -> Board:
    """The board of all workers, which may be of several processes."""
    owners = [device.process_index for device in prepared.placement.mesh.devices.flat]
    if process_count() == 1:
        return Board(len(owners))
    params = nnx.state(prepared.model, nnx.Param)
    return SharedBoard(owners, jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 1, *x.shape), x.dtype), params))


def local_step(model: nnx.Module, optimizer: optax.GradientTransformationExtraArgs, feed: Feed) -> Wrapped:
    """A function that takes a worker on one device through one local step.

    Args:
      model: of the workers.
      optimizer: `lsgd_jax.methods.independent.independent` around the worker's own.
      feed: of the training data.

    Returns:
      A jitted function of the worker's `Model`, the optimiser's state, which is given up, both with the axes
      [group, worker] of size 1, and, as for `lsgd_jax.step.worker_step`, what the feed has to lie on the device, the
      worker's batch, the step's number, the factor of the learning rate and the worker's key; it returns the new model
      and optimiser's state and what the step tells.
    """
    take = worker_step(model, optimizer, feed)

    def step(
        model: Model,
        optimizer: optax.OptState,
        shared: Any,
        batch: Any,
        number: Array,
        rate_factor: Array,
        key: PRNGKeyArray,
    ) -> tuple[Model, optax.OptState, Told]:
        own = jax.tree.map(lambda x: x[0, 0], TrainState(*model, optimizer))
        own, loss = take(shared, rate_factor, key, own, (number, batch))
        told = Told(loss, own.optimizer.score, all_finite(own.params))
        params, statistics, optimizer = jax.tree.map(lambda x: x[None, None], own)
        return Model(params, statistics), optimizer, told

    return jax.jit(step, donate_argnums=1)


def exchange_of_all(pulls: optax.GradientTransformationExtraArgs, placement: Placement) -> Wrapped:
    """A function that lets all workers exchange at once.

    Args:
      pulls: `leader_pull` that is due each time and has a window of 1.
      placement: of the workers.

    Returns:
      A jitted function of the params, the state of the pulls, the workers' scores and their steps, all stacked; it
      returns the new params and state, and on all devices the `Leaders` and the steps.
    """

    def exchange(params: optax.Params, state: Any, score: Array, step: Array) -> tuple:
        still = jax.tree.map(jnp.zeros_like, params)
        updates, state = pulls.update(still, state, params, value=score)
        return optax.apply_updates(params, updates), state, (leaders_in(state), step)

    mapped = placement.over_workers(exchange, (STACKED,) * 4, (STACKED,) * 3)
    stacked, shared = placement.sharding(STACKED), placement.sharding(SHARED)
    return jax.jit(mapped, out_shardings=(stacked, stacked, shared))
