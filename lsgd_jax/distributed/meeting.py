"""A meeting of a run's processes before JAX connects them, to find out which are missing.

JAX waits for all processes silently and crashes if its port is taken. So process 0 first listens on that port itself,
the others send it their numbers, and when all have joined it leaves the port to JAX.
"""

import re
import socket
import sys
import time
from collections.abc import Container
from contextlib import ExitStack, suppress

from lsgd_jax.errors import UsageError

_JOINED, _ALL_JOINED, _REFUSED = "joined", "all joined", "refused: "
"""Answers of process 0, one line each."""
_ALONE = "to train alone, give --processes 1 or set LSGD_PROCESSES=1"


def host_and_port(address: str) -> tuple[str, int]:
    """The host and the port of an address host:port or [::1]:port.

    Raises:
      ValueError: if it is not such an address.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"an address must be host:port, got {address!r}")
    return host.strip("[]"), int(port)


def meet(address: str, count: int, number: int, listen_at: str, patience: float, timeout: float) -> None:
    """Wait until all processes of the run have joined; print which ones are missing for longer than `patience`.

    Args:
      address: host:port of process 0.
      count: number of processes.
      number: of this process.
      listen_at: host:port at which process 0 listens; the host [::] stands for all of its addresses.
      patience: seconds to wait silently.
      timeout: seconds after which it stops waiting.

    Raises:
      UsageError: if process 0 can't listen there or refuses this process, or a process is still missing after the
        timeout.
    """
    waiting = _Waiting(patience, timeout)
    if number == 0:
        _receive(address, count, listen_at, waiting)
    else:
        _join(address, count, number, waiting)


class _Waiting:
    """Prints what a process waits for, after a while and whenever that changes, and gives up in the end."""

    def __init__(self, patience: float, timeout: float) -> None:
        self.patience, self._timeout = patience, timeout
        self._begun = time.monotonic()
        self._due, self._printed = self._begun + patience, ""

    @property
    def seconds_left(self) -> float:
        return max(0.1, self._begun + self._timeout - time.monotonic())

    def on(self, what: str) -> None:
        now = time.monotonic()
        if now > self._begun + self._timeout:
            raise UsageError(f"after {self._timeout:g} seconds {what}: start every process of the run, or {_ALONE}.")
        if now > self._due and what != self._printed:
            print(f"{what}; {_ALONE}.", file=sys.stderr, flush=True)
            self._due, self._printed = now + self.patience, what


def _receive(address: str, count: int, listen_at: str, waiting: _Waiting) -> None:
    """Receive the other processes: the part of process 0."""
    try:
        listener = _listen(*host_and_port(listen_at))
    except OSError as error:
        reason, *_ = str(error.strerror).split(" (while attempting")  # Python appends the address.
        raise UsageError(
            f"process 0 can't listen at {listen_at} ({reason}):"
            " name a free port of its machine in LSGD_COORDINATOR or, in a cluster, in JAX_COORDINATOR_PORT."
        ) from None
    joined: dict[int, socket.socket] = {}
    with ExitStack() as connections:
        connections.enter_context(listener)
        listener.settimeout(0.2)
        while len(joined) < count - 1:
            with suppress(TimeoutError):
                connection = connections.enter_context(listener.accept()[0])
                if (number := _welcome(connection, count, joined)) is not None:
                    joined[number] = connection
            joined = {number: connection for number, connection in joined.items() if _is_open(connection)}
            missing = [number for number in range(1, count) if number not in joined]
            if missing:
                waiting.on(f"process 0 of {count} waits at {address} for {_processes(missing)}")
        for connection in joined.values():
            with suppress(OSError):  # It may have ended just now, as it may at any later time.
                _send(connection, _ALL_JOINED)


def _listen(host: str, port: int) -> socket.socket:
    if host == "::":  # And on all IPv4 addresses, as JAX does.
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=both)
    return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)


def _welcome(connection: socket.socket, count: int, joined: Container[int]) -> int | None:
    """The number of a process that joins; None if it is refused or not one of ours, and its connection closed."""
    with suppress(OSError):
        connection.settimeout(1)
        if match := re.fullmatch(r"lsgd process (\d+) of (\d+)", _receive_line(connection)):
            number, of = map(int, match.groups())
            if of != count:
                why = f"process 0 is one of {count} processes, process {number} one of {of}: tell all the same number."
            elif number in joined or number not in range(1, count):
                why = f"there is no place for another process {number} of {count}: give each process its own number."
            else:
                _send(connection, _JOINED)
                return number
            _send(connection, _REFUSED + why)
    connection.close()
    return None


def _is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.settimeout(1)


def _join(address: str, count: int, number: int, waiting: _Waiting) -> None:
    """Join process 0: the part of the other processes."""
    while True:
        try:
            with socket.create_connection(host_and_port(address), timeout=waiting.patience / 2) as connection:
                _send(connection, f"lsgd process {number} of {count}")
                answer = _receive_line(connection)
                if answer.startswith(_REFUSED):
                    raise UsageError(answer.removeprefix(_REFUSED))
                if answer == _JOINED:
                    connection.settimeout(waiting.seconds_left)
                    if _receive_line(connection) == _ALL_JOINED:
                        return
            problem = "it has ended" if answer == _JOINED else "something else answers there"
        except OSError as error:
            problem = error.strerror or str(error)
        waiting.on(f"process {number} of {count} finds no process 0 at {address} ({problem})")
        time.sleep(0.1)


def _send(connection: socket.socket, line: str) -> None:
    connection.sendall(line.encode() + b"\n")


def _receive_line(connection: socket.socket) -> str:
    """A line without its end, at most 200 bytes, since anyone may have sent it."""
    line = bytearray()
    while len(line) < 200 and (byte := connection.recv(1)) not in (b"", b"\n"):
        line += byte
    return line.decode(errors="replace")


def _processes(numbers: list[int]) -> str:
    """Like "process 3" or "processes 1, 2 and 3"."""
    names = [str(number) for number in numbers]
    if len(names) > 10:
        names[9:] = [f"{len(names) - 9} others"]
    *first, last = names
    return f"processes {', '.join(first)} and {last}" if first else f"process {last}"
