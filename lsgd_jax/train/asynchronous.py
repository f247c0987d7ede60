"""Asynchronous training: workers that run at their own speeds; how they exchange is in `lsgd_jax.asynchronous`."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.stages import Wrapped

from lsgd_jax.asynchronous import Centered, Exchanges, Joined, Level, Model, Posted, StepReport, Threads, Worker
from lsgd_jax.asynchronous.board import Board, SharedBoard
from lsgd_jax.asynchronous.workers import NOTICE
from lsgd_jax.config import Config
from lsgd_jax.costs.ledger import bytes_sent
from lsgd_jax.distributed import SHARED, STACKED, StepCount, failing_together, process_count
from lsgd_jax.errors import UsageError
from lsgd_jax.exchange import broadcast_from
from lsgd_jax.methods import METHODS
from lsgd_jax.methods.independent import independent
from lsgd_jax.optimizers import local_optimizer
from lsgd_jax.tracking.progress import RunProgress
from lsgd_jax.tracking.run_folder import RunFolder
from lsgd_jax.train.asynchronous_step import exchange_of_all, local_step
from lsgd_jax.train.evaluate import evaluation
from lsgd_jax.train.learning_rates import learning_rate_factor, rate_factors, scale_by_rate_factor
from lsgd_jax.train.recorder import AsynchronousRecorder
from lsgd_jax.train.setup import Prepared, make_method, prepare, step_key
from lsgd_jax.train.step import TrainState, init_state


def train_and_evaluate(
    config: Config, run_dir: Path, *, data_dir: Path | str | None = None, lines: bool = True, tensorboard: bool = False
) -> float:
    """Train workers at their own speeds and write the run folder, as `lsgd_jax.train.train_and_evaluate` does.

    Data, learning rates and random keys of a worker's steps are those of synchronous training; how many steps each
    worker has taken at an exchange depends on the machine. Every event has the local steps of all workers together
    (`count`) and, as `step`, their mean. An "exchange" event of posted workers is that of one worker: its index
    (`worker`), the steps that it has taken, its leader, the distance to it, and its staleness: the steps that the
    leader had taken since it posted. An exchange of joined workers is logged as in synchronous training, with the steps
    of each worker. Joined workers are evaluated at exchanges, with the clock stopped; posted ones wherever they are,
    while they keep training.

    Args:
      config: everything that the result depends on, `asynchronous` included.
      run_dir: a folder that is empty or does not exist.
      data_dir: where data sets have been prepared; None: the default of tensorflow-datasets.
      lines: whether to print one line per evaluation where there is no terminal.
      tensorboard: whether to write event files for TensorBoard, too.

    Returns:
      The last headline measure of the evaluated model, such as its test error in [0, 1].

    Raises:
      UsageError: if the configuration does not fit the machine or the data, or the folder has files in it or can't be
        written.
      RunFailed: if a worker fails; at the latest `lsgd_jax.asynchronous.workers.GRACE` seconds after it has failed or
        the evaluation under way has ended.
    """
    with failing_together():
        if METHODS[config.method].meeting is not None and process_count() > 1:
            electing = " or ".join(name for name, row in METHODS.items() if row.elects and row.asynchronous)
            raise UsageError(
                f"workers meet the center of {config.method} in one process, but this is one of several:"
                f" use {electing}."
            )
        prepared = prepare(config, data_dir)
        placement = prepared.placement
        if placement.slots != (1, 1):
            raise UsageError(
                f"asynchronous needs one device per worker, but there are {placement.mesh.size} devices for"
                f" {math.prod(placement.shape)} workers: lower groups or workers."
            )
        joined = config.asynchronous == "joined"
        kind: Callable[..., _Run] = _JoinedRun if joined else _CenteredRun
        if METHODS[config.method].elects and not joined:
            kind = partial(_PostedRun, board=board_of(prepared))
        folder = RunFolder(run_dir, config, tensorboard=tensorboard)

    with folder, RunProgress(config.steps, log=folder.log, lines=lines) as display:
        display.status("compiling")
        run = kind(config, prepared, AsynchronousRecorder(config, folder, display))
        display.status("training")
        run.clock.start()
        with Threads(run.workers, run.exchanges) as threads:
            while not threads.have_ended(NOTICE):
                if not joined:
                    run.evaluate_if_due(run.count.total)
        return run.finish()


class _Run:
    """The workers of this process, how they exchange, and how they are evaluated."""

    def __init__(self, config: Config, prepared: Prepared, recorder: AsynchronousRecorder) -> None:
        """Compile all programs.

        Args:
          config: of the run.
          prepared: for this configuration.
          recorder: of the run.
        """
        self.config, self.recorder, self.clock = config, recorder, recorder.clock
        self.placement, self.feed, self.model, _ = prepared
        self.size = math.prod(self.placement.shape)
        self.count = StepCount()
        self.params = nnx.state(self.model, nnx.Param)
        self.shared, self.key = self.placement.put(self.feed.shared, SHARED), step_key(config.seed)
        # Between exchanges a worker is an independent one: its own optimizer, and the mean of its last losses.
        optimizer = independent(
            optax.chain(local_optimizer(config), scale_by_rate_factor()),
            axis_name=self.placement.axes,
            **{name: value for name, value in config.options.items() if name == "window"},
        )
        program = local_step(config.task, self.model, optimizer, self.feed)
        states = self.placement.parts(init_state(self.model, optimizer, self.placement))
        shared = self.placement.parts(self.shared)
        with ThreadPoolExecutor() as pool:  # Programs are compiled for every device.
            make = partial(self._make_worker, program)
            self.workers = list(pool.map(make, self.placement.own_workers, states, shared))
            self.exchanges = self.make_exchanges()
            list(pool.map(self.exchanges.compile, self.workers))
        self._evaluations = 0
        self._evaluate = evaluation(
            config.task,
            self.model,
            self.center,
            self.placement,
            self.feed,
            batch_statistics=config.batch_statistics,
            statistics_batches=config.statistics_batches,
            key=jax.random.fold_in(self.key, config.steps),  # No step's.
        )
        self._replicate = jax.jit(lambda tree: tree, out_shardings=self.placement.sharding(SHARED))

    def make_exchanges(self) -> Exchanges:
        """How the workers exchange."""
        raise NotImplementedError

    @property
    def center(self) -> Callable[[optax.Params, Any, Any], optax.Params]:
        """The function from the params and the exchange state to the evaluated model."""
        return METHODS[self.config.method].center

    def exchange_state(self) -> Any:
        """The state that the exchanges keep beside the workers, stacked."""
        return ()

    def taken(self, worker: Worker) -> int:
        """How often a worker has fetched parameters."""
        raise NotImplementedError

    def bytes_sent(self, taken: int) -> float:
        """Bytes sent per worker so far, the mean over workers, which have fetched parameters this often in total."""
        return taken * sum(x.nbytes for x in jax.tree.leaves(self.params)) / self.size

    def finish(self) -> float:
        """Evaluate at the end; returns the headline measure of the evaluated model."""
        return self.evaluate()

    def _make_worker(self, program: Wrapped, position: int, state: TrainState, shared: Any) -> Worker:
        config, device = self.config, self.placement.mesh.devices.flat[position]
        batches = self.feed.of_workers([position]).batches(0, config.steps)
        key = jax.device_put(jax.random.fold_in(self.key, position), device)

        def coming_batch() -> Any:
            return jax.device_put(jax.tree.map(lambda x: x[0], next(batches, None)), device)

        def rate_factor(step: int) -> np.ndarray:
            factor = learning_rate_factor(config, step, self.feed.epochs(step), self.clock.seconds())
            if config.learning_rates != "equal":
                factor *= rate_factors(config.learning_rates, self.placement.shape).flat[position]
            return factor

        def take_step(step: int, model: Model, optimizer: optax.OptState) -> tuple[Model, optax.OptState, StepReport]:
            nonlocal batch
            result = compiled(model, optimizer, shared, batch, np.int32(step), rate_factor(step), key)
            batch = coming_batch()  # While the device computes.
            return result

        batch, model = coming_batch(), Model(state.params, state.statistics)
        compiled = program.lower(model, state.optimizer, shared, batch, np.int32(0), rate_factor(0), key).compile()
        slowdown = config.slowdowns[position] if position < len(config.slowdowns) else 1.0
        min_seconds = slowdown * config.min_step_seconds
        return Worker(position, config.steps, model, state.optimizer, take_step, min_seconds=min_seconds)

    def evaluate_if_due(self, count: int) -> None:
        """Evaluate if the steps of all workers have reached the next multiple of `eval_every`, unless it is the end."""
        due = count // (self.size * self.config.eval_every)
        if due > self._evaluations and count < self.size * self.config.steps:
            self._evaluations = due
            self.evaluate()

    def evaluate(self) -> float:
        """Evaluate the workers as they are now, and the evaluated model; returns its headline measure."""
        joined = self.config.asynchronous == "joined"
        # Workers that do not wait for an evaluation may have finished during the previous one.
        seconds = self.clock.seconds(None if joined else max(worker.stepped_at for worker in self.workers))
        params, statistics = self.placement.stacked([worker.model for worker in self.workers])
        of_workers = [(worker.step, worker.mean_loss(), self.taken(worker)) for worker in self.workers]
        stacked = self.placement.put(tuple(map(np.array, zip(*of_workers, strict=True))), STACKED)
        steps, losses, taken = jax.device_get(self._replicate(stacked))
        result = self._evaluate(TrainState(params, statistics, self.exchange_state()), self.shared)
        if joined:
            self.clock.start(seconds)
        sent = self.bytes_sent(int(taken.sum()))
        self.recorder.record_evaluation(
            result, seconds=seconds, worker_steps=steps, train_losses=losses, bytes_sent=sent
        )
        return result.center[self.config.task.headline.name]


class _JoinedRun(_Run):
    """LSGD with the exchange of synchronous training: `leader_pull`, with each worker's score as its loss."""

    def make_exchanges(self) -> Joined:
        """A meeting of all workers every `period` steps of each, on average."""
        config, periods = self.config, [level.period for level in self.config.levels]
        every_time = config.replace(period=1, window=1)
        if config.groups > 1:
            every_time = every_time.replace(global_period=periods[-1] // periods[0])
        pulls = make_method(every_time, self.placement, optax.identity())
        self._pulls = init_state(self.model, pulls, self.placement).optimizer
        self._program = exchange_of_all(pulls, self.placement)
        self._exchange()  # Compiles the program and connects the processes; its result is dropped.
        self._exchanged_steps = 0
        return Joined(
            self.count,
            self._meet,
            own_workers=len(self.workers),
            steps_between=self.size * config.period,
            most=config.steps // config.period,
        )

    def exchange_state(self) -> Any:
        """The state of the pulls, with the last leaders."""
        return self._pulls

    def taken(self, worker: Worker) -> int:
        """Zero: nobody fetches parameters, leaders send them."""
        return 0

    def bytes_sent(self, taken: int) -> float:
        """Bytes sent per worker in all exchanges so far."""
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
        self.recorder.record_leaders(
            self._exchanged_steps,
            jax.device_get(leaders),
            worker_steps=steps,
            staleness=0,
            seconds=self.clock.seconds(),
            count=self.count.total,
        )
        self.evaluate_if_due(self._exchanged_steps * self.size)


class _PostedRun(_Run):
    """LSGD with a board on which workers post themselves."""

    exchanges: Posted

    def __init__(self, *args: Any, board: Board) -> None:
        self._board = board
        super().__init__(*args)

    def make_exchanges(self) -> Posted:
        """A board, with the pulls of the configuration."""
        config = self.config
        levels = [Level(among, self.size * period, own.get("pull", 0.0)) for among, period, own in config.levels]
        return Posted(
            self.count, levels, self._board, workers=self.size, staleness=config.staleness, log=self.recorder.record
        )

    def taken(self, worker: Worker) -> int:
        """How often a worker has fetched its leader from the board."""
        return self.exchanges.taken[worker.position]

    def evaluate_if_due(self, count: int) -> None:
        """Evaluate if it is due; several processes all evaluate equally often, so that none waits forever."""
        if process_count() > 1:
            count = min(count, (self._evaluations + 1) * self.size * self.config.eval_every)
        super().evaluate_if_due(count)

    def finish(self) -> float:
        """Evaluate as often as every process does, and at the end; then close the board."""
        if process_count() > 1:
            while self._evaluations < (self.config.steps - 1) // self.config.eval_every:
                self.evaluate_if_due(self.size * self.config.steps - 1)
        measured = self.evaluate()
        self._board.close()
        return measured


class _CenteredRun(_Run):
    """A method that keeps a center."""

    exchanges: Centered

    def make_exchanges(self) -> Centered:
        """A center variable, met as the method prescribes."""
        config = self.config
        meeting = METHODS[config.method].meeting
        assert meeting is not None  # Else the method is not one for such a run.
        meet = meeting(config.options, self.size)
        start = self.workers[0].model.params
        return Centered(self.count, start, meet, workers=self.size, period=config.period, log=self.recorder.record)

    @property
    def center(self) -> Callable[[optax.Params, Any, Any], optax.Params]:
        """The center variable, which every worker's exchange state is."""
        return lambda params, center, axis_name: broadcast_from(center, 0, axis_name, method="all_reduce")

    def exchange_state(self) -> Any:
        """The center variable, on every device."""
        center = self.exchanges.center
        return self.placement.stacked([jax.device_put(center, device) for device in self.placement.mesh.devices.flat])

    def taken(self, worker: Worker) -> int:
        """Two per meeting: the worker fetches the center, and the center the worker."""
        return 2 * self.exchanges.meetings[worker.position]


def board_of(prepared: Prepared) -> Board:
    """The board of all workers, possibly of several processes."""
    owners = [device.process_index for device in prepared.placement.mesh.devices.flat]
    if process_count() == 1:
        return Board(len(owners))
    params = nnx.state(prepared.model, nnx.Param)
    return SharedBoard(owners, jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 1, *x.shape), x.dtype), params))
