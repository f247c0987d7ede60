"""Keeping the processes of a posted run alive: each that dies or hangs is restarted by itself, while the others train.

A process tells its launcher that it gets on by bytes in a pipe, as `Heartbeat` writes them.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from queue import Empty, SimpleQueue

from lsgd_jax.distributed.children import (
    STOPPED,
    Child,
    environment_of,
    how_it_ended,
    in_thread,
    passing_on_signals,
)
from lsgd_jax.distributed.processes import COORDINATOR, LAUNCHER

BEATS = "LSGD_BEATS"
"""Environment variable with the number of the pipe in which a process tells `lsgd launch` that it gets on."""
_GETS_ON, _ENDS = b".", b"!"
DELAYS = (0.25, 30.0)
"""Seconds until the first restart in a row, which double with each further one, and their limit."""
LONG = 60.0
"""Seconds after which a process has lived for so long that its restarts are counted from zero."""
COMPILED = "JAX_COMPILATION_CACHE_DIR"
"""Environment variable of JAX: where compiled programs are kept."""
_CACHE_WARNINGS = [f"ignore:Error {doing} persistent compilation cache entry" for doing in ("reading", "writing")]
NOTICE = 0.1
"""Seconds within which a hang, or a restart that is due, is noticed."""


class Heartbeat:
    """What a process tells the launcher that has started it; nothing where there is none."""

    def __init__(self) -> None:
        """Say nothing yet."""
        number = os.environ.get(BEATS, "")
        self._pipe = int(number) if number.isdecimal() else None
        if self._pipe is not None:
            with suppress(OSError):
                os.set_blocking(self._pipe, False)

    def beat(self) -> None:
        """Say that this process gets on."""
        self._say(_GETS_ON)

    def end(self) -> None:
        """Say that it trains no more: what is left to do may take as long as it does."""
        self._say(_ENDS)

    def _say(self, what: bytes) -> None:
        if self._pipe is not None:
            with suppress(OSError):  # The launcher has ended, or is stopped.
                os.write(self._pipe, what)


def supervise(
    command: Sequence[str],
    processes: int,
    devices_per_process: int | None = None,
    *,
    restarts: int = 10,
    hang_seconds: float = 300.0,
    detached: bool = False,
) -> int:
    """Run the command of a posted run in several processes, and restart those that die, with --resume.

    Their output is forwarded, each line prefixed with the number of its process. A process that has ended with 0, has
    left on a signal, or has ended with 2 before it ever trained, is not restarted: one that trained has met something
    that may pass, such as a full disk. What one has compiled, its replacement need not: JAX keeps programs in a
    temporary folder while the processes run, unless JAX_COMPILATION_CACHE_DIR names another. When the launcher receives
    SIGINT, SIGTERM or SIGHUP, all are sent SIGTERM; a second signal kills them. Call it from the main thread.

    Args:
      command: the program and its arguments.
      processes: their number.
      devices_per_process: CPU devices to simulate in each process; None: what the environment says.
      restarts: how often in a row to restart a process; those before it has lived for a minute count.
      hang_seconds: a process that trains but has not got on for so long is killed; 0: it never is.
      detached: whether the processes go on without the launcher if it is killed.

    Returns:
      0 if a process ended with 0: the run is finished. Otherwise 128 + the signal that stopped the launcher, or the
      exit code of the last process, which is 128 + signal if it was killed.
    """
    return _Supervisor(command, processes, devices_per_process, restarts, hang_seconds, detached=detached).run()


class _Place:
    """A process of the run, over all its restarts."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.child: Child | None = None
        self.restarts = 0
        """In a row."""
        self.due: float | None = 0.0
        """When it is to be started; None: it runs, or is not to be started again."""
        self.started = 0.0
        self.heard: float | None = None
        """When it last told that it gets on; None: it does not train yet."""
        self.has_trained = False
        """In any of its lives."""
        self.listener: threading.Thread | None = None


