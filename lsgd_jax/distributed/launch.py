"""Launching several processes on this machine, which train together as several hosts do."""

import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import NamedTuple

from lsgd_jax.distributed.children import STOPPED, Child, environment_of, how_it_ended, passing_on_signals
from lsgd_jax.distributed.processes import COORDINATOR, HEARTBEAT, JOIN_TIMEOUT, LAUNCHER


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
    seconds = {JOIN_TIMEOUT: join_timeout, HEARTBEAT: heartbeat}
    environment = environment_of(processes, devices_per_process)
    environment |= {name: str(number) for name, number in seconds.items() if number is not None}
    code = _launch_once(command, processes, environment)
    for restart in range(1, restarts + 1):
        if not code.failed:
            break
        print(f"lsgd: the run resumes from its last checkpoint, restart {restart} of {restarts}.", file=sys.stderr)
        again = command if "--resume" in command else [*command, "--resume"]
        code = _launch_once(again, processes, environment)
    return code.number


class _Code(NamedTuple):
    """Exit code of a launch."""

    number: int
    failed: bool
    """Whether a process was killed or crashed."""


def _launch_once(command: Sequence[str], processes: int, environment: Mapping[str, str]) -> _Code:
    address = f"127.0.0.1:{_free_port()}"
    watched, held = os.pipe()  # Only the launcher holds it: the kernel closes it when the launcher ends.
    environment = {
        **environment,
        COORDINATOR: address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        LAUNCHER: str(watched),
    }
    started: list[Child] = []
    ended: SimpleQueue[tuple[Child, int]] = SimpleQueue()
    with passing_on_signals(lambda: started) as received:
        try:
            for number in range(processes):
                if received:
                    break
                started.append(Child(number, command, environment, [watched], lambda *which: ended.put(which)))
            if received:  # Possibly while a process was being started.
                _ask_to_stop(started)
            for _ in started:
                child, code = ended.get()
                if code in STOPPED:
                    if not received:
                        received.append(abs(code) % 128)
                        _ask_to_stop(started)
                elif code != 0:
                    break
        finally:
            for each in started:
                each.kill()
            for each in started:
                each.process.wait()
            os.close(held)
            os.close(watched)
    for each in started:
        each.forward_all()
    codes = [each.process.returncode for each in started]
    if received:
        if started and not any(codes):
            return _Code(0, failed=False)  # They were done before they could be stopped.
        if not started or codes[0] <= 0:  # It could not, or need not, say so.
            print(f"lsgd: stopped by {signal.Signals(received[0]).name}.", file=sys.stderr)
        return _Code(128 + received[0], failed=False)
    if any(each == 2 for each in codes):
        code = 2  # Another process may have crashed for it, and have been the first to be seen.
    failed = code not in (0, 2)  # With 2, the process has printed why.
    if failed:
        print(f"lsgd: process {child.number} {how_it_ended(code)}; the others were stopped.", file=sys.stderr)
    return _Code(code if code >= 0 else 128 - code, failed)


def _ask_to_stop(started: Sequence[Child]) -> None:
    for child in started:
        child.ask_to_stop()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
