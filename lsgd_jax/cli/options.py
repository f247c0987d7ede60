"""Command-line options of a training run: a preset, and overrides of its fields."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import tyro

from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS

TUNING = ("tune_learning_rates", "tune_periods")
CHECKPOINTS = ("checkpoint_every", "keep_checkpoints")
ASYNCHRONOUS = ("asynchronous", "staleness", "min_step_seconds", "slowdowns")
COSTS = (
    *("groups", "workers", "chips_per_worker", "steps", "seed", "period", "global_period", "broadcast", "wire"),
    "fragments",
)
"""Options that affect the costs of a simulation, besides the parameters."""
PARAMETERS = ("dataset", "model", "width")
"""Options that affect the number of parameters."""


@dataclasses.dataclass(frozen=True)
class Options(Config):
    """Configuration of a training run. Options override fields of the preset."""

    preset: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""

    def __post_init__(self) -> None:
        """Skip the checks of `Config`: `checked` makes them, knowing which options are given."""

    @property
    def base(self) -> Config:
        """Configuration of the preset."""
        return PRESETS[self.preset]

    @property
    def given(self) -> dict[str, Any]:
        """Fields that differ from the preset."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        return {name: value for name, value in fields.items() if value != getattr(self.base, name)}

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


if TYPE_CHECKING:
    Preset = Options
    UnplacedPreset = UnplacedOptions
else:  # One subcommand per preset, with its fields as options.

    def _subcommands(kind: type[Options], **changes: Any) -> Any:
        defaults = {
            name: kind(**dataclasses.asdict(preset) | changes | {"preset": name}) for name, preset in PRESETS.items()
        }
        return tyro.conf.OmitArgPrefixes[tyro.extras.subcommand_type_from_defaults(defaults)]

    Preset = _subcommands(Options)
    UnplacedPreset = _subcommands(UnplacedOptions, groups=None, workers=None)
