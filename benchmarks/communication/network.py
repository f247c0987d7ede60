"""Processes as hosts of their own: network namespaces that are joined by links of a limited rate.

Every host has one link to a bridge, which is the limit in both directions, its own address and its own counters. Linux,
iproute2 and root are needed.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lsgd_jax.distributed import COORDINATOR, PROCESS, PROCESSES

PORT = 12345
"""Of the coordinator, in the first host."""
_ENTER = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'


class Hosts:
    """Hosts that are there as long as `hosts` is open."""

    def __init__(self, count: int, folder: Path) -> None:
        """Use `hosts`."""
        self._count, self._folder = count, folder

    def run(self, command: Sequence[str], *, output: IO[str] | None = None, seconds: float = 3600) -> None:
        """Run a command as a process on every host; they find each other by `lsgd_jax.distributed.initialize`.

        Args:
          command: the program and its arguments.
          output: where all that is printed goes; None: nowhere.
          seconds: after which all are killed.

        Raises:
          subprocess.CalledProcessError: if one ends with another code than 0.
          subprocess.TimeoutExpired: if the time is over.
        """
        environment = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | os.environ
        environment |= {COORDINATOR: f"{_address(0)}:{PORT}", PROCESSES: str(self._count)}
        started: list[subprocess.Popen] = []
        try:
            for number in range(self._count):
                names = self._folder / str(number)
                names.write_text(f"127.0.0.1 localhost\n{_address(number)} {_host(number)}\n")
                enter = ["ip", "netns", "exec", _host(number), "unshare", "--mount", "--uts", "sh", "-c", _ENTER]
                process = subprocess.Popen(
                    [*enter, "sh", _host(number), str(names), *command],
                    env=environment | {PROCESS: str(number)},
                    stdout=output or subprocess.DEVNULL,
                    stderr=subprocess.STDOUT if output else subprocess.DEVNULL,
                    start_new_session=True,
                )
                started.append(process)
            for process in started:
                if process.wait(seconds) != 0:
                    raise subprocess.CalledProcessError(process.returncode, command)
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@contextmanager
def hosts(count: int, megabits: float) -> Iterator[Hosts]:
    """So many hosts, each with a link of so many Mbit/s; exits with one sentence where that can't be made."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc", "unshare"))):
        sys.exit("links of a limited rate need root, and ip, tc and unshare of iproute2 and util-linux.")
    try:
        _run("ip link add lsgd type bridge")
        _run("ip link set lsgd up")
        for number in range(count):
            name, outer = _host(number), f"lsgd-{number}"
            _run(f"ip netns add {name}")
            _run(f"ip link add {outer} type veth peer name eth0 netns {name}")
            _run(f"ip link set {outer} master lsgd up")
            _run(f"ip -n {name} address add {_address(number)}/24 dev eth0")
            _run(f"ip -n {name} link set lo up")
            _run(f"ip -n {name} link set eth0 up")
            limit = f"root tbf rate {megabits}mbit burst 128kb latency 400ms"
            _run(f"tc qdisc add dev {outer} {limit}")
            _run(f"tc -n {name} qdisc add dev eth0 {limit}")
        with tempfile.TemporaryDirectory() as folder:
            yield Hosts(count, Path(folder))
    finally:
        for number in range(count):  # Links first: the kernel would take its time to end those of a host that is gone.
            _run(f"ip link del lsgd-{number}", check=False)
            _run(f"ip netns del {_host(number)}", check=False)
        _run("ip link del lsgd", check=False)


def bytes_out() -> int:
    """What the kernel has counted on this host's link so far, with all headers."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[8])
    raise RuntimeError("this process is on no host of `hosts`.")


def _host(number: int) -> str:
    return f"lsgd{number}"


def _address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def _run(command: str, *, check: bool = True) -> None:
    subprocess.run(command.split(), check=check, capture_output=True)
