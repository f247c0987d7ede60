"""Asynchronous training with joined workers, who meet at exchanges; `lsgd_jax.train.posted` trains those who don't."""

import math
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx

from lsgd_jax.asynchronous import Joined, Threads
from lsgd_jax.asynchronous.workers import NOTICE
from lsgd_jax.config import Config
from lsgd_jax.costs.ledger import bytes_sent
from lsgd_jax.distributed import SHARED, STACKED, Placement, StepCount, failing_together
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.tracking.progress import RunProgress
from lsgd_jax.tracking.run_folder import RunFolder
from lsgd_jax.train.asynchronous_step import exchange_of_all
from lsgd_jax.train.asynchronous_workers import Trainers
from lsgd_jax.train.evaluate import evaluation
from lsgd_jax.train.recorder import AsynchronousRecorder
from lsgd_jax.train.setup import Prepared, make_method, prepare, step_key
from lsgd_jax.train.step import TrainState, init_state


def train_and_evaluate(
    config: Config, run_dir: Path, *, data_dir: Path | str | None = None, lines: bool = True, tensorboard: bool = False
) -> float:
    """Train joined workers and write the run folder, as `lsgd_jax.train.train_and_evaluate` does.

    Data, learning rates and random keys of a worker's steps are those of synchronous training; how many steps each
    worker has taken at an exchange depends on the machine. Every event has the local steps of all workers together
    (`count`) and, as `step`, their mean. An exchange is logged as in synchronous training, with the steps of each
    worker. Workers are evaluated at exchanges, with the clock stopped.

    Args:
      config: everything that the result depends on.
      run_dir: a folder that is empty or does not exist.
      data_dir: where data sets have been prepared; None: the default of tensorflow-datasets.
      lines: whether to print one line per evaluation.
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
        prepared = prepare(config, data_dir)
        check_devices(prepared.placement)
        folder = RunFolder(run_dir, config, tensorboard=tensorboard)

    with folder, RunProgress(config.steps, log=folder.log, lines=lines) as display:
        display.status("compiling")
        run = _Run(config, prepared, AsynchronousRecorder(config, folder, display))
        display.status("training")
        run.clock.start()
        with Threads(run.workers, run.exchanges) as threads:
            while not threads.have_ended(NOTICE):
                pass
        return run.evaluate()


def check_devices(placement: Placement) -> None:
    """Raise UsageError unless each worker has a device of its own."""
    if placement.slots != (1, 1):
        raise UsageError(
            f"asynchronous needs one device per worker, but there are {placement.mesh.size} devices for"
            f" {math.prod(placement.shape)} workers: lower groups or workers."
        )


class _Run:
    """The workers of this process, their exchanges by `leader_pull` with each worker's score as its loss, and tests."""

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
        trainers = Trainers(config, self.placement.own_workers, self.placement, self.feed, self.model, self.clock)
        self.workers = trainers.workers(trainers.starts)
        self._shared = trainers.shared
        self._compile_exchange()
        self.exchanges = Joined(
            self.count,
            self._meet,
            own_workers=len(self.workers),
            steps_between=self.size * config.period,
            most=config.steps // config.period,
        )
        self._evaluations = 0
        self._evaluate = evaluation(
            config.task,
            self.model,
            METHODS[config.method].center,
            self.placement,
            self.feed,
            batch_statistics=config.batch_statistics,
            statistics_batches=config.statistics_batches,
            key=jax.random.fold_in(step_key(config.seed), config.steps),  # No step's.
        )
        self._replicate = jax.jit(lambda tree: tree, out_shardings=self.placement.sharding(SHARED))

    def _compile_exchange(self) -> None:
        config, periods = self.config, [level.period for level in self.config.levels]
        every_time = config.replace(period=1, window=1)
        if config.groups > 1:
            every_time = every_time.replace(global_period=periods[-1] // periods[0])
        pulls = make_method(every_time, self.placement, optax.identity())
        self._pulls = init_state(self.model, pulls, self.placement).optimizer
        self._program = exchange_of_all(pulls, self.placement)
        self._exchange()  # Compiles the program and connects the processes; its result is dropped.
        self._exchanged_steps = 0

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
        due = self._exchanged_steps // self.config.eval_every
        if due > self._evaluations and self._exchanged_steps < self.config.steps:
            self._evaluations = due
            self.evaluate()

    def evaluate(self) -> float:
        """Evaluate the workers as they are now, and the evaluated model; returns its headline measure."""
        seconds = self.clock.seconds()
        params, statistics = self.placement.stacked([worker.model for worker in self.workers])
        of_workers = [(worker.step, worker.mean_loss()) for worker in self.workers]
        stacked = self.placement.put(tuple(map(np.array, zip(*of_workers, strict=True))), STACKED)
        steps, losses = jax.device_get(self._replicate(stacked))
        result = self._evaluate(TrainState(params, statistics, self._pulls), self._shared)
        self.clock.start(seconds)
        sent = bytes_sent(self.config, nnx.state(self.model, nnx.Param), self._exchanged_steps)
        self.recorder.record_evaluation(
            result, seconds=seconds, worker_steps=steps, train_losses=losses, bytes_sent=sent
        )
        return result.center[self.config.task.headline.name]
