"""Faults, and plans of them: made up from a seed, or read from a file with one fault per line."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lsgd_jax import files
from lsgd_jax.errors import UsageError

LEADER = -1
"""In place of a process's number: whichever has the leader when the fault is injected."""
KINDS = {"kill": False, "stop": True, "partition": True, "slow": True, "disk": True}
"""What can happen to processes, and whether it lasts.

- kill: they are killed by SIGKILL.
- stop: they are stopped by SIGSTOP, and go on by SIGCONT.
- partition: they and all others do not reach each other.
- slow: every message to and from them takes `DELAY` longer.
- disk: they can't write to any file, as if their disk were full.
"""
DELAY = 0.3
"""Seconds by which a slow link delays a message."""
_CHOICES = (
    *(["kill"] * 4 + ["kill leader"] * 2 + ["kill first", "kill all but one"]),
    *(["stop"] * 3 + ["partition"] * 3 + ["slow"] * 2 + ["disk"]),
)
"""From which each fault of a random plan is chosen."""
_LONGEST = 8.0
"""Seconds that a fault of a random plan lasts at most."""


class Fault(NamedTuple):
    """Something that happens to some processes of a run."""

    at: float
    """Seconds since all processes have begun to train."""
    kind: str
    """One of `KINDS`."""
    processes: tuple[int, ...]
    """Their numbers, or `LEADER`."""
    seconds: float = 0.0
    """How long it lasts; 0 for a kill."""

    def __str__(self) -> str:
        """The fault as a line of a plan, such as `12.5 stop 0,3 2.5`."""
        processes = ",".join("leader" if number == LEADER else str(number) for number in self.processes)
        lasts = f" {self.seconds:g}" if KINDS[self.kind] else ""
        return f"{self.at:g} {self.kind} {processes}{lasts}"

    @staticmethod
    def parse(line: str, processes: int) -> "Fault":
        """The fault of a line.

        Args:
          line: of a plan.
          processes: of the run.

        Raises:
          ValueError: if it is not one of such a run.
        """
        words = line.split()
        if len(words) not in (3, 4):
            raise ValueError("it has three words, and a fourth if it lasts")
        at, kind, numbers, *lasts = words
        fault = Fault(
            float(at),
            kind,
            tuple(LEADER if number == "leader" else int(number) for number in numbers.split(",")),
            *map(float, lasts),
        )
        if kind not in KINDS:
            raise ValueError(f"a fault is one of {', '.join(KINDS)}")
        if not all(math.isfinite(number) and number >= 0 for number in (fault.at, fault.seconds)):
            raise ValueError("seconds are not negative")
        if (fault.seconds > 0) != KINDS[kind]:
            raise ValueError(f"{kind} {'takes' if KINDS[kind] else 'has no'} seconds that it lasts")
        if not all(LEADER <= number < processes for number in fault.processes):
            raise ValueError(f"processes are numbered from 0 to {processes - 1}")
        return fault


def plan(processes: int, *, seconds: float, per_hour: float, quiet: float, seed: int) -> list[Fault]:
    """A random plan: the times are those of a Poisson process, the kinds and processes are chosen at random.

    Args:
      processes: of the run.
      seconds: of the run.
      per_hour: mean number of faults.
      quiet: seconds at the start without faults.
      seed: of everything random.
    """
    rng = np.random.default_rng(seed)
    faults: list[Fault] = []
    at = quiet
    while per_hour and (at := round(at + rng.exponential(3600 / per_hour), 2)) < seconds:
        name, _, which = str(rng.choice(_CHOICES)).partition(" ")
        order = [int(number) for number in rng.permutation(processes)]
        hit = {
            "leader": [LEADER],
            "first": [0],
            "all but one": order[1:] or order,
            "": order[: max(1, processes // 2)] if name == "partition" else order[:1],
        }[which]
        lasts = round(float(rng.uniform(0.5, _LONGEST)), 2) if KINDS[name] else 0.0
        faults.append(Fault(at, name, tuple(sorted(hit)), lasts))
    return faults


def read_plan(path: Path, processes: int) -> list[Fault]:
    """The plan in a file; empty lines and those that begin with # are left out.

    Args:
      path: of the file.
      processes: of the run.

    Raises:
      UsageError: if it can't be read or a line is not a fault of such a run.
    """
    try:
        lines = files.read_text(path, most=2**20).splitlines()
    except (OSError, ValueError) as error:
        raise UsageError(f"the plan {path} can't be read ({error}).") from None
    faults = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            try:
                faults.append(Fault.parse(line, processes))
            except ValueError as error:
                raise UsageError(
                    f"line {number} of {path} is not a fault like 12.5 stop 0,3 2.5 ({error}): {line[:80]!r}."
                ) from None
    return sorted(faults)
