"""Injects faults into the processes of a posted run on this machine."""

import contextlib
import itertools
import json
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lsgd_jax import files
from lsgd_jax.asynchronous.rendezvous import claims
from lsgd_jax.chaos.faults import DELAY, LEADER, Fault

TAIL = 2**16
"""Bytes at the end of a process's events in which the last leader is looked for."""


class Injector:
    """Does to processes what faults say, and undoes it when they are over."""

    def __init__(self, run: Path, owner: int, links: Path, workers: Sequence[range]) -> None:
        """Inject nothing yet.

        Args:
          run: run folder.
          owner: process that has started those of the run; no others are touched.
          links: file with the faults of links, as `lsgd_jax.asynchronous.links` reads it.
          workers: of each process.
        """
        self._run, self._owner, self._links, self._workers = run, owner, links, workers
        self._undo: list[tuple[float, Callable[[], None]]] = []
        self._on_links: list[tuple[float, Fault, list[int]]] = []
        """Faults of links that are not over, until when, and the processes that they hit."""
        self._written: dict[str, dict[str, float | str]] = {}

    def inject(self, fault: Fault) -> dict[str, Any]:
        """Inject a fault; returns what was hit, as a record for JSON."""
        now, lives = time.time(), {position: life for position, life, _ in claims(self._run / "members")}
        numbers = {self._leading_process() if number == LEADER else number for number in fault.processes}
        pids = {number: pid for number in sorted(numbers) if (pid := self.pid(number)) is not None}
        over = time.monotonic() + fault.seconds
        if fault.kind in ("partition", "slow"):
            self._on_links.append((over, fault, list(pids)))
        for pid in pids.values():
            self._hit(pid, fault.kind, over)
        self.tick()
        hit = [
            {"worker": position, "life": lives.get(position, 0)}
            for number in pids
            for position in self._workers[number]
        ]
        return {"fault": str(fault), "kind": fault.kind, "time": now, "seconds": fault.seconds, "hit": hit}

    def tick(self) -> None:
        """Undo what is over; call it several times a second, since replaced processes have new addresses."""
        now = time.monotonic()
        over, self._undo = [e for e in self._undo if e[0] <= now], [e for e in self._undo if e[0] > now]
        for _, undo in over:
            undo()
        self._on_links = [entry for entry in self._on_links if entry[0] > now]
        self._write_links()

    def close(self) -> None:
        """Undo everything."""
        for _, undo in self._undo:
            undo()
        self._undo, self._on_links = [], []
        self._write_links()

    def pid(self, number: int) -> int | None:
        """The process with this number; None if it is not alive.

        A process locks the folders of its workers and writes its id into the lock.
        """
        with contextlib.suppress(OSError, ValueError):
            lock = files.read_text(self._run / "workers" / str(self._workers[number][0]) / files.LOCK, most=1000)
            if match := re.match(r"process (\d+) on ", lock):
                state, parent = Path(f"/proc/{match[1]}/stat").read_text().rpartition(")")[2].split()[:2]
                if int(parent) == self._owner and state not in "ZX":
                    return int(match[1])
        return None

    def _hit(self, pid: int, kind: str, over: float) -> None:
        with contextlib.suppress(ProcessLookupError):
            if kind == "kill":
                os.kill(pid, signal.SIGKILL)
            elif kind == "stop":
                os.kill(pid, signal.SIGSTOP)
                self._undo.append((over, lambda: _quietly(os.kill, pid, signal.SIGCONT)))
            elif kind == "disk":
                _, most = before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, most))
                self._undo.append((over, lambda: _quietly(resource.prlimit, pid, resource.RLIMIT_FSIZE, before)))

    def _leading_process(self) -> int:
        """The process of the leader that was followed last; the first one if nobody was."""
        last = (0.0, 0)
        for path in self._run.glob("events-*.jsonl"):
            with contextlib.suppress(OSError), path.open("rb") as events:
                events.seek(max(0, path.stat().st_size - TAIL))
                for line in events:
                    with contextlib.suppress(ValueError):
                        event = json.loads(line)
                        if event.get("event") == "exchange" and event.get("leader", -1) >= 0:
                            last = max(last, (event["time"], event["leader"]))
        return next((number for number, own in enumerate(self._workers) if last[1] in own), 0)

    def _write_links(self) -> None:
        """Write which addresses each process does not reach, or reaches slowly, if that has changed."""
        if not self._on_links and not self._written:
            return
        addresses = {}
        for position, _, path in sorted(claims(self._run / "members"), key=lambda claim: claim[1]):
            with contextlib.suppress(OSError):
                addresses[position] = path.read_text().strip()
        links: dict[str, dict[str, float | str]] = {}
        for _, fault, hit in self._on_links:
            for a, b in itertools.permutations(range(len(self._workers)), 2):
                first, other = self._workers[a][0], self._workers[b][0]
                apart = (a in hit) != (b in hit)
                if other in addresses and (apart or (fault.kind == "slow" and a in hit)):
                    what = "drop" if fault.kind == "partition" else DELAY
                    if links.setdefault(str(first), {}).get(addresses[other]) != "drop":
                        links[str(first)][addresses[other]] = what
        if links != self._written:
            files.write(self._links, json.dumps(links))
            self._written = links


def _quietly(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function on a process that may have ended."""
    with contextlib.suppress(ProcessLookupError):
        function(*arguments)
