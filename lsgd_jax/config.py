"""The one configuration of a training run: frozen, checked when it is made, written into the run's folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Config:
    """What a training run depends on. Presets make it; the command line overrides single fields."""

    dataset: Literal["mnist1d", "digits"]
    """The data: MNIST-1D (4,000 training and 1,000 test signals of 40 samples, 10 classes) or scikit-learn's digits
    (1,437 and 360 images of 8x8 pixels)."""
    model: Literal["conv1d", "mlp"]
    """The network that every worker trains."""
    steps: int
    """Local steps of every worker."""
    learning_rate: float
    """Of every worker's own SGD."""
    learning_rate_drops: tuple[float, ...] = ()
    """Fractions of the training at which the learning rate is multiplied by 0.1."""
    momentum: float = 0.9
    """Of every worker's own SGD; Nesterov's."""
    weight_decay: float = 1e-4
    """Times the parameters, added to the gradient."""
    batch_size: int = 32
    """Examples that every worker takes a step."""
    sampling: Literal["shards", "independent"] = "shards"
    """How the training data reaches the workers: each epoch is shuffled and dealt out in disjoint shards, or every
    worker goes through all the data in an order of its own."""
    groups: int = 2
    """Groups of workers, each with a local leader."""
    workers: int = 4
    """Workers in each group."""
    pull: float = 0.1
    """Strength of the pull towards the local leader, in [0, 1]."""
    period: int = 4
    """Local steps between exchanges in a group."""
    global_pull: float = 0.1
    """Strength of the pull towards the global leader, in [0, 1]; not used with one group."""
    global_period: int = 16
    """Local steps between exchanges among all workers, a multiple of the period; not used with one group."""
    window: int = 10
    """Training losses in the mean by which leaders are elected."""
    eval_every: int = 100
    """Local steps between evaluations on the test data."""
    seed: int = 0
    """Of the start, the data's order and all else that is random."""

    def __post_init__(self) -> None:
        """Check every number's range."""
        for name in ("steps", "batch_size", "groups", "workers", "period", "global_period", "window", "eval_every"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("pull", "global_pull"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check("learning_rate", 0 < self.learning_rate < float("inf"), "positive")
        self._check("momentum", 0 <= self.momentum < 1, "in [0, 1)")
        self._check("weight_decay", 0 <= self.weight_decay < float("inf"), "at least 0")
        self._check(
            "learning_rate_drops", all(0 < drop < 1 for drop in self.learning_rate_drops), "fractions in (0, 1)"
        )
        self._check("seed", 0 <= self.seed < 2**32, "in [0, 2^32)")
        if self.groups > 1:
            multiple = self.global_period % self.period == 0
            self._check("global_period", multiple, f"a multiple of the period, {self.period}")

    def _check(self, name: str, right: bool, demand: str) -> None:
        if not right:
            raise ValueError(f"{name} must be {demand}, got {getattr(self, name)}.")

    def to_json(self) -> str:
        """The configuration as JSON, one field a line."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str) -> "Config":
        """The configuration that `to_json` wrote.

        Raises:
          ValueError: if the text is not a configuration, or one of its values is out of range.
        """
        fields: dict[str, Any] = json.loads(text)
        unknown = set(fields) - {field.name for field in dataclasses.fields(Config)}
        if unknown:
            raise ValueError(f"unknown configuration fields: {', '.join(sorted(unknown))}.")
        return Config(**fields | {"learning_rate_drops": tuple(fields.get("learning_rate_drops", ()))})

    @staticmethod
    def load(run: Path) -> "Config":
        """The configuration in a run's folder."""
        return Config.from_json((run / "config.json").read_text())
