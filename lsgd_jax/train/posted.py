"""Asynchronous training with posted workers, who wait for nobody, in one process or in several that may come and go."""

import math
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx

from lsgd_jax.asynchronous import Board, Centered, Level, Model, Posted, Threads, Worker
from lsgd_jax.asynchronous.board import Gone, Post, ranked
from lsgd_jax.asynchronous.gossip import GossipBoard
from lsgd_jax.asynchronous.links import injected_faults
from lsgd_jax.asynchronous.rendezvous import begin_life, run_secret
from lsgd_jax.asynchronous.workers import NOTICE
from lsgd_jax.config import Config
from lsgd_jax.data import Feed
from lsgd_jax.distributed import Placement, place
from lsgd_jax.distributed.interruption import deferred_signals
from lsgd_jax.distributed.supervision import Heartbeat
from lsgd_jax.errors import Interrupted, RunFailed, UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.tracking.member_folder import MemberFolder
from lsgd_jax.tracking.progress import RunProgress
from lsgd_jax.train import saved_worker
from lsgd_jax.train.asynchronous import check_devices
from lsgd_jax.train.asynchronous_workers import Start, Trainers
from lsgd_jax.train.posted_evaluation import Evaluations
from lsgd_jax.train.recorder import AsynchronousRecorder
from lsgd_jax.train.saved_worker import Saved, SavedWorker
from lsgd_jax.train.setup import make_feed, make_model
from lsgd_jax.train.step import TrainState
from lsgd_jax.train.task_checks import check_functions

LOOPBACK = "127.0.0.1"
"""The interface at which no other machine reaches a process."""


def train_and_evaluate(
    config: Config,
    run_dir: Path,
    *,
    positions: Sequence[int] | None = None,
    data_dir: Path | str | None = None,
    lines: bool = True,
    resume: bool = False,
    tensorboard: bool = False,
    host: str = LOOPBACK,
) -> float | None:
    """Train posted workers and write the run folder, as `lsgd_jax.train.train_and_evaluate` does.

    Data, learning rates and random keys of a worker's steps are those of synchronous training; how many steps each
    worker has taken at an exchange depends on the machine. Every process writes events of its own workers, with the
    local steps of all workers together (`count`) and, as `step`, their mean:

    - "start": a worker begins a `life`, after `step` steps in earlier ones, `from` another worker (its life and its
      step), from its own state that was "saved" after so many steps of a life, before or after it was pulled at that
      step (`pulled`), or from the start of all (null).
    - "exchange": a worker has met its leader, or the center: the steps that the worker has taken (`worker_step`), the
      leader, and the life and the steps of the leader after which its parameters were posted, before any pull at that
      step; the distance to it, and the steps that it had taken since it posted (`staleness`).
    - "checksum": of a worker's parameters after `step` steps, before a pull at that step or, at the end of a life,
      after it (`pulled`).
    - "end" of a life: finished, left (by a signal) or replaced.

    The process that has been in the run for the longest time evaluates, while all train on; at the end it evaluates
    when all have finished.

    Args:
      config: everything that the result depends on.
      run_dir: a folder that is empty or does not exist; with `resume`, or if other processes have begun the run, also
        that of this run.
      positions: consecutive workers of this process, of those of all groups; None: all.
      data_dir: where data sets have been prepared; None: the default of tensorflow-datasets.
      lines: whether to print one line per evaluation.
      resume: whether these workers may have trained before. If other processes are training, each starts from the
        leader, unless it was better when it was saved last.
      tensorboard: whether to write event files for TensorBoard, too.
      host: address or name of this machine's network interface, at which other processes reach this one.

    Returns:
      The headline measure of the evaluated model at the end, such as its test error in [0, 1]; None in a process
      that has not evaluated it.

    Raises:
      UsageError: if the configuration does not fit the machine or the data, or the folder has files in it or can't be
        written.
      RunFailed: if a worker fails, at the latest `lsgd_jax.asynchronous.workers.GRACE` seconds after it has failed or
        the evaluation under way has ended, or if its place has been taken by another process. Others train on.
      Interrupted: if SIGINT, SIGTERM or SIGHUP has stopped this process, after its workers were saved.
    """
    everybody = range(config.groups * config.workers)
    positions = everybody if positions is None else positions
    alone = len(positions) == len(everybody)
    shape = (config.groups, config.workers) if alone else (1, len(positions))
    placement = place(*shape, jax.local_devices())
    check_devices(placement)
    feed, model = make_feed(config, data_dir, positions), make_model(config)
    check_functions(config.task, model, feed, config.worker_batch_size)
    folder = MemberFolder(run_dir, config, positions, resume=resume, tensorboard=tensorboard)
    with folder, RunProgress(config.steps, log=folder.log, lines=lines) as display:
        if folder.is_finished:
            display.message(f"the run has taken its {config.steps} steps already")
            return None
        display.status("compiling")
        member = _Member(config, positions, placement, feed, model, folder, display, resume=resume, host=host)
        display.status("training")
        return member.train()


