"""What tuning tries for each method: a grid of learning rates and values of its own options; then evaluated models."""

from collections.abc import Mapping
from typing import Any

from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS

RATES = (0.3, 1.0, 3.0)
"""Learning rates in the tuning grid, as multiples of the preset's, for all values of the method's own options."""
RATES_ALONE = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
"""Learning rates for methods without options of their own, for an equally large grid."""


def grid(config: Config) -> list[dict[str, Any]]:
    """Return the hyperparameters in the tuning grid of a configuration's method.

    By default, the grid has nine cells for every method. A preset's own rates and periods are tried as given.
    """
    method = METHODS[config.method]
    if config.tune_learning_rates:
        periods: list[dict[str, Any]] = [{}]
        if method.exchanges == "period":
            periods = [dict(method.periods(every, config.groups)) for every in config.tune_periods] or [{}]
        return [{"learning_rate": rate, **period} for rate in config.tune_learning_rates for period in periods]
    rate = config.comparable_rate
    if not method.grid:
        return [{"learning_rate": rate * factor} for factor in RATES_ALONE]
    own = [dict(zip(method.grid, values, strict=True)) for values in zip(*method.grid.values(), strict=True)]
    return [{"learning_rate": rate * factor, **values} for factor in RATES for values in own]


def other_models(config: Config) -> list[dict[str, Any]]:
    """Return the evaluated models that tuning tries with the best of the grid, beside the method's own.

    These are the same for all methods that exchange: the tail mean. There are none if the evaluated model is given.
    """
    has_tail = "tail_mean" in METHODS[config.method].evaluated_models
    return [{"evaluated_model": "tail_mean"}] if has_tail and config.evaluated_model is None else []


def check_grid(config: Config, options: Mapping[str, Any]) -> None:
    """Raise UsageError if an option is given that tuning chooses, or that does not fit what tuning tries.

    Tuning may try multiples of a given learning rate.
    """
    for name in grid(config)[0]:
        is_tried = name == "learning_rate" and not config.tune_learning_rates
        if name in options and not is_tried:
            raise UsageError(f"tuning chooses the {name} of {config.method} itself: leave it out, or do not tune.")
    for values in grid(config):
        try:
            config.replace(**values)
        except ValueError as error:
            tried = ", ".join(f"{name} {value}" for name, value in values.items())
            raise UsageError(f"tuning tries {tried} with {config.method}, but {error}") from None
