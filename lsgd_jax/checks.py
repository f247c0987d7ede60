"""Validation of options, with one-sentence error messages."""

from collections.abc import Callable, Collection, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lsgd_jax.errors import UsageError


def check_static(name: str, value: Any) -> None:
    """Raise ValueError if the value is an array, which `optax.inject_hyperparams` turns every number into."""
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} can't change during a run and must be a Python int, got an array: with optax.inject_hyperparams,"
            f' list "{name}" in static_args.'
        )


def check_whole(name: str, number: Any, unit: str) -> None:
    """Raise ValueError unless the number is a Python integer of at least 1."""
    check_static(name, number)
    if not isinstance(number, Integral) or number < 1:
        raise ValueError(f"{name} must be a whole number of {unit}, at least 1, got {number!r}.")


def check_strengths(**strengths: Any) -> None:
    """Raise ValueError unless all strengths are in [0, 1]; schedules and traced values are not checked."""
    for name, strength in strengths.items():
        if isinstance(strength, Callable | jax.core.Tracer):  # type: ignore[arg-type]
            continue
        if not np.all((np.asarray(strength) >= 0) & (np.asarray(strength) <= 1)):
            raise ValueError(f"{name} must lie in [0, 1], got {strength}.")


def check_path(name: str, path: Path | str) -> Path:
    """Convert an argument to a path; raise UsageError if no file can have it."""
    if "\0" in str(path):
        raise UsageError(f"{name} must be without NUL characters, got {str(path)!r}.")
    return Path(path)


def check_names(kind: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise UsageError unless all names of this kind are known and distinct."""
    for name in names:
        if name not in known:
            raise UsageError(f"there is no {kind} {name!r}; there are {', '.join(known)}.")
    if len(set(names)) < len(names):
        raise UsageError(f"each {kind} can be named once, got {', '.join(names)}.")
