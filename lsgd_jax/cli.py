"""The `lsgd` command."""

import dataclasses
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from lsgd_jax import distributed, files
from lsgd_jax.checks import check_names, check_path
from lsgd_jax.config import Config
from lsgd_jax.distributed.interruption import stopped_at_once
from lsgd_jax.errors import AgreedError, Interrupted, RunFailed, UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate.cluster import Cluster
from lsgd_jax.simulate.events import SCHEDULES
from lsgd_jax.tracking.output import Output

MOST_SEEDS = 10_000
"""Of a comparison."""


@dataclasses.dataclass(frozen=True)
class _Options(Config):
    """What a training run depends on. Options override single fields of a preset."""

    preset: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""

    def __post_init__(self) -> None:
        """Leave the checks to `checked`, which knows what is given."""

    @property
    def base(self) -> Config:
        """The preset."""
        return PRESETS[self.preset]

    @property
    def given(self) -> dict[str, Any]:
        """The fields that differ from the preset."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        return {name: value for name, value in fields.items() if value != getattr(self.base, name)}

    def checked(self, **placed: int) -> Config:
        """The configuration; what the preset alone has set and has no effect is left out."""
        try:
            return self.base.replace(**self.given | placed)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def refuse(self, names: Iterable[str], reason: str) -> None:
        """Raise UsageError if one of these fields is given."""
        _refuse((name for name in names if name in self.given), reason)


@dataclasses.dataclass(frozen=True)
class _UnplacedOptions(_Options):
    """What a training run depends on. Options override single fields of a preset."""

    groups: int | None = None  # type: ignore[assignment]
    """Groups of workers; by default one on every host, or as many as the workers in each leave."""
    workers: int | None = None  # type: ignore[assignment]
    """Workers in each group; by default as many as the groups leave."""


def _refuse(given: Iterable[str], reason: str) -> None:
    """Raise UsageError if there is an option that is given without effect."""
    for name in given:
        raise UsageError(f"{name} has no effect {reason}.")


_TUNING = ("tune_learning_rates", "tune_periods")
_CHECKPOINTS = ("checkpoint_every", "keep_checkpoints")
_ASYNCHRONOUS = ("asynchronous", "staleness", "min_step_seconds", "slowdowns")
_COSTS = ("groups", "workers", "steps", "seed", "period", "global_period", "broadcast", "wire")
"""What the costs of a simulation depend on, with the parameters."""
_PARAMETERS = ("dataset", "model", "width")
"""What the number of parameters depends on."""


if TYPE_CHECKING:
    Preset = _Options
    UnplacedPreset = _UnplacedOptions
else:  # One subcommand a preset, its fields as options.

    def _subcommands(kind: type[_Options], **changes: Any) -> Any:
        defaults = {
            name: kind(**dataclasses.asdict(preset) | changes | {"preset": name}) for name, preset in PRESETS.items()
        }
        return tyro.conf.OmitArgPrefixes[tyro.extras.subcommand_type_from_defaults(defaults)]

    Preset = _subcommands(_Options)
    UnplacedPreset = _subcommands(_UnplacedOptions, groups=None, workers=None)


def train(
    options: Preset,
    run_dir: Path | None = None,
    data_dir: Path | None = None,
    resume: bool = False,
    tensorboard: bool = False,
    processes: int | None = None,
) -> int:
    """Train a preset with one method and write a run folder: configuration, environment, metrics, a picture.

    SIGINT (Ctrl-C), SIGTERM or SIGHUP lets the run save a checkpoint and stop, with 128 + the signal for its exit code;
    a second Ctrl-C stops it at once. Runs that save no checkpoints stop at once.

    Args:
      options: the preset and what to change in it.
      run_dir: the folder to write; by default one under runs/ named after the data and the time.
      data_dir: where `lsgd data prepare` has put the data; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
      resume: go on from the last checkpoint in the folder, or start if there is none; also with other numbers of
        workers, processes and devices, and to more steps.
      tensorboard: write event files for TensorBoard, too, into the folder tensorboard of the run's.
      processes: number of processes of the run; by default LSGD_PROCESSES or, in a cluster, as many as it has started.
        1 trains alone, also in a SLURM job of several tasks.
    """
    if resume and run_dir is None:
        raise UsageError("a run goes on in its folder: name it with --run-dir.")
    options.refuse(_TUNING, "in train: it is for compare with --tune")
    config = options.checked()
    if run_dir is not None:
        check_path("run_dir", run_dir)
    run_dir = run_dir or Path("runs") / f"{config.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    note = "nothing was saved"
    if config.checkpoint_period and config.asynchronous is None:
        note = f"no step was under way, and the same command resumes with --run-dir {run_dir} --resume"
    with stopped_at_once(note):
        from lsgd_jax.train import train_and_evaluate

        distributed.initialize(processes)
        distributed.simulate_devices(config.groups * config.workers)
        error = train_and_evaluate(config, run_dir, data_dir=data_dir, resume=resume, tensorboard=tensorboard)
        if distributed.process_index() == 0:
            from lsgd_jax.figures import run

            print(f"test error of the center after {config.steps} steps: {error:.2%}; see {run.draw(run_dir)}")
    return 0  # Even if nobody reads the line: the run is in its folder.


def compare(
    options: Preset,
    methods: str = ",".join(METHODS),
    seeds: str = "0..4",
    out: Path | None = None,
    tune: bool = False,
    target_error: float = 0.05,
    data_dir: Path | None = None,
) -> int:
    """Train several methods on a preset with several seeds; a table and a picture tell how they compare.

    What has been trained into the folder before is not trained again, so that the same command goes on where it was
    stopped.

    Args:
      options: the preset and what to change in it.
      methods: names separated by commas. An option applies to all that have it.
      seeds: numbers separated by commas, or a range like 0..4.
      out: the folder to write; by default one under runs/ named after the network, the data and the number of
        workers.
      tune: choose each method's hyper-parameters from a small grid, on held-out training data.
      target_error: tell how many steps and bytes it took to reach this test error, in [0, 1].
      data_dir: where `lsgd data prepare` has put the data; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    names, numbers = _names(methods, METHODS), _seeds(seeds)
    for name in ("method", "seed", "validation"):
        if name in options.given:
            raise UsageError(f"compare chooses the {name} itself: use --methods, --seeds and --tune.")
    options.refuse(_CHECKPOINTS, "in compare, which keeps no checkpoints")
    if not tune:
        options.refuse(_TUNING, "without --tune")
    if not 0 <= target_error <= 1:
        raise UsageError(f"target_error must be in [0, 1], got {target_error}.")
    with stopped_at_once("the same command trains the runs that are not finished"):
        from lsgd_jax.compare import compare as run_comparison
        from lsgd_jax.compare import configs_of

        [config, *_] = configs_of(options.base, names, options.given).values()
        distributed.initialize()
        if distributed.process_count() > 1:
            raise AgreedError("compare is for one process, but this is one of several: train is for these.")
        workers = config.groups * config.workers
        distributed.simulate_devices(workers)
        out = out or Path("runs") / f"compare-{config.model}-{config.dataset}-{workers}"
        run_comparison(
            options.base,
            names,
            numbers,
            out,
            tune=tune,
            target_error=target_error,
            options=options.given,
            data_dir=data_dir,
        )
        from lsgd_jax.figures import comparison

        picture = comparison.draw(out, names, numbers)
        print((out / "comparison.md").read_text() + f"see {picture}")
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
    options: Preset,
    cluster: tyro.conf.OmitArgPrefixes[Cluster],
    methods: str = ",".join(SCHEDULES),
    costs_only: bool = False,
    parameters: int | None = None,
    target_error: float | None = None,
    out: Path = Path("simulation"),
    data_dir: Path | None = None,
) -> None:
    """Simulate methods in virtual time, with workers at their own speeds on links that take time.

    All workers together take workers * --steps steps, and finish those that end with the last. The same command gives
    the same numbers: virtual time does not depend on the machine. As an example, 8 workers, the first at a tenth of the
    others' speed:

    lsgd simulate digits --groups 1 --workers 8 --slow 0 10

    Args:
      options: the preset and what to change in it; --methods stands for its method.
      cluster: the machines and links.
      methods: names separated by commas: lsgd is in step; in lsgd-joined all exchange when the steps of all together
        have reached the next period; in lsgd-posted nobody waits but for a board on which scores and parameters are
        put; easgd and downpour go to a server with the centre, each worker on its own clock.
      costs_only: tell times, waiting, staleness and bytes without training: for up to 100,000 workers.
      parameters: how many float32 parameters are sent, if nothing is trained; by default as many as the network has.
      target_error: tell when this test error was reached, in [0, 1]; by default 0.05.
      out: the folder to write to: a timeline, the staleness and, if trained, the errors, as pictures, CSV and JSON.
      data_dir: where `lsgd data prepare` has put the data; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    names = _names(methods, SCHEDULES)
    if "method" in options.given:
        raise UsageError("simulate chooses the method itself: use --methods.")
    if "asynchronous" in options.given:
        raise UsageError(
            "simulate chooses the method itself: use --methods lsgd-joined or lsgd-posted in place of --asynchronous."
        )
    options.refuse((*_TUNING, *_CHECKPOINTS, *_ASYNCHRONOUS, "revive"), "in simulate")
    if costs_only:
        _refuse(options.given.keys() - {*_COSTS, *_PARAMETERS}, "with --costs-only")
        if parameters is not None:
            options.refuse(_PARAMETERS, "with --parameters")
        for_training = {"data_dir": data_dir, "target_error": target_error}
        _refuse((name for name, value in for_training.items() if value is not None), "with --costs-only")
    target_error = 0.05 if target_error is None else target_error
    if not 0 <= target_error <= 1:
        raise UsageError(f"target_error must be in [0, 1], got {target_error}.")
    if parameters is not None and (parameters < 1 or not costs_only):
        raise UsageError(f"parameters must be at least 1, with --costs-only, got {parameters}.")
    files.check_writable(out)
    from lsgd_jax.figures import simulation

    train_target = None if costs_only else target_error
    made = simulation.make(
        out,
        options.base,
        cluster,
        names,
        train_target,
        options=options.given,
        parameters=parameters,
        data_dir=data_dir,
    )
    print(made)


def figure(
    name: Annotated[
        Literal["trajectories", "nonconvex", "matrix-completion", "analytic", "theory", "F4", "F5", "F6", "F7", "F8"],
        tyro.conf.Positional,
    ],
    out: Path = Path("figures"),
    runs: Path | None = None,
    model: str | None = None,
    dataset: str | None = None,
) -> None:
    """Draw a figure of the paper: a picture, its curves (CSV) and its numbers (JSON).

    Args:
      name: which figure; analytic: the first three, which are computed here; theory: every claim, with a table of what
        has been measured; F4 to F8 are drawn from runs.
      out: the folder to write to.
      runs: the folder in which F4 to F8 look for runs, and in the folders in it; theory looks for comparisons. By
        default runs.
      model: the network that F4 to F8 look for; by default the paper's.
      dataset: the data that F4 to F8 look for; by default the paper's.
    """
    from lsgd_jax.figures import analytic
    from lsgd_jax.paper import networks

    of_networks = name in networks.FIGURES
    without_effect: dict[str, Any] = {} if of_networks else {"model": model, "dataset": dataset}
    if not of_networks and name != "theory":
        without_effect["runs"] = runs
    _refuse((option for option, value in without_effect.items() if value is not None), f"on the figure {name}")
    runs = runs or Path("runs")
    files.check_writable(out)
    if of_networks:
        print(networks.make(name, runs, out, model=model, dataset=dataset) + f"\nsee {out / name}.png")
        return
    if name == "theory":
        from lsgd_jax.paper import theory

        print(f"{theory.make(out, runs)}see {out / 'theory.png'}")
        return
    figures = analytic()
    for each in figures if name == "analytic" else [name]:
        print(f"{each}\n{figures[each](out)}\nsee {out / each.replace('-', '_')}.png", flush=True)


def report(runs: tyro.conf.Positional[tuple[Path, ...]], out: Path = Path("report.html")) -> None:
    """Write a page about one or several runs, to be read in a browser without a network: lsgd report runs/a runs/b.

    Args:
      runs: their folders; a run may still be going on.
      out: the page. An older report in its place is replaced, any other file is not.
    """
    if not runs:
        raise UsageError("report needs the folder of a run, as in lsgd report runs/a.")
    from lsgd_jax.figures import report as figure

    figure.write(list(runs), out)
    print(f"see {out}")


def data(
    action: Annotated[Literal["prepare"], tyro.conf.Positional],
    name: Annotated[Literal["cifar10", "cifar100", "mnist", "imagenet2012"], tyro.conf.Positional],
    data_dir: Path | None = None,
) -> None:
    """Prepare a data set once: from archives in downloads/manual in the data folder, or else by download.

    Args:
      action: what to do with it.
      name: which data set. ImageNet's archives have to be there; see lsgd_jax/data/preparation.py for their names.
      data_dir: where data sets are; by default TFDS_DATA_DIR or ~/tensorflow_datasets.
    """
    from lsgd_jax.data import preparation

    already = "already " if preparation.is_prepared(name, data_dir) else ""
    print(f"{name} is {already}prepared in {preparation.prepare(name, data_dir)}")


def launch(
    command: tyro.conf.Positional[tuple[str, ...]],
    processes: int,
    devices_per_process: int | None = None,
    restarts: int = 0,
) -> int:
    """Train in several processes on this machine, as on several hosts: lsgd launch --processes 2 -- train mnist1d.

    SIGINT (Ctrl-C), SIGTERM or SIGHUP lets the run save a checkpoint and stop; a second one stops it at once.

    Args:
      command: train and its options, after two dashes.
      processes: how many.
      devices_per_process: simulated devices of each; by default one for each of its workers.
      restarts: how often the run is brought back from its last checkpoint after a process was killed or crashed.
    """
    from lsgd_jax.distributed.launch import launch as run_processes

    if command[:1] != ("train",):
        raise UsageError(
            "launch is for train, as in lsgd launch --processes 2 -- train mnist1d;"
            f" {command[0] if command else 'nothing'} is for one process."
        )
    for name, count in (("processes", processes), ("devices_per_process", devices_per_process)):
        if count is not None and count < 1:
            raise UsageError(f"{name} must be at least 1, got {count}.")
    if restarts < 0:
        raise UsageError(f"restarts must be at least 0, got {restarts}.")
    if restarts and not any(argument.partition("=")[0] == "--run-dir" for argument in command):
        raise UsageError("restarts go on in the run's folder: name it with --run-dir.")
    return run_processes([sys.executable, "-m", "lsgd_jax", *command], processes, devices_per_process, restarts)


def info(
    bytes: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(PRESETS) + "}")] = None,
) -> None:
    """Print versions and devices, or what the workers of a preset will send.

    Args:
      bytes: a preset: for each method, what a worker sends in an exchange and a step, before anything is run.
    """
    if bytes is None:
        from lsgd_jax.tracking.run_folder import environment

        for name, value in environment().items():
            text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            print(f"{name:<10}{text}")
        return
    if bytes not in PRESETS:
        raise UsageError(f"there is no preset {bytes!r}; there are {', '.join(PRESETS)}.")
    from lsgd_jax.costs.ledger import table
    from lsgd_jax.train.compile_ahead import parameter_shapes

    print(table(PRESETS[bytes], parameter_shapes(PRESETS[bytes])))


def compile_ahead(options: UnplacedPreset, topology: str, text: Path | None = None) -> None:
    """Compile a preset's training step for TPUs that are not there: what it sends, holds and costs.

    It needs libtpu (pip install 'lsgd-jax[tpu]'), but neither TPUs nor the data set.

    Args:
      options: the preset and what to change in it; there is a worker on every device.
      topology: the kind of TPU and its chips along each axis, like v5e:16x16.
      text: a file to write the compiled program's text (HLO) to.
    """
    from lsgd_jax import distributed
    from lsgd_jax.train import compile_ahead

    if options.asynchronous is not None:
        raise UsageError("compile is for workers in step: asynchronous is for train.")
    options.refuse((*_TUNING, *_CHECKPOINTS), "in compile")
    try:
        if text is not None:
            text.touch()  # Before the compiler takes its minutes.
    except OSError as error:
        raise UsageError(f"{text} can't be written ({error.strerror}): name another file with --text.") from None
    devices = compile_ahead.described_devices(topology)
    groups, workers = compile_ahead.spread(options.groups, options.workers, devices)
    placed = options.checked(groups=groups, workers=workers)
    placement = distributed.place(groups, workers, devices)
    compiled = compile_ahead.compile_steps(compile_ahead.lowered_steps(placed, placement))
    try:
        if text is not None:
            text.write_text(compiled.as_text() or "")
    except OSError as error:
        raise UsageError(f"{text} can't be written ({error.strerror}).") from None
    steps, kind = compile_ahead.steps_per_call(placed), devices[0].device_kind
    print(f"one program of {steps} local steps of {placed.method} for {topology}, {len(devices)} devices ({kind})")
    print(f"groups: {groups}, workers in each: {workers}")
    print(compile_ahead.report(compiled))


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for a user's mistake."""
    stdout: Any = Output(sys.stdout)
    stderr: Any = Output(sys.stderr)
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            code = _run(arguments)
        finally:
            stdout.flush()
            stderr.flush()
        lost = stdout.problem
        if code is None and lost is not None and not isinstance(lost, BrokenPipeError):
            print(f"lsgd: the output can't be written ({lost.strerror}).", file=sys.stderr)
            return 2
    return code or 0


