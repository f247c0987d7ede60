"""The one configuration of a training run: frozen, checked when it is made, written into the run's folder."""

import dataclasses
import functools
import json
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import tyro

from lsgd_jax import files
from lsgd_jax.exchange import BroadcastMethod, Wire
from lsgd_jax.methods import METHODS
from lsgd_jax.methods.lsgd import default_global_period
from lsgd_jax.variants import Revive


@dataclasses.dataclass(frozen=True)
class Config:
    """What a training run depends on. Presets make it; the command line overrides single fields.

    An option that differs from its default but has no effect in the run, such as an option of another method, is
    refused; `replace` changes a configuration and drops what the changes leave without effect.
    """

    dataset: Literal["mnist1d", "digits", "mnist5k", "mnist", "cifar10", "cifar100", "imagenet2012"]
    """The data. Three come with packages: MNIST-1D (4,000 training and 1,000 test signals of 40 samples), the digits of
    scikit-learn (1,437 and 360 images of 8x8 pixels) and 5,000 images of MNIST (4,000 and 1,000). The others are made
    ready once by `lsgd data prepare`."""
    model: Literal["conv1d", "mlp", "cnn7", "vgg16", "resnet20", "resnet50"]
    """The network that every worker trains."""
    steps: int
    """Local steps of every worker."""
    learning_rate: float
    """Of every worker's own optimiser."""
    width: float = 1.0
    """Of the network's layers, times the published one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """In which the network computes; parameters are float32."""
    batch_statistics: Literal["own", "mean", "leader", "reestimate"] = "reestimate"
    """Which batch statistics the center is tested with, if the network has them: each worker's own, their mean, the
    leader's (LSGD only), or those that the center itself sees in a pass over training batches."""
    statistics_batches: int = 32
    """Batches of every worker in that pass."""
    learning_rate_drops: tuple[float, ...] = ()
    """When the learning rate is multiplied by 0.1."""
    learning_rate_drops_in: Literal["fractions", "epochs", "seconds"] = "fractions"
    """Whether that is told in fractions of all steps, in epochs or in seconds of training. By the clock, runs are not
    repeatable to the bit."""
    learning_rates: Literal["equal", "linear", "powers"] = "equal"
    """How learning rates differ by worker: not, by factors of 1, 2, 3, ... or of 1, 2, 4, ..."""
    local_optimizer: Literal["sgd", "adamw", "lars"] = "sgd"
    """Every worker's own optimiser."""
    momentum: float = 0.9
    """Of SGD (Nesterov's) and of LARS."""
    weight_decay: float = 1e-4
    """Times the parameters, added to the gradient; with AdamW and LARS as they have it."""
    batch_size: int = 32
    """Examples a step."""
    batch: Literal["per_worker", "global"] = "per_worker"
    """Whether every worker takes batch_size examples a step, or all workers together do."""
    validation: float = 0.0
    """The share of the training data that is held out; if it is not 0, it is used in place of the test data."""
    image_size: int = 224
    """The side of ImageNet's images as the network sees them."""
    data_processes: int = 4
    """Processes that decode ImageNet's images; what the workers see does not depend on it."""
    sampling: Literal["shards", "independent"] = "shards"
    """How the training data reaches the workers: each epoch is shuffled and dealt out in disjoint shards, or every
    worker goes through all the data in an order of its own."""
    groups: int = 2
    """Groups of workers, each with a local leader."""
    workers: int = 4
    """Workers in each group."""
    method: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(METHODS) + "}")] = "lsgd"
    """How the workers exchange. Options that the method does not have are refused."""
    period: int = 4
    """Local steps between exchanges; with LSGD those in a group."""
    pull: float | None = None
    """Strength of the pull in [0, 1]: towards the local leader (LSGD), the centre (EASGD), the average (GRAWA)."""
    global_pull: float | None = None
    """Strength of LSGD's pull towards the global leader, in [0, 1]; with one group there is none."""
    global_period: int | None = None
    """Local steps between LSGD's exchanges among all workers, a multiple of the period; with one group there are
    none."""
    window: int = 10
    """Training losses in the mean by which leaders are elected and the best worker is found."""
    center_pull: float | None = None
    """Strength of the pull of EASGD's centre towards the mean, in [0, 1]."""
    outer_learning_rate: float | None = None
    """Of DiLoCo's outer step."""
    outer_momentum: float | None = None
    """Of DiLoCo's outer step, in [0, 1]."""
    prox: float | None = None
    """Strength of GRAWA's pull towards the last average, in [0, 1], spread over the steps of a period."""
    stale_pull: float | None = None
    """Strength of LSGD's pull towards the stored local leader, in [0, 1], spread over the steps of a period."""
    global_stale_pull: float | None = None
    """The same towards the stored global leader; with one group there is none."""
    broadcast: BroadcastMethod = "auto"
    """How LSGD's leaders are sent: a masked all-reduce costs what an average costs, a ring towards half of it;
    hierarchical sends one copy between groups. All give the same bits."""
    wire: Wire | None = None
    """In what numbers LSGD's leaders are sent: rounded to bfloat16, as int8 differences to the last, or as they are."""
    revive: Revive = "never"
    """Whether an LSGD worker whose loss or parameters are NaN or infinite starts anew from the leader at the next
    exchange, with an optimiser as at the start."""
    delay: Literal[0, 1] = 0
    """Whether LSGD's pulls come an exchange later, from the points and leaders of then."""
    asynchronous: Literal["joined", "posted"] | None = None
    """Let every worker step at its own speed: at an exchange, all meet when each has finished its step (joined), or
    each is pulled towards the best that the others have posted, and nobody waits (posted). With EASGD and DOWNPOUR,
    posted, each worker meets the centre on its own clock."""
    staleness: int = 0
    """With posted, the most local steps that a leader may have taken since it posted what others are pulled to: every
    worker posts after each staleness + 1 of its steps."""
    least_step_seconds: float = 0.0
    """With asynchronous, the least time that a local step takes: the rest is slept. For experiments."""
    slowdowns: tuple[float, ...] = ()
    """By worker, in order, the factors of least_step_seconds; 1 for workers that are not given: 10 makes the first a
    straggler that takes ten times as long as the others."""
    tune_learning_rates: tuple[float, ...] = ()
    """What `lsgd compare --tune` tries; if it is not given, multiples of the learning rate, with values of the method's
    own option."""
    tune_periods: tuple[int, ...] = ()
    """With the learning rates above: the steps between exchanges among all workers that it tries. With LSGD in groups
    these are global periods, and the period is a quarter of it."""
    eval_every: int = 100
    """Local steps between evaluations on the test data."""
    checkpoint_every: int | None = None
    """Local steps between checkpoints, which a run goes on from after a stop; by default those between evaluations, and
    with 0 none are kept."""
    keep_checkpoints: int = 2
    """How many of the last checkpoints are kept, beside the one with the lowest test error."""
    seed: int = 0
    """Of the start, the data's order and all else that is random."""

    def __post_init__(self) -> None:
        """Check every field's type and range, and that what differs from its default has an effect."""
        for name, hint in _field_types().items():
            if not _is_of_type(value := getattr(self, name), hint):
                *others, last = _alternatives(hint)
                demand = f"{', '.join(others)} or {last}" if others else last
                raise ValueError(f"{name} must be {demand}, got {value!r}.")
        self._check("method", self.method in METHODS, f"one of {', '.join(METHODS)}")
        for name in _field_types():
            if _differs(name, self) and (reason := _no_effect(name, self)):
                raise ValueError(f"{name} has no effect {reason}.")
        counts = ["steps", "batch_size", "groups", "workers", "period", "window", "eval_every", "keep_checkpoints"]
        for name in [*counts, "statistics_batches", "image_size"]:
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("pull", "global_pull", "center_pull", "outer_momentum", "prox", "stale_pull", "global_stale_pull"):
            strength = getattr(self, name)
            self._check(name, strength is None or 0 <= strength <= 1, "in [0, 1]")
        if self.method == "easgd" and self.pull is not None and self.center_pull is None:
            most = 1 / (self.groups * self.workers)
            self._check("pull", self.pull <= most, f"at most 1 / workers, {most:g}, if there is no center_pull")
        self._check("window", self.window <= 1_000_000, "at most 1,000,000")
        self._check("seed", 0 <= self.seed < 2**32, "in [0, 2^32)")
        for name, value in _values(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            fits = name == "seed" or all(not isinstance(number, int) or number < 2**31 for number in numbers)
            self._check(name, fits, "below 2^31")
        self._check("validation", 0 <= self.validation <= 0.5, "in [0, 0.5]")
        rate = self.outer_learning_rate
        self._check("outer_learning_rate", rate is None or 0 < rate < float("inf"), "positive")
        workers = self.groups * self.workers
        divisible = self.batch == "per_worker" or self.batch_size % workers == 0
        self._check("batch_size", divisible, f"a multiple of the {workers} workers, if it is global")
        in_step = self.method != "data_parallel" or self.learning_rates == "equal"
        self._check("learning_rates", in_step, "equal for data_parallel, whose workers are to stay together")
        self._check("learning_rate", 0 < self.learning_rate < float("inf"), "positive")
        self._check("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._check("weight_decay", 0 <= self.weight_decay < float("inf"), "at least 0")
        drops, in_fractions = self.learning_rate_drops, self.learning_rate_drops_in == "fractions"
        in_range = all(0 < drop < (1 if in_fractions else float("inf")) for drop in drops)
        self._check("learning_rate_drops", in_range, "fractions in (0, 1)" if in_fractions else "positive")
        self._check("learning_rate_drops", len(set(drops)) == len(drops), "different from each other")
        self._check("data_processes", self.data_processes >= 0, "at least 0")
        every = self.checkpoint_every
        self._check("checkpoint_every", every is None or every >= 0, "at least 0, for none")
        self._check("width", 0 < self.width <= 64, "in (0, 64]")
        has_leaders = self.batch_statistics != "leader" or self.method == "lsgd"
        self._check("batch_statistics", has_leaders, "own, mean or reestimate for methods without leaders")
        averages = self.method == "local_sgd"
        self._check("wire", not averages or self.wire != "int8", "bfloat16 or not given for averages")
        self._check_asynchronous()
        rates, periods = self.tune_learning_rates, self.tune_periods
        self._check("tune_learning_rates", all(0 < rate < float("inf") for rate in rates), "positive")
        self._check("tune_periods", all(period >= 1 for period in periods), "at least 1")
        self._check("tune_periods", not periods or bool(rates), "given with tune_learning_rates")
        if self.groups > 1 and self.global_period is not None:
            multiple = self.global_period >= 1 and self.global_period % self.period == 0
            self._check("global_period", multiple, f"a multiple of the period, {self.period}")

    def _check_asynchronous(self) -> None:
        ways: dict[str, tuple] = {
            "lsgd": (None, "joined", "posted"),
            "easgd": (None, "posted"),
            "downpour": (None, "posted"),
        }
        allowed = ways.get(self.method, (None,))
        texts = " or ".join(way or "not given" for way in reversed(allowed))
        self._check("asynchronous", self.asynchronous in allowed, f"{texts} for {self.method}")
        mode = self.asynchronous
        self._check("staleness", self.staleness >= 0, "at least 0")
        posted = mode == "posted" and self.method == "lsgd"
        self._check("staleness", posted or self.staleness == 0, "0, unless LSGD is asynchronous and posted")
        least = self.least_step_seconds
        self._check("least_step_seconds", 0 <= least < float("inf"), "at least 0")
        self._check("least_step_seconds", mode is not None or least == 0, "0, unless training is asynchronous")
        self._check("slowdowns", all(0 < factor < float("inf") for factor in self.slowdowns), "positive")
        self._check("slowdowns", not self.slowdowns or least > 0, "given with least_step_seconds")
        workers = self.groups * self.workers
        self._check("slowdowns", len(self.slowdowns) <= workers, f"at most {workers}, one a worker")
        if mode is not None:
            for name in ("stale_pull", "global_stale_pull"):
                self._check(name, not getattr(self, name), "0 or not given, if training is asynchronous")
            self._check("revive", self.revive == "never", "never, if training is asynchronous")
        if mode == "posted":
            self._check("wire", self.wire is None, "not given with posted, which sends no leaders")
            self._check("delay", self.delay == 0, "0 with posted")
            self._check("batch_statistics", self.batch_statistics != "leader", "own, mean or reestimate with posted")

    def _check(self, name: str, right: bool, demand: str) -> None:
        if not right:
            raise ValueError(f"{name} must be {demand}, got {getattr(self, name)}.")

    @property
    def method_options(self) -> dict[str, Any]:
        """The options of the method that are set here; for the others the method has its own defaults."""
        values = ((name, getattr(self, name, None)) for name in METHODS[self.method].options)
        return {name: value for name, value in values if value is not None}

    def has_effect(self, name: str) -> bool:
        """Whether a run depends on an option, given the others."""
        return _no_effect(name, self) is None

    def replace(self, **changes: Any) -> "Config":
        """A copy with some fields changed; options that the changes leave without effect return to their defaults.

        Args:
          **changes: new values by field. They themselves have to have an effect.

        Raises:
          ValueError: if a value is out of range, or a changed option has no effect.

        Example:
          >>> from lsgd_jax.presets import PRESETS
          >>> grouped = PRESETS["cnn7-mnist5k-16"]
          >>> grouped.global_period, grouped.replace(method="easgd").global_period
          (16, None)
        """
        return _fitted(_values(self) | changes, given=changes)

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
        reasons: dict[str, list[str | None]] = {name: [] for name in options}
        for label, method in methods.items():
            of_method = types.SimpleNamespace(**_values(self) | dict(options) | {"method": method})
            for name, found in reasons.items():
                found.append(_no_effect(name, of_method))
            own = {name: value for name, value in options.items() if reasons[name][-1] is None}
            try:
                configs[label] = self.replace(method=method, **own)
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from None
        for name, found in reasons.items():
            if all(found):
                raise ValueError(f"{name} has no effect {found[0]}.")
        return configs

    def to_json(self) -> str:
        """The configuration as JSON, one field a line."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "Config":
        """The configuration that `to_json` wrote, now or before options without effect were refused: they are dropped.

        Raises:
          ValueError: if the text is not a configuration, or one of its values is out of range.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError(f"a configuration is a JSON object, got {text[:40]!r}.")
        unknown = set(fields) - {field.name for field in dataclasses.fields(Config)}
        if unknown:
            raise ValueError(f"unknown configuration fields: {', '.join(sorted(unknown))}.")
        try:
            return _fitted({name: tuple(of) if isinstance(of, list) else of for name, of in fields.items()})
        except TypeError as error:
            raise ValueError(f"not a configuration: {error}.") from None

    @property
    def comparable_rate(self) -> float:
        """The learning rate; where the workers' steps add up, divided by the number of workers."""
        return self.learning_rate / (self.groups * self.workers if METHODS[self.method].adds_up else 1)

    @property
    def levels(self) -> list[tuple[int, int]]:
        """Among how many workers there are exchanges, and every how many steps; those in a group first."""
        exchanges, workers = METHODS[self.method].exchanges, self.groups * self.workers
        if exchanges == "never":
            return []
        if exchanges == "step":
            return [(workers, 1)]
        if self.method == "lsgd" and self.groups > 1:
            return [(self.workers, self.period), (workers, self.global_period or default_global_period(self.period))]
        return [(workers, self.period)]

    @property
    def checkpoint_period(self) -> int:
        """Local steps between checkpoints; 0 for none."""
        return self.eval_every if self.checkpoint_every is None else self.checkpoint_every

    @property
    def worker_batch_size(self) -> int:
        """Examples that every worker takes a step."""
        return self.batch_size if self.batch == "per_worker" else self.batch_size // (self.groups * self.workers)

    @staticmethod
    def load(run: Path | str) -> "Config":
        """The configuration in a run's folder."""
        return Config.from_json(files.read_text(Path(run) / "config.json"))


class _Rule(NamedTuple):
    """When options have an effect, whatever the method."""

    options: tuple[str, ...]
    have_effect: Callable[[Any], bool]
    """From a configuration, which need not have been checked yet."""
    otherwise: str
    """When they have none, as the end of a sentence."""


def _has_batch_norm(config: Any) -> bool:
    from lsgd_jax.models import BATCH_NORM  # Flax takes a while to import, and few ask.

    return config.model in BATCH_NORM


_RULES = (
    _Rule(("global_pull", "global_period", "global_stale_pull"), lambda c: c.groups != 1, "with one group"),
    _Rule(("momentum",), lambda c: c.local_optimizer != "adamw", "with the local_optimizer adamw"),
    _Rule(("batch_statistics", "statistics_batches"), _has_batch_norm, "with a model without batch normalization"),
    _Rule(
        ("statistics_batches",), lambda c: c.batch_statistics == "reestimate", "unless batch_statistics is reestimate"
    ),
    _Rule(
        ("image_size", "data_processes"), lambda c: c.dataset == "imagenet2012", "unless the dataset is imagenet2012"
    ),
    _Rule(("learning_rate_drops_in",), lambda c: bool(c.learning_rate_drops), "without learning_rate_drops"),
    _Rule(
        ("checkpoint_every", "keep_checkpoints"),
        lambda c: c.asynchronous is None,
        "in asynchronous training, which keeps no checkpoints",
    ),
    _Rule(("keep_checkpoints",), lambda c: c.checkpoint_every != 0, "if checkpoint_every is 0"),
    _Rule(("broadcast",), lambda c: c.asynchronous != "posted", "with posted, where no leader is broadcast"),
)
"""What a method's options are, its builder says; these are the other reasons for an option to have no effect."""


def _no_effect(name: str, config: Any) -> str | None:
    """Why an option has no effect in a run, as the end of a sentence; None if it has one."""
    with_it = [method for method, row in METHODS.items() if name in row.options]
    if with_it and config.method not in with_it:
        return f"with {config.method}: it is an option of {', '.join(with_it)}"
    return next((rule.otherwise for rule in _RULES if name in rule.options and not rule.have_effect(config)), None)


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
    config = types.SimpleNamespace(**dict.fromkeys(_field_types()) | _defaults() | dict(values))
    kept = (name for name in values if name in given or not (_differs(name, config) and _no_effect(name, config)))
    return Config(**{name: values[name] for name in kept})


@functools.cache
def _field_types() -> dict[str, Any]:
    return get_type_hints(Config)


def _is_of_type(value: Any, hint: Any) -> bool:
    """Whether a value is of the type of a field; whole numbers are numbers, and truth values are neither."""
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_of_type(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of_type(each, get_args(hint)[0]) for each in value)
    return isinstance(value, (int, float) if hint is float else hint) and not isinstance(value, bool)


def _alternatives(hint: Any) -> list[str]:
    """What a value of the type of a field may be, for a sentence."""
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    if get_origin(hint) in (Union, types.UnionType):
        return [text for each in get_args(hint) for text in _alternatives(each)]
    if get_origin(hint) is tuple:
        [entry] = _alternatives(get_args(hint)[0])
        return [f"a tuple, each entry of it {entry}"]
    return [{float: "a number", int: "a whole number", str: "a string", types.NoneType: "not given"}[hint]]
