"""The training loop of workers in step."""

import math
import signal
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lsgd_jax.checks import check_path
from lsgd_jax.config import Config
from lsgd_jax.distributed import SHARED, failing_together, from_process_zero
from lsgd_jax.distributed.interruption import deferred_signals
from lsgd_jax.errors import Interrupted, UsageError
from lsgd_jax.tracking.progress import RunProgress, Watch
from lsgd_jax.tracking.run_folder import RunFolder
from lsgd_jax.train import asynchronous, posted
from lsgd_jax.train.checkpoint import Checkpoints
from lsgd_jax.train.evaluate import evaluation
from lsgd_jax.train.evaluated_model import evaluated_model
from lsgd_jax.train.learning_rates import learning_rate_factor
from lsgd_jax.train.progress import Progress
from lsgd_jax.train.recorder import Clock, SynchronousRecorder
from lsgd_jax.train.resume import resumed
from lsgd_jax.train.setup import Prepared, prepare, program_of, rounds, step_key, steps_per_call
from lsgd_jax.train.step import TrainState, init_state


def train_and_evaluate(
    config: Config,
    run_dir: Path | str,
    *,
    data_dir: Path | str | None = None,
    lines: bool = True,
    resume: bool = False,
    tensorboard: bool = False,
    stop_if_all_fail: bool = True,
    positions: Sequence[int] | None = None,
    host: str = posted.LOOPBACK,
    watch: Watch | None = None,
) -> float | None:
    """Train a configuration and write the run folder; of several processes, the first writes it.

    Training is deterministic: one configuration gives the same bits on the same platform and versions, unless the
    learning rate drops by the clock or workers are asynchronous. The seed determines everything random in three
    independent ways: the initialization is that of a model made with the seed's key; randomness in steps comes from
    `step_key`; and the data order is NumPy's, seeded with the seed and the number of the epoch.

    A run is saved and can stop at the ends of compiled programs (`steps_per_call`). Resumed from there, it ends with
    the same bits and the same metrics file, but for its seconds. It may resume with other workers, processes and
    devices, as `lsgd_jax.train.resume` describes, and with more steps, unless its learning rate depends on their
    number.

    Args:
      config: everything that the result depends on.
      run_dir: a folder that is empty or does not exist; with `resume` also one with a run of this configuration.
      data_dir: where data sets have been prepared; None: the default of tensorflow-datasets.
      lines: whether to print one line per evaluation.
      resume: whether to resume from the last checkpoint in the folder; where there is none, the run starts.
      tensorboard: whether to write event files for TensorBoard, too.
      stop_if_all_fail: whether to stop when no worker has finite parameters any more.
      positions: with `posted`, the consecutive workers of this process, of those of all groups; None: all.
      host: with `posted`, the address or name of this machine's network interface, at which other processes reach this
        one.
      watch: is called with the steps taken and a status, in place of a progress bar and lines.

    Returns:
      The last headline measure of the evaluated model, such as its test error in [0, 1]; None in a process of a posted
      run in which another process, or an earlier one, has evaluated the end.

    Raises:
      UsageError: if the configuration does not fit the machine, the data or the run in the folder, the folder has
        files in it or can't be written, its checkpoints can't be read, or all workers have failed.
      Interrupted: if SIGINT, SIGTERM or SIGHUP has stopped the run, after a checkpoint.
    """
    run_dir = check_path("run_dir", run_dir)
    if config.asynchronous == "posted":
        return posted.train_and_evaluate(
            config,
            run_dir,
            positions=positions,
            data_dir=data_dir,
            lines=lines,
            resume=resume,
            tensorboard=tensorboard,
            host=host,
        )
    if config.asynchronous == "joined":
        if resume:
            raise UsageError("joined runs have no checkpoints and can't be resumed: start anew, without resume.")
        return asynchronous.train_and_evaluate(config, run_dir, data_dir=data_dir, lines=lines, tensorboard=tensorboard)
    with failing_together():
        if resume and not config.checkpoint_period:
            raise UsageError("a run resumes from checkpoints, but checkpoint_every is 0: there are none.")
        prepared = prepare(config, data_dir)
        folder = RunFolder(run_dir, config, resume=resume, tensorboard=tensorboard)
    with (
        folder,
        RunProgress(config.steps, log=folder.log, lines=lines, watch=watch) as display,
        Checkpoints(run_dir / "checkpoints", prepared.placement, config.keep_checkpoints) as checkpoints,
    ):
        state, progress = _begin(config, prepared, folder, display, checkpoints, resume=resume)
        if progress.step == config.steps:
            display.message(f"the run has taken its {progress.step} steps already")
        else:
            display.status("compiling")
            params = nnx.state(prepared.model, nnx.Param)
            recorder = SynchronousRecorder(config, folder, display, params, progress)
            run = _Run(config, prepared, state, recorder, checkpoints)
            display.status("training")
            run.train(stop_if_all_fail=stop_if_all_fail)
        return math.nan if progress.error is None else progress.error