def _run(arguments: list[str] | None) -> int | None:
    """The exit code; None if the command has only had something to print."""
    try:
        commands: dict[str, Callable[..., Any]] = {"train": train, "compare": compare, "figure": figure, "data": data}
        commands |= {"report": report, "simulate": simulate, "info": info, "launch": launch, "compile": compile_ahead}
        return tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="lsgd",
            description="Leader SGD in JAX.",
            args=arguments,
            config=(tyro.conf.CascadeSubcommandArgs,),
        )
    except UsageError as error:
        together = distributed.process_count() == 1 or isinstance(error, AgreedError)
        if distributed.process_index() == 0 or not together:
            print(f"lsgd: {error}", file=sys.stderr, flush=True)
        if not together:
            os._exit(2)  # As below.
        return 2
    except RunFailed as error:
        print(f"lsgd: {error}", file=sys.stderr, flush=True)
        if distributed.process_count() > 1:
            os._exit(1)  # An orderly end would wait for the other processes, and they wait for this one.
        return 1
    except Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # A second interrupt ends the process at once, here too.
        for number in (signal.SIGTERM, signal.SIGHUP):  # As the launcher sends it when another process has stopped.
            signal.signal(number, signal.SIG_IGN)
        if distributed.process_index() == 0:
            print(f"lsgd: {stop}", file=sys.stderr)
        return 128 + stop.number
    except KeyboardInterrupt:
        print("lsgd: interrupted.", file=sys.stderr, flush=True)
        for process in multiprocessing.active_children():  # That decode images, and would be left.
            process.kill()
        os._exit(128 + signal.SIGINT)  # JAX may be compiling, and would crash if it were torn down meanwhile.
    except Exception as error:
        if distributed.process_count() == 1:
            raise
        if "by peer" in str(error):  # Gloo's words for a connection that was closed or reset.
            print("lsgd: another process of the run has ended, so that this one can't go on.", file=sys.stderr)
        else:
            traceback.print_exc()
        os._exit(1)  # As above.
