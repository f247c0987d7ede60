"""The training loop."""

import signal
import time
from collections import deque
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lsgd_jax.checks import check_path
from lsgd_jax.config import Config
from lsgd_jax.costs.ledger import bytes_sent
from lsgd_jax.distributed import SHARED, failing_together, from_process_zero
from lsgd_jax.distributed.interruption import deferred_signals
from lsgd_jax.errors import Interrupted, UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.tracking.progress import RunProgress
from lsgd_jax.tracking.run_folder import RunFolder
from lsgd_jax.train import asynchronous
from lsgd_jax.train.checkpoint import Checkpoints, Progress
from lsgd_jax.train.evaluate import evaluation
from lsgd_jax.train.learning_rates import learning_rate_factor
from lsgd_jax.train.recorder import log_exchange
from lsgd_jax.train.resume import resumed
from lsgd_jax.train.setup import prepare, rounds, step_key, steps_per_call
from lsgd_jax.train.step import StepMetrics, init_state, local_steps, state_shapes


def train_and_evaluate(
    config: Config,
    run_dir: Path | str,
    *,
    data_dir: Path | str | None = None,
    lines: bool = True,
    resume: bool = False,
    tensorboard: bool = False,
    stop_if_all_fail: bool = True,
) -> float:
    """Train with the configuration and write the run's folder; of several processes, the first writes it.

    The same configuration gives the same bits on the same platform and versions, unless the learning rate drops by
    the clock or workers are asynchronous. All that is random comes from the seed by three independent ways: the start
    is the parameters of a model made with the seed's key; what is random in steps comes from `step_key`; and the data's
    order is NumPy's, seeded with the seed and the number of the epoch.

    A run is saved and can stop at the ends of compiled programs (`steps_per_call`). It goes on from there to the same
    bits and the same metrics file, but for its seconds. It may go on with other workers, processes and devices, as
    `lsgd_jax.train.resume` tells, and to more steps, unless its learning rate drops at fractions of them.

    Args:
      config: what the run depends on.
      run_dir: a folder that is empty or does not exist; with `resume` also one with a run of this configuration.
      data_dir: where data sets have been prepared; None: tensorflow-datasets' own default.
      lines: whether to print a line an evaluation where there is no terminal.
      resume: whether to go on from the last checkpoint in the folder; where there is none, the run starts.
      tensorboard: whether to write event files for TensorBoard, too.
      stop_if_all_fail: whether to stop when no worker has finite parameters any more.

    Returns:
      The center's last test error, in [0, 1].

    Raises:
      UsageError: if the configuration does not fit the machine, the data or the run in the folder, the folder has
        files in it or can't be written, its checkpoints can't be read, or all workers have failed.
      Interrupted: if a SIGINT, SIGTERM or SIGHUP has stopped the run, after a checkpoint.
    """
    run_dir = check_path("run_dir", run_dir)
    if config.asynchronous is not None:
        if resume:
            raise UsageError("asynchronous runs are not saved, and can't go on: start anew, without resume.")
        return asynchronous.train_and_evaluate(config, run_dir, data_dir=data_dir, lines=lines, tensorboard=tensorboard)
    every = config.checkpoint_period
    with failing_together():
        if resume and not every:
            raise UsageError("a run goes on from checkpoints, but checkpoint_every is 0: there are none.")
        placement, feed, model, optimizer = prepare(config, data_dir)
        folder = RunFolder(run_dir, config, resume=resume, tensorboard=tensorboard)

    with (
        folder,
        RunProgress(config.steps, log=folder.log, lines=lines) as shown,
        Checkpoints(run_dir / "checkpoints", placement, config.keep_checkpoints) as checkpoints,
    ):
        with failing_together():
            if config.checkpoint_period:
                folder.check_seen_by_all()
        params = nnx.state(model, nnx.Param)
        shared = placement.put(feed.shared, SHARED)
        key = step_key(config.seed)
        start = partial(init_state, model, optimizer, placement)
        shapes = state_shapes(model, optimizer, placement)
        if resume:
            shown.say("restoring")
        found = resumed(checkpoints, folder, config, placement, start, shapes, params, shown.tell) if resume else None
        state, progress = found or (start(), Progress.at_start(placement))
        first = progress.step
        at_once = steps_per_call(config, first)
        with failing_together():
            resumed_feed = feed.after(progress.earlier)
        batches = rounds(resumed_feed, placement, config.steps, at_once, first)
        if first == config.steps:
            shown.tell(f"the run has taken its {first} steps already")
            return progress.error or 0.0

        shown.say("compiling")  # Before the clock starts, and only once: another signature would be an error.
        program, batch = local_steps(model, optimizer, placement, feed), next(batches)
        take_steps = program.lower(state, shared, batch, np.int32(0), np.float32(1), key).compile()
        evaluate = evaluation(
            model,
            METHODS[config.method].center,
            placement,
            feed,
            batch_statistics=config.batch_statistics,
            statistics_batches=config.statistics_batches,
            key=jax.random.fold_in(key, config.steps),  # No step's.
        )

        shown.say("training")
        pending: deque[tuple[int, StepMetrics]] = deque()
        with deferred_signals() if every else nullcontext(lambda: None) as asked_to_stop:
            started = time.perf_counter()
            for step in range(first + at_once, config.steps + 1, at_once):
                placement.wait_for(state)
                clock = progress.seconds + time.perf_counter() - started
                if config.learning_rate_drops_in == "seconds":  # The rates of all processes drop together.
                    clock = from_process_zero(clock)
                rate_factor = learning_rate_factor(config, step - at_once, resumed_feed.epochs(step - at_once), clock)
                state, metrics = take_steps(state, shared, batch, np.int32(step - at_once), rate_factor, key)
                batch = next(batches, None)  # While the devices compute.
                pending.append((step, metrics))
                while len(pending) > 2:  # Recorded behind the computation, so that it need not wait.
                    _tell(folder, config, progress, *pending.popleft())

                evaluates = step % config.eval_every == 0 or step == config.steps
                saves = bool(every) and (step // every > (step - at_once) // every or step == config.steps)
                stops = asked_to_stop()
                if evaluates or saves or stops or not progress.has_workers:
                    while pending:
                        _tell(folder, config, progress, *pending.popleft())
                    jax.block_until_ready(state)
                    progress.step, progress.seconds = step, progress.seconds + time.perf_counter() - started
                    if stop_if_all_fail and not progress.has_workers:
                        with failing_together():
                            raise UsageError(_all_failed(progress, every))
                    if evaluates:
                        result = evaluate(state, shared)
                        train_losses = np.mean(progress.losses, axis=0)
                        progress.losses.clear()
                        progress.error = result.center_error
                        folder.log(
                            "evaluation",
                            step=step,
                            seconds=progress.seconds,
                            bytes_sent=progress.bytes_before + bytes_sent(config, params, step),
                            learning_rate_factor=rate_factor,
                            train_losses=train_losses,
                            center_error=result.center_error,
                            center_loss=result.center_loss,
                            worker_errors=result.worker_errors,
                        )
                        shown.show(
                            step,
                            loss=float(np.mean(train_losses)),
                            error=result.center_error,
                            leader=None if metrics.leaders is None else int(metrics.leaders.positions[0, 0, -1]),
                            steps_per_second=step / progress.seconds,
                        )
                    if saves or stops:
                        progress.metrics_length = folder.length()
                        checkpoints.save(state, progress, progress.error if evaluates else None)
                    if stops and step < config.steps:
                        name = signal.Signals(stops).name
                        raise Interrupted(
                            f"stopped by {name} after step {step} of {config.steps}; the same command goes on with"
                            f" --run-dir {run_dir} --resume.",
                            stops,
                        )
                    started = time.perf_counter()
    return result.center_error


def _tell(folder: RunFolder, config: Config, progress: Progress, step: int, metrics: StepMetrics) -> None:
    """Log and note what has happened in a program that ended with a step."""
    loss, failed, leaders = jax.device_get(metrics)
    progress.losses.append(loss)
    progress.scores = np.where(failed, np.inf, loss if leaders is None else leaders.score).tolist()
    if leaders is not None and step % config.period == 0:
        log_exchange(folder, config, step, leaders)
        if leaders.revived.any():
            folder.log("revival", step=step, workers=np.flatnonzero(leaders.revived))
    since, now = progress.failed_since, np.flatnonzero(failed).tolist()
    if new := [worker for worker in now if str(worker) not in since]:
        folder.log("failure", step=step, workers=new)
    progress.failed_since = {str(worker): since.get(str(worker), step) for worker in now}


def _all_failed(progress: Progress, every: int) -> str:
    steps = progress.failed_since
    worker = min(steps, key=steps.__getitem__)
    kept = "; checkpoints from before are kept" if every else ""
    return (
        "all workers have failed, since their steps lead to parameters that are NaN or infinite:"
        f" worker {worker} first, by step {steps[worker]}, and the last by step {max(steps.values())}{kept}."
    )
