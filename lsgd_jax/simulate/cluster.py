"""Simulated cluster: durations of steps, costs of messages, and absences of workers.

Virtual time counts integer nanoseconds, so that sums of times do not depend on their order.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from lsgd_jax.config import Config
from lsgd_jax.costs.collectives import Collective
from lsgd_jax.costs.ledger import exchanges, share_bytes
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS, Level

SECOND = 1_000_000_000
"""Nanoseconds per second of virtual time."""
LATEST = 1_000_000_000 * SECOND
"""End of virtual time, about 32 years, so that sums of a few times fit into 64 bits."""
_BLOCK = 8192
"""Number of values that fit into a processor's cache."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Machines and links of a simulation. Times are in seconds, bandwidths in bits per second.

    If workers have several chips each, a link is that of a chip.
    """

    step_seconds: float = 0.1
    """Duration of a local step at full speed, in seconds."""
    slow: tuple[tuple[int, float], ...] = ()
    """Stragglers as pairs of worker and slowdown factor: 0 10 runs the first worker at a tenth of the speed."""
    variation: Literal["none", "lognormal", "pareto"] = "none"
    """Distribution of the random slowdown factor: none, lognormal with median 1, or Pareto (at least 1, heavy-tailed).
    Without variation, steps of fast and slow workers end at the same instants, which real ones never do, so joined
    exchanges wait less than they would in practice."""
    varies_by: Literal["step", "worker"] = "step"
    """Whether the factor is sampled for every step or once per worker."""
    sigma: float = 0.3
    """Standard deviation of the logarithm of the lognormal factor."""
    tail: float = 2.0
    """Tail exponent: the Pareto factor exceeds f with probability f^-tail."""
    pause_every: int | None = None
    """Steps between pauses of a worker, as for garbage collection; workers pause at different steps."""
    pause_seconds: float = 1.0
    """Duration of a pause, in seconds."""
    trace: Path | None = None
    """Text file of step durations in seconds, in place of step_seconds: one line per step, one column per worker,
    separated by blanks or commas; lines and columns repeat cyclically."""
    local_bandwidth: float = 10e9
    """Bandwidth of each worker's link within its group, in bits per second."""
    local_latency: float = 10e-6
    """Latency of a message within a group, in seconds."""
    global_bandwidth: float = 1e9
    """Bandwidth of each worker's link to other groups, in bits per second; unused with one group."""
    global_latency: float = 100e-6
    """Latency of a message between groups, in seconds."""
    servers: int = 1
    """Servers that jointly hold the center variable or the board, each with a link like a worker's."""
    absences: tuple[tuple[int, float, float], ...] = ()
    """Absences as triples of worker, start and end in seconds (inf: for good). Who is absent from 0 on joins late."""

    def __post_init__(self) -> None:
        """Check the ranges of all fields."""
        for name in ("step_seconds", "pause_seconds", "tail"):
            self._check(name, 0 < getattr(self, name) < math.inf, "positive")
        for name in ("local_bandwidth", "global_bandwidth"):
            self._check(name, getattr(self, name) > 0, "positive")
        for name in ("local_latency", "global_latency", "sigma"):
            self._check(name, 0 <= getattr(self, name) < math.inf, "at least 0")
        self._check("slow", all(worker >= 0 and 0 < by < math.inf for worker, by in self.slow), "workers and factors")
        every = self.pause_every
        self._check("pause_every", every is None or 1 <= every < 2**63, "at least 1 and below 2^63")
        self._check("servers", self.servers >= 1, "at least 1")
        in_order = all(worker >= 0 and 0 <= start < end for worker, start, end in self.absences)
        self._check("absences", in_order, "workers, each with a start and a later end of its absence")

    def _check(self, name: str, right: bool, demand: str) -> None:
        if not right:
            raise ValueError(f"{name} must be {demand}, got {getattr(self, name)}.")


