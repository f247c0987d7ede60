"""Commands of `lsgd`, one function per command; their arguments are its options."""

import os
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from lsgd_jax import distributed, files
from lsgd_jax.checks import check_names, check_path
from lsgd_jax.cli.options import (
    ASYNCHRONOUS,
    CHECKPOINTS,
    COSTS,
    TUNING,
    Options,
    check_target,
    refuse,
)
from lsgd_jax.config import Config
from lsgd_jax.distributed.interruption import stopped_at_once
from lsgd_jax.errors import AgreedError, UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.simulate.cluster import Cluster
from lsgd_jax.simulate.events import SCHEDULES
from lsgd_jax.tasks.classification import DatasetName, NetworkName
from lsgd_jax.tracking.output import say

MOST_SEEDS = 10_000
"""Maximum number of seeds of a comparison."""


def train(
    options: Options,
    run_dir: Path | None = None,
    data_dir: Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    processes: int | None = None,
    host: str | None = None,
) -> int:
    """Train a preset with one method and write a run folder: configuration, environment, metrics and a figure.

    Presets come with the package or are your own: lsgd train ./mine.py:preset, or lsgd train package.module:preset.

    On SIGINT (Ctrl-C), SIGTERM or SIGHUP the run saves a checkpoint and stops with exit code 128 + signal number; a
    second Ctrl-C stops it immediately. Runs without checkpoints stop immediately.

    Args:
      options: preset and overrides.
      run_dir: run folder to write; by default one under runs/ named after the task and the time.
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      resume: resume from the latest checkpoint in the run folder, or start if there is none. The numbers of workers,
        processes, devices and steps may change, and the chips of each worker.
      tensorboard: also write TensorBoard event files, to the subfolder tensorboard of the run folder.
      processes: number of processes; by default LSGD_PROCESSES or as many as the cluster has started. 1 trains in a
        single process, even in a SLURM job of several tasks.
      host: with --asynchronous posted, the address or name of this machine's network interface at which processes on
        other machines reach this one; by default only processes on this machine do.
    """
    if resume and run_dir is None:
        raise UsageError("a run is resumed in its folder: name it with --run-dir.")
    options.refuse(TUNING, "in train: it is for compare with --tune")
    config = options.checked()
    if host is not None and config.asynchronous != "posted":
        raise UsageError("host has no effect unless training is posted.")
    if run_dir is not None:
        check_path("run_dir", run_dir)
    run_dir = run_dir or default_run_dir(config)
    note = "nothing was saved"
    if config.checkpoint_period and config.asynchronous != "joined":
        note = f"no step was under way, and the same command resumes with --run-dir {run_dir} --resume"
    with stopped_at_once(note):
        if sys.stderr.isatty() and os.environ.get(distributed.PROCESS, "0") == "0":
            workers = f"{config.groups} x {config.workers} workers, {config.steps:,} steps of each"
            say(f"{config.task} with {config.method}: {workers}; the run is in {run_dir}", sys.stderr)
        from lsgd_jax.train import train_and_evaluate
        from lsgd_jax.train.posted import LOOPBACK

        of_posted: dict[str, Any] = {}
        if config.asynchronous == "posted":
            place = distributed.posted_place(processes)
            own = _own_workers(config, *place)
            distributed.simulate_devices(len(own))
            of_posted = {"positions": own, "host": host or LOOPBACK} if place[1] > 1 else {}
        else:
            distributed.initialize(processes)
            distributed.simulate_devices(config.groups * config.workers * config.chips_per_worker)
        measured = train_and_evaluate(
            config, run_dir, data_dir=data_dir, resume=resume, tensorboard=tensorboard, **of_posted
        )
        if measured is not None:  # Else another process has evaluated the end, or an earlier one.
            report_result(config, run_dir, measured)
    return 0  # Even if the output was lost: the run is in its folder.


def default_run_dir(config: Config) -> Path:
    """A run folder named after the task and the time."""
    return Path("runs") / f"{config.task}-{time.strftime('%Y%m%d-%H%M%S')}"


def _own_workers(config: Config, process: int, processes: int) -> range:
    """The workers of a process of a posted run."""
    workers = config.groups * config.workers
    if workers % processes:
        raise UsageError(
            f"{workers} workers can't be distributed evenly among {processes} processes: change groups or workers."
        )
    own = workers // processes
    return range(process * own, (process + 1) * own)