class _Member:
    """A process of the run: its workers, how they exchange, and how they are evaluated and saved."""

    def __init__(
        self,
        config: Config,
        positions: Sequence[int],
        placement: Placement,
        feed: Feed,
        model: nnx.Module,
        folder: MemberFolder,
        display: RunProgress,
        *,
        resume: bool,
        host: str,
    ) -> None:
        """Compile all programs and join the run."""
        self.config, self.positions, self.folder, self.display = config, positions, folder, display
        self.resume, self.has_told_of_waiting = resume, False
        self.recorder = AsynchronousRecorder(config, folder, display)
        self.size = config.groups * config.workers
        self.heartbeat = Heartbeat()
        self.is_alone = len(positions) == self.size
        self.trainers = trainers = Trainers(config, positions, placement, feed, model, self.recorder.clock)
        self.board = self._make_board(trainers.starts[0].state, host)
        starts, origins = self._starts(trainers)
        self.workers = trainers.workers(starts)
        for worker in self.workers:
            self.board.write(worker.position, worker.step, None)
        self.exchanges = self._make_exchanges()
        with ThreadPoolExecutor() as pool:
            list(pool.map(self.exchanges.compile, self.workers))
        self.saved = Saved(
            self.exchanges,
            folder.state_of,
            config.checkpoint_period,
            life=self.board.life,
            seconds=self.recorder.clock.seconds,
            log=partial(folder.log, "checksum"),
            warn=display.message,
        )
        self.has_center = METHODS[config.method].meeting is not None
        self.evaluations = Evaluations(
            config,
            model,
            feed,
            self.board,
            self.workers,
            self.recorder,
            shared=trainers.shared if self.is_alone else None,
            center=(lambda: self.exchanges.center) if self.has_center else None,
            bytes_sent=self._bytes_sent,
        )
        trained = saved_worker.trained_seconds(map(folder.state_of, range(self.size)))
        self.recorder.clock.start(time.time() - folder.begun(trained))
        for worker, origin in zip(self.workers, origins, strict=True):
            self._log("start", worker, seconds=time.time(), **{"from": origin})
        self._warn_if_unanswered()

    def _make_board(self, state: TrainState, host: str) -> Board:
        if self.is_alone:
            return Board(begin_life(self.folder.members, self.positions, "no address"))
        return GossipBoard(
            self.folder.path,
            self.positions,
            Model(state.params, state.statistics),
            secret=run_secret(self.folder.members / "secret"),
            host=host,
            faults=injected_faults(self.positions[0]),
            log=self._log_of_board,
        )

    def _warn_if_unanswered(self) -> None:
        """Say so if other processes live, by the locks of their workers, and none of them can be reached yet."""
        if self.board.unanswered and self.board.living() <= set(self.positions) and self.folder.held_elsewhere():
            self.display.message(
                "no other process of this run has answered yet: processes on several machines need --host, "
                "an address at which the others reach them"
            )

    def _log_of_board(self, event: str, *, count: int, **values: Any) -> None:
        self.folder.log(event, step=count // self.size, count=count, **values)

    def _make_exchanges(self) -> Any:
        config = self.config
        meeting = METHODS[config.method].meeting
        if meeting is None:
            levels = [Level(among, self.size * period, own.get("pull", 0.0)) for among, period, own in config.levels]
            return Posted(levels, self.board, workers=self.size, staleness=config.staleness, log=self.recorder.record)
        center, meet = self._saved_center(), meeting(config.options, self.size)
        return Centered(self.board, center, meet, workers=self.size, period=config.period, log=self.recorder.record)

    def _saved_center(self) -> optax.Params:
        """The center as it was saved last, or the parameters of a worker at its start."""
        start = self.workers[0].model.params
        saved = self._restored(self.folder.center, start, "the center starts from a worker") if self.resume else None
        return start if saved is None else _put_like(start, saved.state)

    def _starts(self, trainers: Trainers) -> tuple[list[Start], list[Any]]:
        """Where the workers start, and what from, as a "start" event tells it.

        Who has trained before goes on from the better of its own saved state and the leader's parameters, at the step
        to which it is known to have come.
        """
        if not self.resume:
            return trainers.starts, [None] * len(trainers.starts)
        known = self.board.read()[1]
        starts: list[Start] = []
        origins: list[Any] = []
        for position, common in zip(self.positions, trainers.starts, strict=True):
            path, otherwise = self.folder.state_of(position), f"worker {position} starts from the leader, or anew"
            saved, leader = self._restored(path, common.state, otherwise), self._leader(common.state)
            step = max(known.get(position, 0), 0 if saved is None else saved.step)
            if saved is not None and (leader is None or saved.score <= leader[1].score):
                window_left = max(0, saved.eligible_from - saved.step)
                starts.append(Start(_put_like(common.state, saved.state), step, step + window_left, saved.score))
                origins.append({"saved": saved.step, "life": saved.life, "pulled": saved.pulled})
            elif leader is not None:
                best, post, model = leader
                starts.append(trainers.start_from(model, step))
                origins.append({"worker": best, "life": post.life, "step": post.step})
            else:
                starts.append(common._replace(step=step))
                origins.append(None)
        return starts, origins

    def _restored(self, path: Path, like: Any, otherwise: str) -> SavedWorker | None:
        """What was saved in a file; None if nothing was, or it can't be read: then it is set aside, with a sentence."""
        try:
            return saved_worker.restore(path, like)
        except UsageError as error:
            self.display.message(f"{error}: {otherwise}")
            path.replace(path.with_name(f"unreadable-{path.name}"))
            return None

    def _leader(self, like: TrainState) -> tuple[int, Post, Model] | None:
        """The best worker who can be had: its position, and its model on the device of a worker, with its post."""
        [device] = jax.tree.leaves(like.params)[0].devices()
        posts, _ = self.board.read()
        for position in ranked(posts):
            with suppress(Gone):
                model, post = self.board.take(position, posts[position], device)
                if post.eligible:
                    return position, post, model
        return None

    def train(self) -> float | None:
        """Train until all living workers have finished; returns the measure of the evaluated model if it is found here.

        Raises:
          Interrupted: if a signal has asked this process to leave.
          RunFailed: if another process has taken the place of this one.
        """
        self.heartbeat.beat()
        workers = self.workers
        if self.folder.is_finished:
            self.display.message("the run has taken its steps while this process compiled")
            workers = []
        # Whatever ends it, others are to notice at once.
        with deferred_signals() as signal_to_stop, closing(self.board):
            with Threads(workers, self.saved) as threads:
                why, number = self._until_end(threads, signal_to_stop)
            measured = None
            if why == "finished" and not self.folder.is_finished:
                measured = self._evaluate_end()
            running = threads.running()
            for worker in self.workers:
                if worker in running:
                    self.display.message(f"worker {worker.position} is still in a step, and is not saved again")
                elif why != "replaced":  # Else the file is the other process's.
                    self.saved.at_end(worker)
                self._log("end", worker, why=why)
            self._save_center()
            self.saved.close()
            self.evaluations.close()
            self.heartbeat.end()
        if number is not None:
            raise Interrupted(self._left(number), number)
        if why == "replaced":
            raise RunFailed("this process was stopped for so long that another has taken its place.")
        return measured

    def _until_end(self, threads: Threads, signal_to_stop: Callable[[], int | None]) -> tuple[str, int | None]:
        """Wait and evaluate while workers train; returns why that has ended, and the signal if there was one."""
        taken, saves, finished = -1, 0, False
        while True:
            if not finished and (finished := threads.have_ended(NOTICE)):
                self.folder.finish_workers()
            if finished or taken != (taken := sum(worker.step for worker in self.workers)):
                self.heartbeat.beat()
            every = self.config.checkpoint_period * len(self.workers)
            if every and saves != (saves := taken // every):
                self._save_center()
            if (number := signal_to_stop()) is not None:
                return "left", number
            if self.board.replaced:
                return "replaced", None
            is_oldest = self.board.oldest() is None
            if finished and (self.folder.is_finished or (is_oldest and self._have_finished())):
                return "finished", None
            self.evaluations.if_due(here=is_oldest)
            if finished:
                time.sleep(NOTICE)

    def _save_center(self) -> None:
        """Save the center, if the method has one and it is here."""
        if self.has_center and self.config.checkpoint_period and self.board.oldest() is None:
            center = jax.device_get(self.exchanges.center)
            step = max(worker.step for worker in self.workers)
            try:
                saved_worker.save(self.folder.center, SavedWorker(self.board.life, step, True, 0, math.inf, center))
            except OSError as error:
                self.display.message(f"the center can't be saved ({error.strerror}); what was saved before is kept")

    def _evaluate_end(self) -> float:
        """Evaluate when all have finished, and tell the others that they may leave; returns the measure."""
        running = self.evaluations.at_end()
        while not running.done():
            self.heartbeat.beat()
            time.sleep(NOTICE)
        self.folder.finish()
        return running.result()

    def _have_finished(self) -> bool:
        """Whether all living workers have taken all their steps, those of processes that can't be reached included."""
        steps = self.board.read()[1]
        if any(steps.get(position, 0) < self.config.steps for position in self.board.living()):
            return False
        try:
            unfinished = self.folder.unfinished_elsewhere()
        except (UsageError, OSError):  # Another process has the folder for longer than usual: ask again.
            return False
        unreachable = {i for i in unfinished if steps.get(i, 0) < self.config.steps}
        if unreachable and not self.has_told_of_waiting:
            self.has_told_of_waiting = True
            which = ", ".join(map(str, sorted(unreachable)))
            self.display.message(f"the run ends when worker {which} has taken its steps: its process can't be reached")
        return not unreachable

    def _bytes_sent(self) -> float:
        """Bytes that a worker of this process has fetched so far, the mean over them."""
        taken = sum(self.exchanges.taken[worker.position] for worker in self.workers)
        size = sum(x.nbytes for x in jax.tree.leaves(self.workers[0].model.params))
        return taken * size / len(self.workers)

    def _log(self, event: str, worker: Worker, **values: Any) -> None:
        self.folder.log(event, worker=worker.position, life=self.board.life, step=worker.step, **values)

    def _left(self, number: int) -> str:
        step = min(worker.step for worker in self.workers)
        stopped = f"stopped by {signal.Signals(number).name} after step {step} of {self.config.steps}"
        if self.is_alone and not self.config.checkpoint_period:
            return f"{stopped}; nothing was saved."
        run_dir = self.folder.path
        return f"{stopped}; to come back: lsgd join {run_dir}, or lsgd train with --run-dir {run_dir} --resume."


def _put_like(like: Any, saved: Any) -> Any:
    """Saved arrays on the devices of others."""
    return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), saved, like)