class _Supervisor:
    """The processes of a run and what becomes of them."""

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        devices_per_process: int | None,
        restarts: int,
        hang_seconds: float,
        *,
        detached: bool,
    ) -> None:
        self._command, self._restarts, self._hang_seconds = command, restarts, hang_seconds
        self._places = [_Place(number) for number in range(processes)]
        self._environment = environment_of(processes, devices_per_process)
        self._environment.pop(COORDINATOR, None)
        self._watched, self._held = os.pipe()  # Only the launcher holds it: the kernel closes it when it ends.
        self._inherited = [] if detached else [self._watched]
        if not detached:
            self._environment[LAUNCHER] = str(self._watched)
        self._ended: SimpleQueue[tuple[Child, int]] = SimpleQueue()
        self._codes: list[int] = []

    def run(self) -> int:
        with passing_on_signals(self._children) as received, ExitStack() as kept:
            if COMPILED not in self._environment:
                with suppress(OSError):  # Without one, replacements compile anew.
                    folder = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
                    self._environment |= _keeping_programs_in(kept.enter_context(folder))
            try:
                while self._is_running(received):
                    self._start_due(received)
                    self._kill_hanging()
                    with suppress(Empty):
                        self._note_end(*self._ended.get(timeout=NOTICE), received)
            finally:
                for child in self._children():
                    child.kill()
                os.close(self._held)
                os.close(self._watched)
        if 0 in self._codes:
            return 0
        if received:
            print(f"lsgd: stopped by {signal.Signals(received[0]).name}.", file=sys.stderr)
            return 128 + received[0]
        code = 2 if 2 in self._codes else self._codes[-1]
        return code if code >= 0 else 128 - code

    def _children(self) -> list[Child]:
        return [place.child for place in self._places if place.child is not None]

    def _is_running(self, received: Sequence[int]) -> bool:
        return bool(self._children()) or (not received and any(place.due is not None for place in self._places))

    def _start_due(self, received: Sequence[int]) -> None:
        for place in self._places:
            if place.due is None or received or time.monotonic() < place.due:
                continue
            hears, tells = os.pipe()
            begins = place.started == 0.0 or "--resume" in self._command
            command = self._command if begins else [*self._command, "--resume"]
            environment = {**self._environment, BEATS: str(tells)}
            place.child = Child(
                place.number,
                command,
                environment,
                [*self._inherited, tells],
                lambda *which: self._ended.put(which),
            )
            os.close(tells)
            place.due, place.heard, place.started = None, None, time.monotonic()
            place.listener = in_thread(_listen, place, place.child, hears)
            if received:  # While it was being started.
                place.child.ask_to_stop()

    def _kill_hanging(self) -> None:
        now = time.monotonic()
        for place in self._places:
            silent = 0.0 if place.heard is None else now - place.heard
            if place.child is not None and self._hang_seconds and silent > self._hang_seconds:
                print(f"lsgd: process {place.number} has not got on for {silent:.0f} s: it is killed.", file=sys.stderr)
                place.heard = None
                place.child.kill()

    def _note_end(self, child: Child, code: int, received: Sequence[int]) -> None:
        place = self._places[child.number]
        child.kill()  # What it has started.
        child.forward_all()
        if place.listener is not None:
            place.listener.join(1)  # The process may have trained without having been heard yet.
        place.child = None
        self._codes.append(code)
        if code == 0:
            for each in self._places:
                each.due = None  # The run is finished.
        elif not received and (code != 2 or place.has_trained) and code not in STOPPED and 0 not in self._codes:
            self._restart_later(place, how_it_ended(code))

    def _restart_later(self, place: _Place, how: str) -> None:
        if time.monotonic() - place.started > LONG:
            place.restarts = 0
        if place.restarts == self._restarts:
            gives_up = f"after {self._restarts} restarts in a row" if self._restarts else "and is not restarted"
            print(f"lsgd: process {place.number} {how} {gives_up}; the others go on.", file=sys.stderr)
            return
        place.restarts += 1
        first, most = DELAYS
        place.due = time.monotonic() + min(most, first * 2 ** (place.restarts - 1))
        print(f"lsgd: process {place.number} {how}; it is restarted.", file=sys.stderr)


def _keeping_programs_in(folder: str) -> dict[str, str]:
    """Variables with which JAX keeps all that it compiles."""
    return {
        COMPILED: folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        # Where a process was killed while it wrote a program, the next one compiles it again.
        "PYTHONWARNINGS": ",".join([*filter(None, [os.environ.get("PYTHONWARNINGS")]), *_CACHE_WARNINGS]),
    }


def _listen(place: _Place, child: Child, pipe: int) -> None:
    """Note when a process tells that it gets on."""
    with open(pipe, "rb", buffering=0) as told:
        while what := told.read(64):
            if place.child is child:
                place.has_trained = True
                place.heard = None if what.endswith(_ENDS) else time.monotonic()
