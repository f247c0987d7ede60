"""What one process of a run knows about all workers, as a value that is merged with what other processes know.

For each worker a view holds its newest version, ordered by (life, beat): a worker has one life more after each
replacement, and its process counts beats. Merging takes, for each worker, the newer version and the larger count of
steps. That is a maximum in a total order, and so commutative, associative and idempotent: in whatever order, and
however often, processes hear from each other, all arrive at the same view; step counts never fall, and an old life
never returns.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

MOST_WORKERS = 2**16
"""Limit on the workers of a view from another process."""
_MOST_COUNT = 2**53
"""Limit on lives, beats and steps: integers up to here are exact in JSON, whoever reads it."""
_ADDRESS = re.compile(r"[\w.:\[\]%-]{1,255}:\d{1,5}")


class Entry(NamedTuple):
    """A worker in one version. The fields are in the order in which versions are compared."""

    life: int
    """From 1: one more than the worker's lives before."""
    beat: int
    """Beats of the worker's process in this life."""
    since: float
    """When this life began, in seconds since the epoch, by the clock of the worker's host, but after all whom its
    process knew then."""
    address: str
    """The process's, host:port."""
    posted_step: int
    """Steps, in all lives, when the worker posted its parameters; -1: it has not posted in this life."""
    score: float
    """As posted: infinite rather than NaN."""
    eligible: bool
    """As posted: whether the worker can be elected."""
    step: int
    """Steps in all lives."""


View = Mapping[int, Entry]
"""Newest known version of each worker, by position."""


def newer(one: Entry, other: Entry) -> Entry:
    """The newer of two versions of a worker, with the larger count of steps."""
    return max(one, other)._replace(step=max(one.step, other.step))


def merge(one: View, other: View) -> dict[int, Entry]:
    """What two processes know together."""
    merged = dict(one)
    for position, entry in other.items():
        merged[position] = newer(merged[position], entry) if position in merged else entry
    return merged


def dump(view: View) -> list[list[Any]]:
    """A view as a value for JSON."""
    return [[position, *entry] for position, entry in view.items()]


def parse(value: Any) -> dict[int, Entry]:
    """Inverse of `dump`, for a value from anywhere.

    Raises:
      ValueError: if it is not a view.
    """
    if not isinstance(value, list) or len(value) > MOST_WORKERS:
        raise ValueError(f"a view must be a list of at most {MOST_WORKERS} workers")
    return dict(_parse_entry(entry) for entry in value)


def _parse_entry(value: Any) -> tuple[int, Entry]:
    match value:
        case [int(), int(), int(), int() | float(), str(), int(), int() | float(), bool(), int()]:
            position, life, beat, since, address, posted_step, score, eligible, step = value
            least = (0, 1, 0, -1, 0)
            counts = (position, life, beat, posted_step, step)
            if (
                all(type(count) is int and low <= count < _MOST_COUNT for low, count in zip(least, counts, strict=True))
                and math.isfinite(since)
                and not math.isnan(score)
                and _ADDRESS.fullmatch(address)
            ):
                return position, Entry(life, beat, float(since), address, posted_step, float(score), eligible, step)
    raise ValueError(f"not a worker of a view: {str(value)[:200]}")