def report_result(config: Config, run_dir: Path, measured: float) -> None:
    """Draw a finished run and print its result, in the process that has evaluated it."""
    with distributed.failing_together():  # The others wait for the first until it has ended.
        if distributed.process_index() == 0:
            from lsgd_jax.figures import run
            from lsgd_jax.tracking.run_folder import read_metrics

            picture, (_, leaders) = run.draw(run_dir), run.leaders_of(run_dir)
            sent = read_metrics(run_dir, "evaluation")[-1]["bytes_sent"]
    if distributed.process_index() == 0:
        headline = config.task.headline
        result = f"{headline.title} of the evaluated model after {config.steps} steps: {headline.text(measured)}"
        details = f"{sent / 1e6:,.2f} MB sent per worker"
        if len(leaders):
            leader = "global leader" if config.groups > 1 else "leader"
            details += f", {leader} changes: {np.count_nonzero(np.diff(leaders))} in {len(leaders)} exchanges"
        say(f"{result}; {details}; see {picture}")


def compare(
    options: Options,
    methods: str = ",".join(METHODS),
    seeds: str = "0..4",
    out: Path | None = None,
    tune: bool = False,
    target: float | None = None,
    data_dir: Path | None = None,
) -> int:
    """Compare methods on a preset over several seeds; writes a table and a figure.

    Finished runs in the output folder are not trained again, so the same command resumes an interrupted comparison.

    Args:
      options: preset and overrides.
      methods: comma-separated methods. An option applies to all methods that have it.
      seeds: comma-separated seeds, or a range like 0..4.
      out: output folder; by default one under runs/ named after task and number of workers.
      tune: tune each method's hyperparameters over nine cells, and whether its tail mean is evaluated, on held-out
        training data with other seeds.
      target: report steps and bytes to this error or loss; by default the task's, such as 0.05. It is a value of
        the measure by which runs are compared; errors are in [0, 1].
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    names, numbers = _names(methods, METHODS), _seeds(seeds)
    for name in ("method", "seed", "validation"):
        if name in options.given:
            raise UsageError(f"compare chooses the {name} itself: use --methods, --seeds and --tune.")
    options.refuse(CHECKPOINTS, "in compare, which keeps no checkpoints")
    if not tune:
        options.refuse(TUNING, "without --tune")
    check_target(target, options.task.headline)
    with stopped_at_once("the same command trains the unfinished runs"):
        from lsgd_jax.compare import compare as run_comparison
        from lsgd_jax.compare import configs_of

        [config, *_] = configs_of(options.base, names, options.given).values()
        distributed.initialize()
        if distributed.process_count() > 1:
            raise AgreedError("compare runs in one process, but this is one of several: only train supports several.")
        workers = config.groups * config.workers
        distributed.simulate_devices(workers * config.chips_per_worker)
        out = out or Path("runs") / f"compare-{config.task}-{workers}"
        summary = run_comparison(
            options.base,
            names,
            numbers,
            out,
            tune=tune,
            target=target,
            options=options.given,
            data_dir=data_dir,
        )
        from lsgd_jax.compare import show
        from lsgd_jax.figures import comparison

        picture = comparison.draw(out, names, numbers)
        show(summary)
        say(f"see {out / 'comparison.md'} and {picture}")
    return 0  # As in `train`.


def _names(text: str, known: Collection[str]) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    check_names("method", names, known)
    return names


def _seeds(text: str) -> list[int]:
    try:
        first, dots, last = text.partition("..")
        numbers = range(int(first), int(last) + 1) if dots else [int(seed) for seed in text.split(",")]
    except ValueError:
        numbers = []
    seeds = list(numbers[: MOST_SEEDS + 1])
    if len(seeds) > MOST_SEEDS:
        raise UsageError(f"seeds must be at most {MOST_SEEDS:,}, got {text!r}.")
    if not seeds or min(seeds) < 0 or max(seeds) >= 2**32 or len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds must be different numbers in [0, 2^32), like 0,1,2 or 0..4, got {text!r}.")
    return seeds


def simulate(
    options: Options,
    cluster: tyro.conf.OmitArgPrefixes[Cluster],
    methods: str = ",".join(SCHEDULES),
    costs_only: bool = False,
    parameters: int | None = None,
    target: float | None = None,
    out: Path = Path("simulation"),
    data_dir: Path | None = None,
) -> None:
    """Simulate methods in virtual time, with heterogeneous workers and network costs.

    A simulation ends when all workers together have taken workers * --steps steps. It is deterministic: virtual time
    does not depend on the machine. For example, 8 workers, the first at a tenth of the others' speed:

    lsgd simulate digits --groups 1 --workers 8 --slow 0 10

    Args:
      options: preset and overrides; --methods replaces its method.
      cluster: machines and links.
      methods: comma-separated methods; lsgd-joined and lsgd-posted are asynchronous. With lsgd-joined, all workers
        exchange when their total number of steps reaches the next period; with lsgd-posted, workers post scores and
        parameters to a board and wait only for it; with easgd and downpour, each worker exchanges with the center's
        server on its own clock.
      costs_only: report times, waiting, staleness and bytes without training, for up to 100,000 workers.
      parameters: number of float32 parameters sent, with --costs-only; by default those of the network.
      target: report the time to this test error or loss; by default the task's, such as 0.05. It is a value of the
        measure by which runs are compared; errors are in [0, 1].
      out: output folder for the timeline, the staleness and, with training, the measure, as figures, CSV and JSON.
      data_dir: folder of prepared data sets; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    names = _names(methods, SCHEDULES)
    if "method" in options.given:
        raise UsageError("simulate chooses the method itself: use --methods.")
    if "asynchronous" in options.given:
        raise UsageError(
            "simulate chooses the method itself: use --methods lsgd-joined or lsgd-posted in place of --asynchronous."
        )
    options.refuse((*TUNING, *CHECKPOINTS, *ASYNCHRONOUS, "revive"), "in simulate")
    if costs_only:
        refuse(options.given.keys() - {*COSTS, *options.task.fields}, "with --costs-only")
        if parameters is not None:
            options.refuse(options.task.fields, "with --parameters")
        for_training = {"data_dir": data_dir, "target": target}
        refuse((name for name, value in for_training.items() if value is not None), "with --costs-only")
    check_target(target, options.task.headline)
    if parameters is not None and (parameters < 1 or not costs_only):
        raise UsageError(f"parameters must be at least 1, with --costs-only, got {parameters}.")
    files.check_writable(out)
    from lsgd_jax.figures import simulation

    results = simulation.make(
        out,
        options.base,
        cluster,
        names,
        train=not costs_only,
        target=target,
        options=options.given,
        parameters=parameters,
        data_dir=data_dir,
    )
    simulation.show(results, options.task.headline)
    say(f"see {out}")


