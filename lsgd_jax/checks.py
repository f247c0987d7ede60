"""Validation of options, with one-sentence error messages."""

import types
from collections.abc import Callable, Collection, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import jax
import numpy as np

from lsgd_jax import spelling
from lsgd_jax.errors import UsageError

MOST_LOSSES = 1_000_000
"""In a score's window."""


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


def check_window(window: Any) -> None:
    """Raise ValueError unless the window is a number of losses that a worker can keep."""
    check_whole("window", window, "losses")
    if window > MOST_LOSSES:
        raise ValueError(f"window must be at most {MOST_LOSSES:,}, got {window}.")


def check_positive(**numbers: Any) -> None:
    """Raise ValueError unless all are positive and finite; what is not known yet passes, as for `check_strengths`."""
    for name, number in numbers.items():
        if not is_unknown(number) and not (np.all(np.asarray(number) > 0) and np.all(np.isfinite(number))):
            raise ValueError(f"{name} must be positive, got {number}.")


def check_not_negative(**numbers: Any) -> None:
    """Raise ValueError unless all are at least 0, infinite or not; what is not known yet passes."""
    for name, number in numbers.items():
        if not is_unknown(number) and not np.all(np.asarray(number) >= 0):
            raise ValueError(f"{name} must be at least 0, got {number}.")


def check_strengths(**strengths: Any) -> None:
    """Raise ValueError unless all strengths are in [0, 1]; schedules and traced values are not checked."""
    for name, strength in strengths.items():
        if not is_unknown(strength) and not np.all((np.asarray(strength) >= 0) & (np.asarray(strength) <= 1)):
            raise ValueError(f"{name} must be in [0, 1], got {strength}.")


def is_unknown(number: Any) -> bool:
    """Whether a number is known only when a program runs: a schedule, or a traced value."""
    return isinstance(number, Callable | jax.core.Tracer)  # type: ignore[arg-type]


def check_path(name: str, path: Path | str) -> Path:
    """Convert an argument to a path; raise UsageError if no file can have it."""
    if "\0" in str(path):
        raise UsageError(f"{name} must be without NUL characters, got {str(path)!r}.")
    return Path(path)


def check_names(kind: str, names: Sequence[str], known: Collection[str]) -> None:
    """Raise UsageError unless all names of this kind are known and distinct."""
    for name in names:
        if name not in known:
            raise UsageError(spelling.unknown(kind, name, known))
    if len(set(names)) < len(names):
        raise UsageError(f"each {kind} can be named once, got {', '.join(names)}.")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError unless a value is of a type; whole numbers are numbers, and truth values are neither.

    Args:
      name: of the option.
      value: given for it.
      hint: a type, a `Literal`, a tuple of one type with any length, or a union of these.
    """
    if not _is_of_type(value, hint):
        *others, last = _alternatives(hint)
        demand = f"{', '.join(others)} or {last}" if others else last
        end = spelling.or_nearest(value, choices_of(hint)) if isinstance(value, str) else "."
        raise ValueError(f"{name} must be {demand}, got {value!r}{end}")


def choices_of(hint: Any) -> list[str]:
    """Return the values that a type lists."""
    if get_origin(hint) in (Union, types.UnionType):
        return [choice for each in get_args(hint) for choice in choices_of(each)]
    return [str(choice) for choice in get_args(hint)] if get_origin(hint) is Literal else []


def is_checkable(hint: Any) -> bool:
    """Return whether `check_type` knows a type."""
    if get_origin(hint) in (Union, types.UnionType, tuple):
        return all(each is Ellipsis or is_checkable(each) for each in get_args(hint))
    return get_origin(hint) is Literal or hint in _NAMES


def _is_of_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_of_type(value, each) for each in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_is_of_type(each, get_args(hint)[0]) for each in value)
    return isinstance(value, (int, float) if hint is float else hint) and isinstance(value, bool) == (hint is bool)


def _alternatives(hint: Any) -> list[str]:
    """What a value of a type may be, for a sentence."""
    if get_origin(hint) is Literal:
        return choices_of(hint)
    if get_origin(hint) in (Union, types.UnionType):
        return list(dict.fromkeys(text for each in get_args(hint) for text in _alternatives(each)))
    if get_origin(hint) is tuple:
        [entry] = _alternatives(get_args(hint)[0])
        return [f"a tuple, each entry of it {entry}"]
    return _NAMES[hint]


_NAMES = {
    bool: ["True", "False"],
    float: ["a number"],
    int: ["a whole number"],
    str: ["a string"],
    types.NoneType: ["not given"],
}
"""What a value of a plain type is, for a sentence."""