class StepTimes:
    """Durations of steps, as a pure function of the seed, the worker and the step number.

    Example:
      >>> times = StepTimes(Cluster(slow=((1, 10.0),)), workers=2, seed=0)
      >>> print(times(np.arange(2), np.array([0, 0])))
      [ 100000000 1000000000]
    """

    def __init__(self, cluster: Cluster, workers: int, seed: int) -> None:
        """Read the trace, if there is one.

        Args:
          cluster: cluster that the workers run on.
          workers: number of workers in all groups.
          seed: random seed.

        Raises:
          UsageError: if the trace can't be read, or the cluster refers to a worker that does not exist.
        """
        named = [worker for worker, *_ in (*cluster.slow, *cluster.absences)]
        if named and max(named) >= workers:
            raise UsageError(f"there is no worker {max(named)}: workers are numbered from 0 to {workers - 1}.")
        self._cluster = cluster
        self._seed = np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]
        self._usual = np.array([[cluster.step_seconds]]) if cluster.trace is None else _read_trace(cluster.trace)
        self._slower = np.ones(workers)
        for worker, by in cluster.slow:
            self._slower[worker] *= by
        self._pauses_at = (np.arange(workers) * 2_654_435_761) % (cluster.pause_every or 1)  # Spread out.

    def __call__(self, workers: Int[np.ndarray, " n"], steps: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Return the durations of these steps (counted from 0) of these workers, in nanoseconds from 1 to `LATEST`."""
        times = np.empty(len(workers), np.int64)
        for first in range(0, len(workers), _BLOCK):
            block = slice(first, first + _BLOCK)
            with np.errstate(over="ignore", invalid="ignore"):
                times[block] = self._block_times(workers[block], steps[block])
        return times

    def _block_times(self, workers: np.ndarray, steps: np.ndarray) -> np.ndarray:
        cluster, (rows, columns) = self._cluster, self._usual.shape
        if rows == columns == 1:
            seconds = self._usual[0, 0] * self._slower[workers]
        else:
            seconds = self._usual[steps % rows, workers % columns] * self._slower[workers]
        if cluster.variation != "none":
            uniform = self._uniform(workers, steps if cluster.varies_by == "step" else np.zeros_like(steps))
            if cluster.variation == "lognormal":
                from scipy.special import ndtri  # Slow to import, and the command line imports this module.

                seconds *= np.exp(cluster.sigma * ndtri(uniform))
            else:
                seconds *= uniform ** (-1 / cluster.tail)
        if cluster.pause_every is not None:
            seconds += cluster.pause_seconds * (steps % cluster.pause_every == self._pauses_at[workers])
        return np.maximum(np.fmin(np.rint(seconds * SECOND), LATEST), 1)  # NaN becomes `LATEST`.

    def _uniform(self, workers: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Random number in (0, 1) per worker and step: a SplitMix64 hash of both, which allows random access."""
        bits = workers.astype(np.uint64) << np.uint64(40)
        bits += steps.astype(np.uint64)
        bits *= np.uint64(0x9E3779B97F4A7C15)
        bits += self._seed
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits ^= bits >> np.uint64(shift)
            bits *= np.uint64(factor)
        bits ^= bits >> np.uint64(31)
        return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def check_time(now: int, cluster: Cluster) -> None:
    """Raise UsageError if virtual time has reached its end."""
    if now < LATEST:
        return
    lower = ["steps", "step_seconds" if cluster.trace is None else "the seconds in the trace"]
    others = {"slow": cluster.slow, "sigma": cluster.variation == "lognormal", "pause_seconds": cluster.pause_every}
    lower += [name for name, is_used in (others | {"absences": cluster.absences}).items() if is_used]
    raise UsageError(
        f"the workers are not done after {LATEST / SECOND:g} seconds of virtual time, where a simulation ends: lower"
        f" {', '.join(lower[:-1])} or {lower[-1]}{', or raise tail' if cluster.variation == 'pareto' else ''}."
    )


def _read_trace(path: Path) -> np.ndarray:
    try:
        lines = [line.replace(",", " ").split() for line in path.read_text().splitlines() if line.strip()]
        seconds = np.array(lines, float)
    except OSError as error:
        raise UsageError(f"the trace {path} can't be read ({error.strerror}): name another.") from None
    except ValueError:
        seconds = np.empty(0)
    if seconds.ndim != 2 or not np.all((seconds > 0) & np.isfinite(seconds)):
        raise UsageError(f"the trace {path} must have the same number of positive durations in every line.")
    return seconds


class ExchangeCost(NamedTuple):
    """Cost of an exchange per participating worker, waiting excluded."""

    nanoseconds: int
    """Duration of the exchange."""
    bytes_sent: float
    """Bytes sent by the worker."""
    occupies: int = 0
    """Nanoseconds for which the exchange occupies the servers."""


def levels(config: Config, *, in_step: bool) -> list[Level]:
    """Levels of exchanges, groups first; if parameters are streamed, with the period of fragments.

    Args:
      config: configuration of the workers.
      in_step: whether workers wait for each other by their own count of steps.

    Raises:
      UsageError: if this way to stream is not simulated.
    """
    fragments, overlap = config.options.get("fragments", 1), config.options.get("overlap", 0)
    if overlap:
        raise UsageError(f"overlap is not simulated: leave it out, got {overlap}.")
    if fragments > 1 and not in_step:
        simulated = "lsgd, local_sgd, diloco and quorum"
        raise UsageError(f"fragments are simulated for {simulated}: leave out fragments or the other methods.")
    if config.period % fragments:
        raise UsageError(f"fragments must divide the period, {config.period}, in a simulation, got {fragments}.")
    return [level._replace(period=level.period // fragments) for level in config.levels]


def collective_costs(config: Config, cluster: Cluster, params: Any) -> list[ExchangeCost]:
    r"""Costs of synchronous exchanges by level, groups first, from `lsgd_jax.costs.ledger`.

    Fragments of streamed parameters cost what the average one costs.

    An all-reduce of S bytes among n workers takes :math:`2 \lceil \log_2 n \rceil` sequential messages and sends
    :math:`2 (n - 1) / n \, S` bytes over each worker's link (recursive halving and doubling); scattering and gathering
    take half of both. In a ring or a chain, each hop is a message. Traffic across groups is limited by the links
    between groups.

    Args:
      config: configuration of the workers.
      cluster: cluster that they run on.
      params: parameters of one worker, or their shapes and dtypes.

    Raises:
      UsageError: if an exchange takes longer than virtual time lasts.
    """
    costs, fragments, found = [], config.options.get("fragments", 1), exchanges(config, params)
    for i, (among, *_) in enumerate(config.levels):
        crosses, of_level = among > config.workers, found[i * fragments : (i + 1) * fragments]
        collectives = [each for exchange in of_level for each in exchange.collectives]
        seconds = sum(_collective_seconds(each, cluster, crosses) for each in collectives) / fragments
        _check_seconds("an exchange", seconds, *(["local", "global"] if crosses else ["local"]))
        bytes_sent = sum(exchange.bytes_sent for exchange in of_level) / fragments
        costs.append(ExchangeCost(round(seconds * SECOND), bytes_sent))
    return costs


def server_costs(config: Config, cluster: Cluster, params: Any) -> list[ExchangeCost]:
    """Costs of an exchange with the center variable or the board; for LSGD in groups, without and with a global pull.

    A worker sends its parameters (and, for a board, its score) and simultaneously receives as many, or twice as many
    if it is also pulled to a global leader. Each exchange is divided evenly among the servers, which serve one worker
    after another.

    Args:
      config: configuration of the workers.
      cluster: cluster that they run on.
      params: parameters of one worker, or their shapes and dtypes.

    Raises:
      UsageError: if serving each worker once takes longer than virtual time lasts.
    """
    bandwidth, latency = _link(cluster, crosses=config.groups > 1)
    size = share_bytes(config, params)
    sent = size + (4 if METHODS[config.method].elects else 0)
    costs = []
    for received in range(1, len(config.levels) + 1):
        seconds = 8 * max(sent, received * size) / bandwidth
        total_seconds = config.groups * config.workers * seconds + latency
        _check_seconds("serving each worker once", total_seconds, "global" if config.groups > 1 else "local")
        whole = ExchangeCost(round((seconds + latency) * SECOND), sent, round(seconds / cluster.servers * SECOND))
        costs.append(whole)
    return costs


def request_nanoseconds(config: Config, cluster: Cluster) -> int:
    """Duration of a request to a server, in nanoseconds.

    Raises:
      UsageError: if it is longer than virtual time lasts.
    """
    _, latency = _link(cluster, crosses=config.groups > 1)
    _check_seconds("a message", latency, "global" if config.groups > 1 else "local")
    return round(latency * SECOND)


def fetch_nanoseconds(config: Config, cluster: Cluster, params: Any) -> int:
    """Duration of fetching the initial parameters when a worker joins, in nanoseconds.

    Raises:
      UsageError: if it is longer than virtual time lasts.
    """
    bandwidth, latency = _link(cluster, crosses=config.groups > 1)
    size = share_bytes(config, params)
    seconds = 2 * latency + 8 * size / bandwidth
    _check_seconds("fetching the parameters", seconds, "global" if config.groups > 1 else "local")
    return round(seconds * SECOND)


def _check_seconds(what: str, seconds: float, *links: str) -> None:
    if not seconds * SECOND < LATEST:  # Also if it is NaN.
        bandwidths, latencies = (" or ".join(f"{link}_{of}" for link in links) for of in ("bandwidth", "latency"))
        raise UsageError(
            f"{what} takes {seconds:.3g} seconds, but must take less than the {LATEST / SECOND:g} of virtual time:"
            f" raise {bandwidths} or lower {latencies}."
        )


def _link(cluster: Cluster, *, crosses: bool) -> tuple[float, float]:
    """Return the bandwidth and latency within groups or between them."""
    if crosses:
        return cluster.global_bandwidth, cluster.global_latency
    return cluster.local_bandwidth, cluster.local_latency


def _collective_seconds(collective: Collective, cluster: Cluster, crosses: bool) -> float:
    doublings = math.ceil(math.log2(collective.group_size)) if collective.group_size > 1 else 0
    messages = {"all-reduce": 2 * doublings, "collective-permute": 1}.get(collective.kind, doublings)
    # Only hierarchical broadcasts scatter and gather, and they do so within groups.
    crosses = crosses and collective.kind in ("all-reduce", "collective-permute")
    bandwidth, latency = _link(cluster, crosses=crosses)
    sent = collective.bytes if collective.kind == "collective-permute" else collective.sent
    return (collective.times or 0) * (messages * latency + 8 * sent / bandwidth)