def _begin(
    config: Config,
    prepared: Prepared,
    folder: RunFolder,
    display: RunProgress,
    checkpoints: Checkpoints,
    *,
    resume: bool,
) -> tuple[TrainState, Progress]:
    """The state and progress to train from: those of the last checkpoint when resuming, or those of the start."""
    with failing_together():
        if config.checkpoint_period:
            folder.check_seen_by_all()
    if resume:
        display.status("restoring")
        if found := resumed(config, prepared, folder, checkpoints, display.message):
            return found
    placement = prepared.placement
    return init_state(prepared.model, prepared.optimizer, placement), Progress.at_start(placement)


class _Run:
    """The workers' state, and the compiled programs that take it through the run."""

    def __init__(
        self,
        config: Config,
        prepared: Prepared,
        state: TrainState,
        recorder: SynchronousRecorder,
        checkpoints: Checkpoints,
    ) -> None:
        """Compile the steps: before the clock starts, and only once, since another signature would be an error."""
        placement, feed, model, optimizer = prepared
        self.config, self.placement, self.state = config, placement, state
        self.recorder, self.progress, self.checkpoints = recorder, recorder.progress, checkpoints
        self.steps_per_call = steps_per_call(config, self.progress.step)
        self.clock = Clock()
        with failing_together():
            self.feed = feed.after(self.progress.earlier)
        self.batches = rounds(self.feed, placement, config.steps, self.steps_per_call, self.progress.step)
        self.next_batch = next(self.batches)
        self.shared, self.key = placement.put(feed.shared, SHARED), step_key(config.seed)
        program = program_of(config, model, optimizer, placement, self.feed)
        factors = np.ones(self.steps_per_call, np.float32)
        arguments = state, self.shared, self.next_batch, np.int32(0), factors, self.key
        self.program = program.lower(*arguments).compile()
        self.evaluate = evaluation(
            config.task,
            model,
            evaluated_model(config),
            placement,
            feed,
            batch_statistics=config.batch_statistics,
            statistics_batches=config.statistics_batches,
            key=jax.random.fold_in(self.key, config.steps),  # No step's.
        )

    def train(self, *, stop_if_all_fail: bool) -> None:
        """Train to the last step, or to the one on which a signal asks to stop."""
        config, progress, every = self.config, self.progress, self.config.checkpoint_period
        with deferred_signals() if every else nullcontext(lambda: None) as signal_to_stop:
            self.clock.start(progress.seconds)
            for step in range(progress.step + self.steps_per_call, config.steps + 1, self.steps_per_call):
                self.take_steps(step)
                is_last = step == config.steps
                evaluates = is_last or step % config.eval_every == 0
                saves = bool(every) and (is_last or step // every > (step - self.steps_per_call) // every)
                stops = signal_to_stop()
                if not (evaluates or saves or stops) and progress.has_workers:
                    continue
                self.pause(step)
                if stop_if_all_fail and not progress.has_workers:
                    with failing_together():
                        raise UsageError(_all_failed(progress, every))
                if evaluates:
                    self.recorder.record_evaluation(self.evaluate(self.state, self.shared))
                if saves or stops:
                    progress.metrics_length = self.recorder.folder.length()
                    self.checkpoints.save(self.state, progress, progress.error if evaluates else None)
                if stops and not is_last:
                    raise Interrupted(_stopped(stops, step, config.steps, self.recorder.folder.path), stops)
                self.clock.start(progress.seconds)

    def take_steps(self, step: int) -> None:
        """Take the steps of one compiled program, up to this one, and record them."""
        config, taken = self.config, step - self.steps_per_call
        self.placement.wait_for(self.state)
        seconds = self.clock.seconds()
        if config.learning_rate_drops_in == "seconds":  # Drop the rates of all processes together.
            seconds = from_process_zero(seconds)
        factors = learning_rate_factor(config, np.arange(taken, step), self.feed.epochs(taken), seconds)
        self.state, metrics = self.program(self.state, self.shared, self.next_batch, np.int32(taken), factors, self.key)
        self.next_batch = next(self.batches, None)  # While the devices compute.
        self.recorder.record(step, metrics, factors[-1])

    def pause(self, step: int) -> None:
        """Wait until everything up to this step is computed and recorded, and stop the clock."""
        self.recorder.catch_up()
        jax.block_until_ready(self.state)
        self.progress.step, self.progress.seconds = step, self.clock.seconds()


def _stopped(number: int, step: int, steps: int, run_dir: Path) -> str:
    return (
        f"stopped by {signal.Signals(number).name} after step {step} of {steps}; to resume, run the same command with"
        f" --run-dir {run_dir} --resume."
    )


def _all_failed(progress: Progress, every: int) -> str:
    steps = progress.failed_since
    worker = min(steps, key=steps.__getitem__)
    kept = "; earlier checkpoints are kept" if every else ""
    return (
        "all workers have failed, since their steps lead to parameters that are NaN or infinite:"
        f" worker {worker} first, by step {steps[worker]}, and the last by step {max(steps.values())}{kept}."
    )
