"""The one configuration of a training run: frozen, checked when it is made, written into the run's folder."""

import dataclasses
import functools
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import optax
import tyro

from lsgd_jax import files, spelling
from lsgd_jax.checks import check_type
from lsgd_jax.methods import METHODS, Level
from lsgd_jax.methods.options import option_types, with_options_of
from lsgd_jax.optimizers import OptimizerOptions
from lsgd_jax.option_rules import no_effect
from lsgd_jax.task import Task, check_fields, of_earlier_version


@dataclasses.dataclass(frozen=True)
@with_options_of(METHODS)
class Config(OptimizerOptions):
    """What a training run depends on. Presets make it; the command line overrides single fields.

    The options of methods are fields, too, by the names that their builders have for them; None is the default of the
    method. An option that differs from its default but has no effect in the run, such as an option of another method,
    is refused; `replace` changes a configuration and drops what the changes leave without effect. It takes the fields
    of the task, too, as the command line does.
    """

    if TYPE_CHECKING:

        def __init__(self, **fields: Any) -> None:
            """Make a configuration of fields and options of methods."""

    task: Task
    """What workers train: data, network and loss, such as `lsgd_jax.tasks.Classification`."""
    steps: int
    """Local steps of every worker."""
    batch_statistics: Literal["own", "mean", "leader", "reestimate"] = "reestimate"
    """Batch-norm statistics of the evaluated model: each worker's own, their mean, the leader's (methods that elect
    leaders), or re-estimated by a pass of that model over training batches."""
    statistics_batches: int = 32
    """Batches per worker in the pass that re-estimates batch-norm statistics."""
    batch_size: int = 32
    """Examples per step."""
    batch: Literal["per_worker", "global"] = "per_worker"
    """Whether batch_size is that of each worker or of all together."""
    validation: float = 0.0
    """Fraction of the training data that is held out and replaces the test data."""
    data_processes: int = 4
    """Processes that read streamed examples ahead, such as ImageNet's images; the batches do not depend on it."""
    sampling: Literal["shards", "independent", "partitions"] = "shards"
    """Training data of a worker: a disjoint shard of each epoch, all in an order of its own, or a contiguous part.
    Partitions are not i.i.d. where the data are sorted."""
    groups: int = 2
    """Groups of workers, each with a local leader."""
    workers: int = 4
    """Workers in each group."""
    chips_per_worker: int = 1
    """Devices per worker, over which parameters, optimizer state and batches are sharded."""
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(METHODS) + "}")] = "lsgd"
    """Distributed training method. Options that it does not have are refused."""
    period: int = 4
    """Local steps between exchanges; with LSGD those in a group."""
    elect_by: Literal["training_losses", "common_batch", "held_out_batch"] = "training_losses"
    """What elections compare: each worker's recent training losses, or at each exchange one batch that all see. That
    costs one more forward pass: of training examples sampled anew each time, or of examples held out."""
    election_examples: int = 256
    """Examples of the batch that all see."""
    evaluated_model: Literal["mean", "leader", "center", "tail_mean"] | None = None
    """Model that is evaluated; by default the method's own. Others: the mean of the workers, the worker with the lowest
    score (methods with scores), the center (methods that have one; of quorum the average of the last quorum), or the
    mean of the method's own over the last exchanges."""
    tail_share: float = 0.1
    """Last part of the steps whose exchanges the tail mean is over."""
    corrupt_workers: int = 0
    """For experiments: number of workers, the last ones, that are corrupted."""
    corruption: Literal["labels", "gradient-noise", "stale", "skewed-shard"] = "labels"
    """What is wrong with them. labels: targets are random. gradient-noise: noise 5 times as large is added to
    gradients. stale: a gradient is computed in one step of 16 and taken in all of them. skewed-shard: of the examples,
    sorted by label, each sees one fifth."""
    asynchronous: Literal["joined", "posted"] | None = None
    """Asynchronous training: all meet at an exchange, each when it has finished its step (joined), or nobody waits
    (posted). With posted, each worker is pulled towards the best that the others have posted or, with methods that keep
    a center, meets the center on its own clock."""
    staleness: int = 0
    """With posted leaders, how many local steps old a post may be: every worker posts after each staleness + 1 of its
    steps."""
    min_step_seconds: float = 0.0
    """Minimum duration of a local step in seconds (pads with sleep; for straggler experiments)."""
    slowdowns: tuple[float, ...] = ()
    """Per-worker factors of min_step_seconds, in order; 1 for workers that are not listed. 10 makes the first worker a
    straggler that is ten times slower than the others."""
    tune_learning_rates: tuple[float, ...] = ()
    """Learning rates that `lsgd compare --tune` tries; by default multiples of the learning rate, with values of the
    method's own option."""
    tune_periods: tuple[int, ...] = ()
    """Steps between exchanges among all workers that tuning tries with these learning rates. With LSGD in groups these
    are global periods, and the period is a quarter of each."""
    eval_every: int = 100
    """Local steps between evaluations on the test data."""
    checkpoint_every: int | None = None
    """Local steps between checkpoints; by default eval_every, 0 for none."""
    keep_checkpoints: int = 2
    """Number of most recent checkpoints to keep; the best by the headline measure is kept, too."""
    seed: int = 0
    """Random seed (initialization, data order, augmentation)."""

    def __post_init__(self) -> None:
        """Check every field's type and range, and that what differs from its default has an effect."""
        self._check("task", isinstance(self.task, Task), "an instance of Task")
        check_fields(self.task, taken=_field_types())
        for name, hint in _field_types().items():
            check_type(name, getattr(self, name), hint)
        if self.method not in METHODS:
            raise ValueError(spelling.must_be_one("method", self.method, METHODS))
        for name in [*self.task.idle, *_field_types()]:
            if (name in self.task.fields or _differs(name, self)) and (reason := no_effect(name, self)):
                raise ValueError(f"{name} has no effect {reason}.")
        counts = ["steps", "batch_size", "groups", "workers", "period", "eval_every", "keep_checkpoints"]
        for name in [*counts, "chips_per_worker", "statistics_batches"]:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("data_processes", "checkpoint_every", "staleness"):
            self._check(name, (getattr(self, name) or 0) >= 0, "at least 0")
        self._check("seed", 0 <= self.seed < 2**32, "in [0, 2^32)")
        for name, value in _values(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            fits = name == "seed" or all(not isinstance(number, int) or number < 2**31 for number in numbers)
            self._check(name, fits, "below 2^31")
        self._check("validation", 0 <= self.validation <= 0.5, "in [0, 0.5]")
        self._check_optimizer()
        workers = self.groups * self.workers
        divisible = self.batch == "per_worker" or self.batch_size % workers == 0
        self._check("batch_size", divisible, f"a multiple of the {workers} workers, if it is global")
        self._check("chips_per_worker", self.chips_per_worker == 1 or self.asynchronous is None, "1 if asynchronous")
        examples = self.worker_batch_size
        self._check(
            "chips_per_worker",
            examples % self.chips_per_worker == 0,
            f"a divisor of the {examples} examples of a worker",
        )
        self._check("min_step_seconds", 0 <= self.min_step_seconds < float("inf"), "at least 0")
        self._check("election_examples", self.election_examples >= 1, "at least 1")
        self._check("tail_share", 0 < self.tail_share <= 1, "in (0, 1]")
        self._check("corrupt_workers", 0 <= self.corrupt_workers <= workers, f"in [0, {workers}], among all workers")
        if self.corrupt_workers and self.corruption == "labels":
            has_targets = type(self.task).with_random_targets is not Task.with_random_targets
            self._check(
                "corruption", has_targets, f"another for {type(self.task).__name__}, which has no random targets"
            )
        self._check("slowdowns", all(0 < factor < float("inf") for factor in self.slowdowns), "positive")
        self._check("slowdowns", len(self.slowdowns) <= workers, f"at most {workers}, one per worker")
        rates, periods = self.tune_learning_rates, self.tune_periods
        self._check("tune_learning_rates", all(0 < rate < float("inf") for rate in rates), "positive")
        self._check("tune_periods", all(period >= 1 for period in periods), "at least 1")
        self._check_method()

    def _check_method(self) -> None:
        """Check what the method demands of its options and of the run."""
        method = METHODS[self.method]
        for name, value in self.method_options.items():
            check_type(name, value, option_types(method.build)[name])
        ways = [*method.asynchronous, None]
        texts = " or ".join(way or "not given" for way in ways)
        self._check("asynchronous", self.asynchronous in ways, f"{texts} for {self.method}")
        equal = method.exchanges != "step" or self.learning_rates == "equal"
        self._check("learning_rates", equal, f"equal for {self.method}, whose workers are to stay together")
        fits = self.learning_rates != "ladder" or (method.elects and self.asynchronous is None)
        self._check("learning_rates", fits, "equal, linear or powers unless workers elect leaders in step")
        fits = self.evaluated_model in (None, *method.evaluated_models)
        self._check("evaluated_model", fits, f"{' or '.join(method.evaluated_models)} for {self.method}")
        if self.batch_statistics == "leader":
            self._check("batch_statistics", method.elects, "own, mean or reestimate for methods without leaders")
            self._check("batch_statistics", self.asynchronous != "posted", "own, mean or reestimate with posted")
        groups = () if self.groups == 1 else ("group",)
        method.built(optax.identity(), self.method_options, groups=groups, workers=("worker",))
        method.filled(self.method_options, self.groups, self.workers)

    @property
    def method_options(self) -> dict[str, Any]:
        """The options of the method that are set here; for the others the method has its own defaults."""
        values = ((name, getattr(self, name, None)) for name in METHODS[self.method].options)
        return {name: value for name, value in values if value is not None}

    @property
    def options(self) -> dict[str, Any]:
        """The options of the method that have an effect, with the values with which it trains.

        Example:
          >>> from lsgd_jax.presets import PRESETS
          >>> PRESETS["digits"].replace(method="diloco", period=8).options
          {'period': 8, 'outer_learning_rate': 0.7, 'outer_momentum': 0.9}
        """
        values = METHODS[self.method].filled(self.method_options, self.groups, self.workers)
        return {name: value for name, value in values.items() if value is not None and self.has_effect(name)}

    @property
    def flat(self) -> dict[str, Any]:
        """All fields, those of the task among them; `task` is the name of its class."""
        others = {name: value for name, value in _values(self).items() if name != "task"}
        return {"task": type(self.task).__name__} | self.task.fields | others

    @property
    def effective(self) -> dict[str, Any]:
        """All fields that have an effect, those of the task among them, with the values that the run has."""
        values = self.flat | {"checkpoint_every": self.checkpoint_period} | self.options
        return {name: value for name, value in values.items() if value is not None and no_effect(name, self) is None}

    def has_effect(self, name: str) -> bool:
        """Whether a run depends on an option, given the others."""
        return name in self.flat and no_effect(name, self) is None

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields changed; options that the changes leave without effect return to their defaults.

        Args:
          **changes: new values by field, also by fields of the task. They themselves have to have an effect.

        Raises:
          ValueError: if a value is out of range, or a changed option has no effect.

        Example:
          >>> from lsgd_jax.presets import PRESETS
          >>> grouped = PRESETS["cnn7-mnist5k-16"]
          >>> grouped.options["global_period"], "global_period" in grouped.replace(method="easgd").options
          (16, False)
        """
        task, others = self._with_task_of(changes)
        return _fitted(_values(self) | others | {"task": task}, given=others)

    def _with_task_of(self, changes: Mapping[str, Any]) -> tuple[Task, dict[str, Any]]:
        """The task with its fields among the changes, and the other changes."""
        task = changes.get("task", self.task)
        own = {name: value for name, value in changes.items() if name in task.fields}
        return task.replace(**own), {name: value for name, value in changes.items() if name not in own}

    def for_methods(self, methods: Mapping[str, str], options: Mapping[str, Any]) -> dict[str, "Config"]:
        """The configurations of several methods, each with those options that have an effect with it.

        Args:
          methods: names in `METHODS`, by a label for each.
          options: new values by field, for all methods.

        Returns:
          Configurations by label.

        Raises:
          ValueError: if a method can't have its configuration, or an option has no effect with any of the methods.
        """
        configs: dict[str, Config] = {}
        task, options = self._with_task_of(options)
        reasons: dict[str, list[str | None]] = {name: [] for name in options}
        for label, method in methods.items():
            of_method = types.SimpleNamespace(**_values(self) | options | {"task": task, "method": method})
            for name, found in reasons.items():
                found.append(no_effect(name, of_method))
            own = {name: value for name, value in options.items() if reasons[name][-1] is None}
            try:
                configs[label] = self.replace(**own | {"task": task, "method": method})
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from None
        for name, found in reasons.items():
            if all(found):
                raise ValueError(f"{name} has no effect {found[0]}.")
        return configs

    def to_json(self) -> str:
        """The fields that have an effect, with the values that the run has, as JSON, one per line.

        `defaults` names those that nobody has set, but that follow from the others.
        """
        values = {name: value for name, value in self.effective.items() if name not in self.task.fields}
        defaults = [name for name in values if getattr(self, name) is None]
        return json.dumps(values | {"task": self.task.to_dict(), "defaults": defaults}, indent=2)

    @staticmethod
    def from_json(text: str) -> "Config":
        """The configuration that `to_json` wrote, now or when it wrote all fields; those without effect are dropped.

        Raises:
          ValueError: if the text is not a configuration, one of its values is out of range, or the class that it names
            for the task is not a subclass of `Task`: its module is imported.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"a configuration is a JSON object, got {text[:40]!r}.")
        defaults = fields.pop("defaults", None)
        fields = {_RENAMED.get(name, name): tuple(of) if isinstance(of, list) else of for name, of in fields.items()}
        fields = fields if "task" in fields else of_earlier_version(fields)
        if unknown := fields.keys() - {field.name for field in dataclasses.fields(Config)}:
            raise ValueError(f"unknown configuration fields: {', '.join(sorted(unknown))}.")
        try:
            config = _fitted(fields | {"task": Task.from_dict(fields["task"])})
            if defaults is None:  # An earlier version wrote it.
                own, given = METHODS[config.method].options, config.method_options.items()
                defaults = [name for name, value in given if value == own[name] and _defaults()[name] is None]
            unset = Config(**_values(config) | dict.fromkeys(defaults))
            now = unset.effective
            # Where a default has changed since, the value is that of the run.
            changed = {name for name in defaults if now.get(name) != getattr(config, name)}
            return Config(**_values(unset) | {name: getattr(config, name) for name in changed})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not a configuration: {error}.") from None

    @property
    def comparable_rate(self) -> float:
        """The learning rate; where the workers' steps add up, divided by the number of workers."""
        return self.learning_rate / (self.groups * self.workers if METHODS[self.method].adds_up else 1)

    @functools.cached_property  # The loop asks at each exchange.
    def levels(self) -> tuple[Level, ...]:
        """Among how many workers there are exchanges, and every how many steps; those in a group first."""
        return tuple(METHODS[self.method].levels(self.options, self.groups, self.workers))

    @property
    def checkpoint_period(self) -> int:
        """Local steps between checkpoints; 0 for none."""
        return self.eval_every if self.checkpoint_every is None else self.checkpoint_every

    @property
    def worker_batch_size(self) -> int:
        """Examples per step of each worker."""
        return self.batch_size if self.batch == "per_worker" else self.batch_size // (self.groups * self.workers)

    @staticmethod
    def load(run: Path | str) -> "Config":
        """The configuration in a run's folder."""
        return Config.from_json(files.read_text(Path(run) / "config.json"))


_RENAMED = {"least_step_seconds": "min_step_seconds"}
"""Names of fields in the files of earlier versions."""


def _values(config: Config) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(Config)}


@functools.cache
def _defaults() -> dict[str, Any]:
    fields = dataclasses.fields(Config)
    return {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}


def _differs(name: str, config: Any) -> bool:
    """Whether a field has a default, and another value than that."""
    return name in _defaults() and getattr(config, name) != _defaults()[name]


def _fitted(values: Mapping[str, Any], given: Mapping[str, Any] = types.MappingProxyType({})) -> Config:
    """The configuration of these values, where those that have no effect and are not given stay at their defaults."""
    for name in values.keys() & _field_types().keys():
        check_type(name, values[name], _field_types()[name])
    config = types.SimpleNamespace(**dict.fromkeys(_field_types()) | _defaults() | dict(values))
    kept = (name for name in values if name in given or not (_differs(name, config) and no_effect(name, config)))
    return Config(**{name: values[name] for name in kept})


@functools.cache
def _field_types() -> dict[str, Any]:
    return {name: hint for name, hint in get_type_hints(Config).items() if name != "task"}
