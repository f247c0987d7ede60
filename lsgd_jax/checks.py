"""Checks of options, each failing with one sentence."""

from collections.abc import Callable
from numbers import Integral
from typing import Any

import jax
import numpy as np


def check_static(name: str, value: Any) -> None:
    """Raise ValueError if the value is an array, which `optax.inject_hyperparams` makes of every number."""
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} can't change during a run and must be a Python int, got an array: with optax.inject_hyperparams,"
            f' list "{name}" in static_args.'
        )


def check_whole(name: str, number: Any, unit: str) -> None:
    """Raise ValueError unless the number is a Python one, whole and at least 1."""
    check_static(name, number)
    if not isinstance(number, Integral) or number < 1:
        raise ValueError(f"{name} must be a whole number of {unit}, at least 1, got {number!r}.")


def check_strengths(**strengths: Any) -> None:
    """Raise ValueError unless all are in [0, 1]; what is not known yet, schedules and traced numbers, passes."""
    for name, strength in strengths.items():
        if isinstance(strength, Callable | jax.core.Tracer):  # type: ignore[arg-type]
            continue
        if not np.all((np.asarray(strength) >= 0) & (np.asarray(strength) <= 1)):
            raise ValueError(f"{name} must lie in [0, 1], got {strength}.")
