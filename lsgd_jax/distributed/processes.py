"""The processes of a run: how they connect, communicate and fail together."""

import ipaddress
import itertools
import json
import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax._src.clusters import ClusterEnv
from jax._src.distributed import global_state  # The public functions initialize the devices, whose number is set first.
from jax._src.lib import _jax
from jax._src.xla_bridge import make_cpu_client
from jax.experimental import multihost_utils
from jax.extend.backend import register_backend_factory

from lsgd_jax.distributed.meeting import host_and_port, meet
from lsgd_jax.errors import AgreedError, UsageError

COORDINATOR, PROCESSES, PROCESS = "LSGD_COORDINATOR", "LSGD_PROCESSES", "LSGD_PROCESS"
"""Environment variables: the address of process 0 (host:port), the number of processes, and this process's number."""
MOST_SIMULATED = 512
"""Maximum number of devices simulated on one host: each takes threads and its own part of every program."""
LAUNCHER = "LSGD_LAUNCHER"
"""Environment variable with the number of a pipe that is closed when `lsgd launch` ends, however it ends."""
JOIN_TIMEOUT, HEARTBEAT = "LSGD_JOIN_TIMEOUT", "LSGD_HEARTBEAT"
"""Environment variables with seconds: after the first, processes stop waiting for those that are missing at the start;
after the second without a heartbeat a process counts as dead, and all others end."""
_DEFAULTS = {JOIN_TIMEOUT: 300, HEARTBEAT: 100}
_JAX_ADDRESS, _JAX_LISTENS_AT = "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS"
"""JAX's environment variables: the address of process 0 in a cluster, and the address at which it listens."""


def initialize(processes: int | None = None) -> None:
    """Connect this process with the others of its run, if there are any; call it before JAX is used.

    There are others if the environment has `COORDINATOR`, `PROCESSES` and `PROCESS`, as set by `lsgd launch`, or if JAX
    detects a cluster: a TPU pod, a SLURM or Open MPI job, Kubernetes. `PROCESSES` may be set to 1 alone: then this
    process runs alone, whatever JAX would detect. Missing processes are named on standard error.
    `JOIN_TIMEOUT` and `HEARTBEAT` may be set, too.

    Args:
      processes: value for `PROCESSES`; None: that of the environment, or what JAX detects.

    Raises:
      UsageError: if some of the environment variables are missing or wrong, or the processes can't meet.
    """
    if LAUNCHER in os.environ:
        _end_with_launcher(os.environ[LAUNCHER])
    # It would take every SIGTERM; `lsgd_jax.distributed.interruption` stops runs.
    jax.config.update("jax_enable_preemption_service", False)
    join_timeout, heartbeat = _seconds(JOIN_TIMEOUT), _seconds(HEARTBEAT)
    place = _place(processes, join_timeout)
    if place.processes == 1:
        return
    # The launcher's processes start together, but slowly where they share few cores.
    patience = 10 if LAUNCHER in os.environ else 5
    meet(place.address, place.processes, place.process, place.listens_at, patience, join_timeout)
    try:
        jax.distributed.initialize(
            place.address,
            place.processes,
            place.process,
            cluster_detection_method=None if place.is_detected else "deactivate",  # Also detects local devices.
            initialization_timeout=join_timeout,
            heartbeat_timeout_seconds=heartbeat,
            coordinator_bind_address=place.listens_at,
        )
    except ValueError as error:
        raise UsageError(f"JAX can't connect process {place.process} with the others: {error}.") from None
    host, _ = host_and_port(place.address)
    if (ip := _ip_address(host)) is not None and ip.is_loopback:
        _keep_collectives_on_loopback()


def posted_place(processes: int | None = None) -> tuple[int, int]:
    """The number of this process and that of all processes of a posted run, without connecting them.

    The environment says it as for `initialize`, but for `COORDINATOR`, which is not needed.

    Args:
      processes: value for `PROCESSES`; None: that of the environment, or what JAX detects.

    Raises:
      UsageError: if some of the environment variables are missing or wrong.
    """
    if LAUNCHER in os.environ:
        _end_with_launcher(os.environ[LAUNCHER])
    place = _place(processes, _seconds(JOIN_TIMEOUT), needs_address=False)
    return place.process, place.processes


