"""Command-line options of a training run: a preset, and overrides of its fields."""

import contextlib
import dataclasses
import functools
import inspect
import io
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, get_type_hints

import tyro

from lsgd_jax import presets, spelling
from lsgd_jax.cli import overview
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.simulate.cluster import Cluster
from lsgd_jax.task import Headline

TUNING = ("tune_learning_rates", "tune_periods")
CHECKPOINTS = ("checkpoint_every", "keep_checkpoints")
ASYNCHRONOUS = ("asynchronous", "staleness", "min_step_seconds", "slowdowns")
REFUSED = {
    "train": TUNING,
    "compare": (*CHECKPOINTS, "method", "seed", "validation"),
    "simulate": (*TUNING, *CHECKPOINTS, *ASYNCHRONOUS, "method", "revive"),
    "chaos": TUNING,
    "compile": (*TUNING, *CHECKPOINTS, "asynchronous"),
}
"""Fields of a configuration that a command does not take."""
COSTS = (
    *("groups", "workers", "chips_per_worker", "steps", "seed", "period", "global_period", "broadcast", "wire"),
    *("fragments", "overlap"),
)
"""Options that affect the costs of a simulation, besides the parameters."""


@dataclasses.dataclass(frozen=True)
class Options(Config):
    """Configuration of a training run. Options override fields of the preset."""

    preset: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""

    def __post_init__(self) -> None:
        """Skip the checks of `Config`: `checked` makes them, knowing which options are given."""

    @property
    def base(self) -> Config:
        """Configuration of the preset."""
        return presets.find(self.preset)

    @property
    def given(self) -> dict[str, Any]:
        """Fields that differ from the preset."""
        before = self.base.flat
        return {name: value for name, value in self.flat.items() if name in before and value != before[name]}

    def checked(self, **placed: int) -> Config:
        """Return the checked configuration, without fields of the preset that have no effect in it."""
        try:
            return self.base.replace(**self.given | placed)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def refuse(self, names: Iterable[str], reason: str) -> None:
        """Raise UsageError if one of these fields is given."""
        refuse((name for name in names if name in self.given), reason)


@dataclasses.dataclass(frozen=True)
class UnplacedOptions(Options):
    """Configuration of a training run. Options override fields of the preset."""

    groups: int | None = None  # type: ignore[assignment]
    """Number of groups; by default one per host, or the number of devices divided by `workers`."""
    workers: int | None = None  # type: ignore[assignment]
    """Workers per group; by default the number of devices divided by `groups`."""


def refuse(given: Iterable[str], reason: str) -> None:
    """Raise UsageError if an option is given that has no effect."""
    for name in given:
        raise UsageError(f"{name} has no effect {reason}.")


def check_target(target: float | None, headline: Headline) -> None:
    """Raise UsageError if a target is not a value of the headline measure."""
    if target is None:
        return
    if headline.percent and not 0 <= target <= 1:
        raise UsageError(f"target must be in [0, 1], got {target}.")
    if not math.isfinite(target):
        raise UsageError(f"target must be finite, got {target}.")


def check_spelling(arguments: Sequence[str], own: str | None) -> None:
    """Raise UsageError, with the nearest that there is, if a preset is missing, or the command has no such option.

    Args:
      arguments: the name of the command and what follows it.
      own: name of a preset that does not come with the package.
    """
    wrong = overview.problem(arguments)
    if wrong is None and arguments[0] in overview.TAKE_PRESET:
        first = arguments[1] if len(arguments) > 1 and not arguments[1].startswith("-") else None
        configs = [presets.find(first)] if first else [*presets.PRESETS.values(), *([presets.find(own)] if own else [])]
        names = {field.name for field in dataclasses.fields(Config)} - {"task"}
        wrong = overview.problem(arguments, names.union(*(config.task.fields for config in configs)))
    if wrong:
        raise UsageError(wrong)