def figure(
    name: Annotated[
        Literal["trajectories", "nonconvex", "matrix-completion", "analytic", "theory", "F4", "F5", "F6", "F7", "F8"],
        tyro.conf.Positional,
    ],
    out: Path = Path("figures"),
    runs: Path | None = None,
    model: NetworkName | None = None,
    dataset: DatasetName | None = None,
) -> None:
    """Draw a figure of the paper, and write its curves (CSV) and numbers (JSON).

    Args:
      name: figure. analytic: the first three; theory: every claim of the paper, measured, with a table of verdicts; F4
        to F8: from finished runs.
      out: output folder.
      runs: folder searched, with its subfolders, for runs (F4 to F8) or comparisons (theory); by default runs.
      model: network for F4 to F8; by default the paper's.
      dataset: data set for F4 to F8; by default the paper's.
    """
    from lsgd_jax.paper import analytic, networks

    from_runs = name in networks.FIGURES
    without_effect: dict[str, Any] = {} if from_runs else {"model": model, "dataset": dataset}
    if not from_runs and name != "theory":
        without_effect["runs"] = runs
    refuse((option for option, value in without_effect.items() if value is not None), f"on the figure {name}")
    runs = runs or Path("runs")
    files.check_writable(out)
    if from_runs:
        print(networks.make(name, runs, out, model=model, dataset=dataset) + f"\nsee {out / name}.png")
        return
    if name == "theory":
        from lsgd_jax.paper import verdicts

        print(f"{verdicts.make(out, runs)}see {out / 'theory.png'}")
        return
    figures = analytic()
    for each in figures if name == "analytic" else [name]:
        print(f"{each}\n{figures[each](out)}\nsee {out / each.replace('-', '_')}.png", flush=True)


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("report.html"), watch: bool = False) -> None:
    """Write an HTML report on one or more runs, viewable offline: lsgd report runs/a runs/b.

    Args:
      runs: run folders; a run may still be in progress.
      out: output file. An existing report is replaced, any other file is not.
      watch: write it again every 10 seconds, and have browsers load it again, until all runs are finished.
    """
    if not runs:
        raise UsageError("report needs the folder of a run, as in lsgd report runs/a.")
    from lsgd_jax.figures import report as figure

    if watch:
        print(f"see {out}; Ctrl-C ends the watch", flush=True)
        with stopped_at_once("the report is as of the last time that it was written"):
            figure.watch(list(runs), out)
        return
    figure.write(list(runs), out)
    print(f"see {out}")