class _Place(NamedTuple):
    """A process's place among the processes of its run."""

    address: str
    """Address of process 0, host:port."""
    processes: int
    process: int
    listens_at: str
    """Address at which process 0 listens, host:port; the host [::] stands for all of its addresses."""
    is_detected: bool


def _place(processes: int | None, join_timeout: int, *, needs_address: bool = True) -> _Place:
    """The place according to the environment variables, or else in the cluster that JAX detects."""
    address, count, number = (os.environ.get(name, "") for name in (COORDINATOR, PROCESSES, PROCESS))
    if processes is not None:
        if count not in ("", str(processes)):
            raise UsageError(f"--processes {processes} contradicts {PROCESSES}={count}: leave out one of them.")
        count = str(processes)
    if count == "1" and number in ("", "0"):
        return _Place("", 1, 0, "", is_detected=False)
    if not needs_address:
        address = address or "127.0.0.1:1"
    named = count or number or (address and needs_address)
    return _named_place(address, count, number) if named else _detected_place(join_timeout)


def _named_place(address: str, count: str, number: str) -> _Place:
    """The place according to the environment variables."""
    try:
        host, port = host_and_port(address)
    except ValueError:
        host, port = "", 0
    if not (host and count.isdecimal() and number.isdecimal() and int(number) < int(count)):
        raise UsageError(
            f"{COORDINATOR}, {PROCESSES} and {PROCESS} must be host:port, a number and a lower number,"
            f" got {address!r}, {count!r} and {number!r}."
        )
    # A host often resolves its own name to another address than other hosts do, so it listens at all addresses.
    listens_at = _listens_at(address if _ip_address(host) else f"[::]:{port}")
    return _Place(address, int(count), int(number), listens_at, is_detected=False)


def _detected_place(timeout: int) -> _Place:
    """The place in the cluster that JAX detects; outside a cluster, that of a single process."""
    try:
        address, count, number, _ = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get(_JAX_ADDRESS) or None, None, None, None, None, timeout
        )
        if address is None:
            return _Place("", 1, 0, "", is_detected=True)
        _, port = host_and_port(address)
    except (KeyError, ValueError) as error:
        raise UsageError(f"JAX can't tell this process's place in its cluster: {error}.") from None
    if count is None or number is None:
        raise UsageError(
            f"{_JAX_ADDRESS} is set, but JAX detects no cluster: set {COORDINATOR}, {PROCESSES} and {PROCESS} instead."
        )
    return _Place(address, count, number, _listens_at(f"[::]:{port}"), is_detected=True)


def _seconds(name: str) -> int:
    """The value of an environment variable, or its default."""
    value = os.environ.get(name) or str(_DEFAULTS[name])
    if not (value.isdecimal() and 1 <= int(value) < 2**31):
        raise UsageError(f"{name} must be a whole number of seconds, at least 1, got {value!r}.")
    return int(value)


def _listens_at(default: str) -> str:
    """The address at which process 0 listens, unless JAX's own variable gives another."""
    address = os.environ.get(_JAX_LISTENS_AT) or default
    try:
        host_and_port(address)
    except ValueError as error:
        raise UsageError(f"{_JAX_LISTENS_AT}: {error}.") from None
    return address


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """A host's IP address if it is given as one or as localhost; None for other names."""
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        return None


def _keep_collectives_on_loopback() -> None:
    """Let CPU collectives use loopback; by default Gloo listens at the address of the machine's name."""

    def make_client() -> Any:
        return make_cpu_client(_jax.make_gloo_tcp_collectives(global_state.client, hostname="127.0.0.1"))

    if jax.config.jax_cpu_collectives_implementation == "gloo":  # type: ignore[attr-defined]
        register_backend_factory("cpu", make_client, fail_quietly=False)


def _end_with_launcher(pipe_number: str) -> None:
    """Kill this process and its children when the launcher ends."""
    try:
        pipe = int(pipe_number)
        is_pipe = stat.S_ISFIFO(os.fstat(pipe).st_mode)
    except (ValueError, OverflowError, OSError):
        is_pipe = False
    if not is_pipe:
        raise UsageError(f"{LAUNCHER} is for lsgd launch to set, to a pipe's number, got {pipe_number!r}: unset it.")

    def watch() -> None:
        os.read(pipe, 1)  # Nothing is ever written: it returns when the other end is closed.
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def process_count() -> int:
    """Number of processes of this run."""
    return global_state.num_processes


