"""The options of a training run on the command line: a preset, and fields that override its own."""

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import tyro

from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS

TUNING = ("tune_learning_rates", "tune_periods")
CHECKPOINTS = ("checkpoint_every", "keep_checkpoints")
ASYNCHRONOUS = ("asynchronous", "staleness", "least_step_seconds", "slowdowns")
COSTS = ("groups", "workers", "steps", "seed", "period", "global_period", "broadcast", "wire")
"""What the costs of a simulation depend on, with the parameters."""
PARAMETERS = ("dataset", "model", "width")
"""What the number of parameters depends on."""


@dataclasses.dataclass(frozen=True)
class Options(Config):
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
        refuse((name for name in names if name in self.given), reason)


@dataclasses.dataclass(frozen=True)
class UnplacedOptions(Options):
    """What a training run depends on. Options override single fields of a preset."""

    groups: int | None = None  # type: ignore[assignment]
    """Groups of workers; by default one on every host, or as many as the workers in each leave."""
    workers: int | None = None  # type: ignore[assignment]
    """Workers in each group; by default as many as the groups leave."""


def refuse(given: Iterable[str], reason: str) -> None:
    """Raise UsageError if there is an option that is given without effect."""
    for name in given:
        raise UsageError(f"{name} has no effect {reason}.")


if TYPE_CHECKING:
    Preset = Options
    UnplacedPreset = UnplacedOptions
else:  # One subcommand a preset, its fields as options.

    def _subcommands(kind: type[Options], **changes: Any) -> Any:
        defaults = {
            name: kind(**dataclasses.asdict(preset) | changes | {"preset": name}) for name, preset in PRESETS.items()
        }
        return tyro.conf.OmitArgPrefixes[tyro.extras.subcommand_type_from_defaults(defaults)]

    Preset = _subcommands(Options)
    UnplacedPreset = _subcommands(UnplacedOptions, groups=None, workers=None)
