"""Launching several processes on this machine, which train together as several hosts do."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from types import FrameType
from typing import IO, Any, BinaryIO, NamedTuple

from lsgd_jax.distributed import COORDINATOR, HEARTBEAT, JOIN_TIMEOUT, LAUNCHER, PROCESS, PROCESSES
from lsgd_jax.distributed.interruption import stop_signals

STOPPED = {code for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) for code in (128 + number, -number)}
"""Exit codes of a process that was stopped by a signal, whether or not it handled it."""


def launch(
    command: Sequence[str],
    processes: int,
    devices_per_process: int | None = None,
    restarts: int = 0,
    *,
    join_timeout: int | None = None,
    heartbeat: int | None = None,
) -> int:
    """Run a command in several processes, which connect over loopback with `lsgd_jax.distributed.initialize`.

    Their output is forwarded, each line prefixed with the number of its process. When one process fails, all are
    killed; if the launcher is killed, they end by themselves. When the launcher or one of them receives SIGINT, SIGTERM
    or SIGHUP, all are sent SIGTERM; a second signal to the launcher kills them. Call it from the main thread.

    Args:
      command: the program and its arguments.
      processes: their number.
      devices_per_process: CPU devices to simulate in each process; None: what the environment says.
      restarts: how often to restart all processes, with --resume, after one has failed; exit code 2, with which a
        process has said what is wrong, is not restarted.
      join_timeout: seconds after which processes stop waiting for those that are missing at the start; None: what the
        environment says.
      heartbeat: seconds without a heartbeat after which a process counts as dead, and all others end; None: what the
        environment says.

    Returns:
      0 if all processes ended with 0. Otherwise the exit code of the first that did not, which is 128 + signal if it
      was killed, or 128 + the signal that stopped the launcher or a process.
    """
    numbers = {"JAX_NUM_CPU_DEVICES": devices_per_process, JOIN_TIMEOUT: join_timeout, HEARTBEAT: heartbeat}
    settings = {name: str(number) for name, number in numbers.items() if number is not None}
    code = _launch_once(command, processes, settings)
    for restart in range(1, restarts + 1):
        if not code.failed:
            break
        print(f"lsgd: the run resumes from its last checkpoint, restart {restart} of {restarts}.", file=sys.stderr)
        again = command if "--resume" in command else [*command, "--resume"]
        code = _launch_once(again, processes, settings)
    return code.number


class _Code(NamedTuple):
    """Exit code of a launch."""

    number: int
    failed: bool
    """Whether a process was killed or crashed."""


def _launch_once(command: Sequence[str], processes: int, settings: dict[str, str]) -> _Code:
    address = f"127.0.0.1:{_free_port()}"
    environment = {"JAX_PLATFORMS": "cpu"} | os.environ
    environment |= {COORDINATOR: address, "JAX_COORDINATOR_BIND_ADDRESS": address, PROCESSES: str(processes)}
    environment |= settings | {"PYTHONUNBUFFERED": "1"}
    watched, held = os.pipe()  # Only the launcher holds it: the kernel closes it when the launcher ends.
    started: list[subprocess.Popen] = []
    ended: SimpleQueue[tuple[int, int]] = SimpleQueue()
    forwarding: list[threading.Thread] = []
    with _passing_on_signals(started) as received:
        try:
            for number in range(processes):
                if received:
                    break
                process = subprocess.Popen(
                    command,
                    env=environment | {PROCESS: str(number), LAUNCHER: str(watched)},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=[watched],
                    start_new_session=True,
                )
                started.append(process)
                forwarding += [
                    _in_thread(_forward, number, process.stdout, sys.stdout.buffer),
                    _in_thread(_forward, number, process.stderr, sys.stderr.buffer),
                ]
                _in_thread(lambda number, process: ended.put((number, process.wait())), number, process)
            if received:  # Possibly while a process was being started.
                _ask_to_stop(started)
            for _ in started:
                number, code = ended.get()
                if code in STOPPED:
                    if not received:
                        received.append(abs(code) % 128)
                        _ask_to_stop(started)
                elif code != 0:
                    break
        finally:
            _kill(started)
            for process in started:
                process.wait()
            os.close(held)
            os.close(watched)
    for thread in forwarding:
        thread.join()
    if received:
        if started and not any(process.returncode for process in started):
            return _Code(0, failed=False)  # They were done before they could be stopped.
        if not started or started[0].returncode <= 0:  # It could not, or need not, say so.
            print(f"lsgd: stopped by {signal.Signals(received[0]).name}.", file=sys.stderr)
        return _Code(128 + received[0], failed=False)
    if any(process.returncode == 2 for process in started):
        code = 2  # Another process may have crashed for it, and have been the first to be seen.
    failed = code not in (0, 2)  # With 2, the process has printed why.
    if failed:
        how = f"ended with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
        print(f"lsgd: process {number} {how}; the others were stopped.", file=sys.stderr)
    return _Code(code if code >= 0 else 128 - code, failed)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@contextmanager
def _passing_on_signals(started: list[subprocess.Popen]) -> Iterator[list[int]]:
    """Ask all processes to stop when this one receives a signal, and kill them at the second one.

    Yields:
      The signals received so far.
    """
    received: list[int] = []

    def take(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            _ask_to_stop(started)
        else:
            _kill(started)

    before = {number: signal.signal(number, take) for number in stop_signals()}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_to_stop(started: list[subprocess.Popen]) -> None:
    for process in started:
        process.terminate()


def _kill(started: list[subprocess.Popen]) -> None:
    """Kill the processes and their children."""
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _in_thread(function: Callable, *arguments: Any) -> threading.Thread:
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