@contextlib.contextmanager
def in_a_sentence() -> Iterator[None]:
    """Raise UsageError, with one sentence, where tyro prints a box about wrong arguments and exits."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            yield
    except SystemExit:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())
        lines = [line.strip("│| ") for line in plain.splitlines()[1:]]
        texts = itertools.groupby(lines, lambda line: not re.fullmatch(r"[─╰╯+-]*", line))
        text = next((" ".join(part) for is_text, part in texts if is_text), "")  # Help follows, after a line.
        if not text:
            raise
        raise UsageError(_in_own_words(text)) from None
    sys.stderr.write(said.getvalue())


def _in_own_words(text: str) -> str:
    """A sentence for what tyro says."""
    if found := re.match(r"Error parsing (\S+): (invalid literal|could not convert string to float).*: ('.*')", text):
        kind = "a whole number" if found[2] == "invalid literal" else "a number"
        return f"{found[1]} must be {kind}, got {found[3]}."
    if found := re.match(r"Error parsing __tyro\S+: (.*)", text):  # Of options that belong together.
        return f"{found[1].rstrip('.')}."
    if found := re.match(r"Missing value for argument '(.*?)'", text):
        return f"{found[1]} needs a value."
    if found := re.match(r"invalid choice '(.*)' for argument '(.*)'\. Expected one of \((.*)\)", text):
        choices = sorted(set(re.findall(r"'([^']+)'", found[3])) - {"None"})
        return spelling.must_be_one(found[2], found[1], choices)
    if found := re.match(r"Missing from lsgd (.*?): (\S+) ([^.]*)", text):
        what = found[3].removesuffix(" (required)").strip()
        return f"{found[1]} needs {found[2]}, the {what}; lsgd {found[1]} --help says more."
    if found := re.match(r"Unrecognized options: (.*)", text):
        return f"{found[1]} is no argument here; values in a list are separated by commas, without spaces."
    return f"{text[:1].lower()}{text[1:].rstrip('.')}."


def with_presets(command: Callable, own: str | None) -> Callable:
    """Return a command whose argument `options`, if it has one, is a choice of presets with their fields as options.

    Args:
      command: a function.
      own: name of a preset that does not come with the package.
    """
    kind = command.__annotations__.get("options")
    if kind is None:
        return command

    @functools.wraps(command)
    def chosen(*arguments: Any, **options: Any) -> Any:
        return command(*arguments, **options)

    vars(chosen).pop("__wrapped__")  # Else its annotations would be found.
    config = presets.find(own) if own else None
    if config:
        _check_names(command, config)
    subcommands = _subcommands(kind, own, config)
    chosen.__annotations__ = command.__annotations__ | {"options": subcommands}
    vars(chosen)["__signature__"] = inspect.signature(command)
    return chosen


def _check_names(command: Callable, config: Config) -> None:
    """Raise UsageError if a field of a task is named like an option of the command."""
    names = set(inspect.signature(command).parameters)
    for argument in get_type_hints(command).values():
        names |= {field.name for field in dataclasses.fields(argument)} if argument is Cluster else set()
    for name in sorted(config.task.fields.keys() & names):
        kind = type(config.task).__name__
        raise UsageError(f"the field {name} of the task {kind} has the name of an option of the command: rename it.")


@functools.cache
def _subcommands(kind: Any, own: str | None, config: Config | None) -> Any:
    """One subcommand per preset, with the fields of the configuration and those of its task as options."""
    unplaced: dict[str, Any] = {"groups": None, "workers": None} if kind is UnplacedOptions else {}
    configs = presets.PRESETS | ({own: config} if own and config else {})
    defaults: dict[str, Any] = {}
    for name, of in configs.items():
        task: Any = type(of.task)
        fields = {field.name: getattr(of, field.name) for field in dataclasses.fields(Config)}
        defaults[name] = _with_task(kind, task)(**fields | unplaced | {"preset": name})
    return tyro.conf.OmitArgPrefixes[tyro.extras.subcommand_type_from_defaults(defaults)]


@functools.cache
def _with_task(kind: Any, task: Any) -> type[Options]:
    """The options of runs of one task; of the same name, by which the help of the fields is found."""
    namespace = {"__annotations__": {"task": task}, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return dataclasses.dataclass(frozen=True)(type(kind.__name__, (kind,), namespace))