def process_index() -> int:
    """Number of this process; process 0 writes and prints."""
    return global_state.process_id


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise the `UsageError` of one process in all of them; otherwise they would wait for it forever.

    Raises:
      UsageError: unchanged, in a run of one process.
      AgreedError: with several processes, with the message of the first one that failed.
    """
    message = ""
    try:
        yield
    except UsageError as error:
        if process_count() == 1:
            raise
        message = str(error)
    if any(messages := of_all_processes(message)):
        raise AgreedError(next(filter(None, messages)))


def from_process_zero(value: float) -> float:
    """The value of process 0, in all processes; in single precision if there are several."""
    return float(multihost_utils.broadcast_one_to_all(np.float32(value))) if process_count() > 1 else value


def of_all_processes(value: Any) -> list[Any]:
    """The values of all processes, in order, in each of them; all must call it, with any value that fits in JSON."""
    if process_count() == 1:
        return [value]
    own = np.frombuffer(json.dumps(value).encode(), np.uint8)
    most = int(np.max(multihost_utils.process_allgather(np.int32(len(own)))))
    padded = np.full(1 << most.bit_length(), ord(" "), np.uint8)  # Round up: a program is compiled per size.
    padded[: len(own)] = own
    return [json.loads(bytes(of_one)) for of_one in multihost_utils.process_allgather(padded)]


def to_first_process(name: str, message: str) -> list[str]:
    """Send a message to process 0; for threads, whose collectives would interleave with those of training.

    Args:
      name: of the messages: the same in all processes, and unique.
      message: any text.

    Returns:
      In process 0 the messages of all processes, in order, once all have arrived; in other processes, none.
    """
    if process_count() == 1:
        return [message]
    client = global_state.client
    assert client is not None  # Where there are several processes, they are connected.
    names = [f"lsgd_jax/{name}/{process}" for process in range(process_count())]
    client.key_value_set(names[process_index()], json.dumps(message))
    if process_index() > 0:
        return []
    forever = 2**31 - 1  # In milliseconds; JAX ends the process if another one dies.
    messages = [json.loads(client.blocking_key_value_get(of_one, forever)) for of_one in names]
    for of_one in names:
        client.key_value_delete(of_one)
    return messages


class StepCount:
    """Count of the local steps of all workers in all processes; all processes create theirs in the same order."""

    _numbers = itertools.count()

    def __init__(self) -> None:
        self._name = f"lsgd_jax/steps/{next(self._numbers)}"
        self.total = 0
        """The count as far as this process knows: current in one process; with several, as of its last `add`."""
        self._lock = threading.Lock()

    def add(self) -> int:
        """Count one step; returns the total. With several processes this costs a round trip to process 0."""
        if process_count() > 1:
            assert global_state.client is not None  # Where there are several processes, they are connected.
            total = global_state.client.key_value_increment(self._name, 1)
            with self._lock:  # Replies to two threads may arrive out of order.
                self.total = max(self.total, total)
        else:
            with self._lock:
                self.total = total = self.total + 1
        return total


def simulate_devices(count: int) -> None:
    """Simulate this many devices on the CPUs of all processes, unless the environment sets their number.

    Call it before JAX is used: the number is fixed once JAX has initialized its devices. GPUs and TPUs are unaffected.

    Raises:
      UsageError: if there would be more than `MOST_SIMULATED` per process.
    """
    if "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    if "JAX_NUM_CPU_DEVICES" not in os.environ:
        of_process = -(-count // process_count())
        if of_process > MOST_SIMULATED:
            raise AgreedError(
                f"a process simulates at most {MOST_SIMULATED} devices, one for each chip of a worker, got {of_process}"
                " chips: lower groups, workers or chips_per_worker, or set JAX_NUM_CPU_DEVICES to let workers share"
                " devices."
            )
        jax.config.update("jax_num_cpu_devices", of_process)
