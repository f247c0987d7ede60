"""Processes that a launcher starts, whose output it forwards and which end with it."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import IO, Any, BinaryIO

from lsgd_jax.distributed.interruption import stop_signals
from lsgd_jax.distributed.processes import PROCESS, PROCESSES

STOPPED = {code for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) for code in (128 + number, -number)}
"""Exit codes of a process that was stopped by a signal, whether or not it handled it."""


class Child:
    """A process of a run, in a session of its own, whose output is forwarded with its number before each line."""

    def __init__(
        self,
        number: int,
        command: Sequence[str],
        environment: Mapping[str, str],
        inherited: Sequence[int],
        ended: Callable[["Child", int], None],
    ) -> None:
        """Start it.

        Args:
          number: of the process.
          command: the program and its arguments.
          environment: without the number.
          inherited: file descriptors that it is to have.
          ended: told when the process has ended, with its code, in a thread of its own.
        """
        self.number = number
        self.process = subprocess.Popen(
            command,
            env={**environment, PROCESS: str(number)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=inherited,
            start_new_session=True,
        )
        self._forwarding = [
            in_thread(_forward, number, self.process.stdout, sys.stdout.buffer),
            in_thread(_forward, number, self.process.stderr, sys.stderr.buffer),
        ]
        in_thread(lambda: ended(self, self.process.wait()))

    def ask_to_stop(self) -> None:
        """Send it SIGTERM."""
        self.process.terminate()

    def kill(self) -> None:
        """Kill it and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def forward_all(self) -> None:
        """Wait until all that it has printed is forwarded."""
        for thread in self._forwarding:
            thread.join()


def environment_of(processes: int, devices_per_process: int | None) -> dict[str, str]:
    """The environment of the processes of a run, but for their numbers.

    Args:
      processes: their number.
      devices_per_process: CPU devices to simulate in each process; None: what the environment says.
    """
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ | {PROCESSES: str(processes), "PYTHONUNBUFFERED": "1"}
    if devices_per_process is not None:
        environment["JAX_NUM_CPU_DEVICES"] = str(devices_per_process)
    return environment


@contextmanager
def passing_on_signals(children: Callable[[], Sequence[Child]]) -> Iterator[list[int]]:
    """Ask all processes to stop when this one receives a signal, and kill them at the second one.

    Yields:
      The signals received so far.
    """
    received: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for child in children():
            child.ask_to_stop() if len(received) == 1 else child.kill()

    before = {number: signal.signal(number, take) for number in stop_signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def how_it_ended(code: int) -> str:
    """The end of a sentence about a process with this exit code."""
    return f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"


def in_thread(function: Callable, *arguments: Any) -> threading.Thread:
    """Run a function in a thread that does not keep this process from ending."""
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def _forward(number: int, lines: IO[bytes], to: BinaryIO) -> None:
    """Forward the output of a process; when it can't be written, close the pipe, so that the process notices."""
    of_gloo = False
    with lines, suppress(OSError):
        for line in lines:
            # Gloo reports every connection, in fragments that interleave; the line ends come last.
            rest = of_gloo and (not line.strip() or line.strip().isdigit())
            of_gloo = rest or b"[Gloo]" in line or b"peer ranks" in line
            if not of_gloo:
                to.write(b"[%d] %s\n" % (number, line.rstrip(b"\n")))
                to.flush()
