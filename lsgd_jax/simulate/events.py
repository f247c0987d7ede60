"""Event-driven simulation of the methods in virtual time: steps, waiting and exchanges.

The timing of events does not depend on what the workers learn, so the event log is computed first, and training
(`lsgd_jax.simulate.training`) replays it. Schedules differ in two respects:

- When is an exchange due? By a worker's own count, `period` steps after its last exchange; or by the global count, when
  the total number of steps reaches the next multiple of workers * `period` (Algorithm 1).
- Who waits? All participants, for the last of them; or each only for a server, which holds the center variable or the
  board and serves one worker after another.

A worker checks at the end of a step whether an exchange is due; all events of one instant take effect before any check.
Counting takes no time. An exchange covers all exchanges that were due before it begins.
"""

import dataclasses
import heapq
from collections import Counter
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from lsgd_jax.config import Config
from lsgd_jax.simulate.cluster import (
    LATEST,
    SECOND,
    Cluster,
    StepTimes,
    check_time,
    collective_costs,
    fetch_nanoseconds,
    levels,
    request_nanoseconds,
    server_costs,
)


class Schedule(NamedTuple):
    """When the workers of a method exchange, and whom they wait for."""

    method: str
    """Name in `lsgd_jax.methods.METHODS`."""
    counts: Literal["own", "all"]
    """Whose steps determine when an exchange is due: each worker's own, or those of all."""
    waits: Literal["together", "server"]
    """Whether participants wait for each other, or each for a server."""


SCHEDULES: dict[str, Schedule] = {
    "lsgd": Schedule("lsgd", "own", "together"),
    "lsgd-joined": Schedule("lsgd", "all", "together"),
    "lsgd-posted": Schedule("lsgd", "all", "server"),
    "easgd": Schedule("easgd", "own", "server"),
    "downpour": Schedule("downpour", "own", "server"),
    "local_sgd": Schedule("local_sgd", "own", "together"),
    "diloco": Schedule("diloco", "own", "together"),
    "quorum": Schedule("quorum", "own", "together"),
    "data_parallel": Schedule("data_parallel", "own", "together"),
}
"""Schedules by name. LSGD has three: synchronous; joined, where all workers exchange at the end of their current step;
and posted, where each worker posts its score and parameters to a board and is pulled to the best ones posted there."""


class Event(NamedTuple):
    """Event of a simulation; times are nanoseconds of virtual time."""

    time: int
    """When the event takes effect: the end of a step, or the start of an exchange after waiting."""
    kind: Literal["step", "exchange", "leave", "join"]
    workers: tuple[int, ...]
    """Participating workers."""
    begun: tuple[int, ...]
    """Since when each worker has computed or waited; for a leaving worker, the start of the lost work."""
    end: int
    """When the workers continue."""
    level: int = 0
    """Level of an exchange: 0 in a group, or among all workers if there is one group; 1 among all groups. With a board,
    1 if there is also a global pull."""
    staleness: tuple[int, ...] = ()
    """For exchanges of level 0: steps that each worker's partners have taken since its last exchange, on average."""


class EventLog(NamedTuple):
    """Event log of a simulation, in the order of the events' effects."""

    workers: int
    end: int
    """Nanosecond at which the total number of steps reached workers * steps, or no worker was left."""
    events: list[Event]
    """Events that have begun by then; some last longer."""
    still_waiting: dict[int, int]
    """Workers that are waiting at the end, each with the start of its wait."""
    costs: tuple[float, ...]
    """Bytes sent per worker per exchange, by level."""


@dataclasses.dataclass(frozen=True)
class Totals:
    """Totals of a simulation over all workers."""

    workers: int
    nanoseconds: int
    """Duration in virtual time."""
    steps: int
    exchanges: tuple[int, ...]
    """Exchanges by level, counted once per participating worker."""
    bytes_sent: float
    waiting: int
    """Nanoseconds spent waiting for other workers or for a server."""
    exchanging: int
    """Nanoseconds spent sending and receiving."""
    away: int
    """Nanoseconds of absences, including lost steps."""
    staleness: dict[int, int]
    """Number of exchanges per value of staleness, as in `Event`."""

    @property
    def throughput(self) -> float:
        """Steps per second of all workers."""
        return self.steps * SECOND / self.nanoseconds

    @property
    def efficiency(self) -> float:
        """Share of the present workers' time spent computing."""
        present = self.workers * self.nanoseconds - self.away
        return 1 - (self.waiting + self.exchanging) / present

    @property
    def mean_staleness(self) -> float:
        """Mean staleness in steps; NaN without exchanges."""
        count = sum(self.staleness.values())
        return sum(steps * times for steps, times in self.staleness.items()) / count if count else float("nan")

    def summary(self) -> dict[str, Any]:
        """Return the numbers of a table, in seconds, bytes and shares."""
        time = self.workers * self.nanoseconds
        return {
            "workers": self.workers,
            "virtual_seconds": self.nanoseconds / SECOND,
            "steps": self.steps,
            "steps_per_second": self.throughput,
            "efficiency": self.efficiency,
            "waiting": self.waiting / time,
            "exchanging": self.exchanging / time,
            "away": self.away / time,
            "bytes_sent_per_worker": self.bytes_sent / self.workers,
            "mean_staleness": self.mean_staleness if self.staleness else None,
            "largest_staleness": max(self.staleness, default=None),
        }


def event_log(schedule: Schedule, config: Config, cluster: Cluster, params: Any) -> EventLog:
    """Simulate until the workers have taken `config.steps` steps each on average.

    The same arguments give the same log.

    Args:
      schedule: schedule of the method; the configuration's own method does not matter.
      config: configuration of the workers: their number, steps, periods, broadcast and seed.
      cluster: cluster that they run on.
      params: parameters of one worker, which are sent, or their shapes and dtypes.

    Raises:
      UsageError: if the cluster refers to workers that do not exist, its trace can't be read, or virtual time ends
        (`LATEST`) before the workers finish.

    Example:
      Two synchronous workers, the second at half speed: its 4 steps take 4 * 0.2 seconds.

      >>> from lsgd_jax.presets import PRESETS
      >>> config = dataclasses.replace(PRESETS["digits"], groups=1, workers=2, steps=4)
      >>> cluster = Cluster(slow=((1, 2.0),), local_latency=0.0)
      >>> log = event_log(SCHEDULES["lsgd"], config, cluster, np.zeros(10))
      >>> print(log.end / SECOND, log.events[-1].kind, log.events[-1].begun)
      0.8 exchange (400000000, 800000000)
    """
    return _Queue(schedule, config.replace(method=schedule.method), cluster, params).run()


def totals(log: EventLog) -> Totals:
    """Compute the totals of an event log; events that last beyond its end are cut off there."""
    exchanges, staleness = [0] * len(log.costs), Counter[int]()
    waiting = exchanging = away = steps = 0
    left_at: dict[int, int] = {}

    def within(start: int, end: int) -> int:
        return min(end, log.end) - min(start, log.end)

    for event in log.events:
        if event.kind == "step":
            steps += 1
        elif event.kind == "exchange":
            exchanges[event.level] += len(event.workers)
            staleness.update(event.staleness)
            waiting += sum(within(begun, event.time) for begun in event.begun)
            exchanging += len(event.workers) * within(event.time, event.end)
        elif event.kind == "leave":
            left_at[event.workers[0]] = event.begun[0]
        else:
            away += within(left_at.pop(event.workers[0]), event.time)
            exchanging += within(event.time, event.end)
    away += sum(within(since, log.end) for since in left_at.values())
    waiting += sum(within(since, log.end) for since in log.still_waiting.values())
    sent = sum(count * bytes_sent for count, bytes_sent in zip(exchanges, log.costs, strict=True))
    return Totals(
        workers=log.workers,
        nanoseconds=log.end,
        steps=steps,
        exchanges=tuple(exchanges),
        bytes_sent=sent,
        waiting=waiting,
        exchanging=exchanging,
        away=away,
        staleness=dict(sorted(staleness.items())),
    )


_STEP, _LEAVE, _JOIN = range(3)  # Order of events at the same instant.


class _Queue:
    """State of a simulation, and its queue of future events: ends of steps, and workers leaving or joining."""

    def __init__(self, schedule: Schedule, config: Config, cluster: Cluster, params: Any) -> None:
        self.schedule, self.cluster, self.workers = schedule, cluster, config.groups * config.workers
        in_step = schedule.counts == "own" and schedule.waits == "together"
        (self.group_size, self.period, _), *wider = levels(config, in_step=in_step)
        self.ratio = wider[0].period // self.period if wider else None
        self.target = self.workers * config.steps
        together = schedule.waits == "together"
        self.costs = (collective_costs if together else server_costs)(config, cluster, params)
        self.asking = request_nanoseconds(config, cluster)
        self.fetching = fetch_nanoseconds(config, cluster, params) if cluster.absences else 0
        self.step_times = StepTimes(cluster, self.workers, config.seed)

        self.queue: list[tuple[int, int, int, int]] = []  # Time, kind, worker, and number of the worker's plan.
        self.plans = [0] * self.workers  # Only the latest plan of a worker is valid.
        self.present = [True] * self.workers
        self.begun = [0] * self.workers  # Start of the current step, or of the one after an exchange.
        self.steps, self.since_exchange = [0] * self.workers, [0] * self.workers
        self.durations: list[list[int]] = [[] for _ in range(self.workers)]  # Of future steps, the next one last.
        self.started = [0] * self.workers
        self.settled = [0] * self.workers  # Number of the last exchange that was due.
        self.partners_steps = [0] * self.workers  # At the last exchange with a server.
        self.arrived: dict[int, int] = {}  # Workers waiting for their group, with since when.
        self.parked: dict[int, tuple[int, list[int]]] = {}  # Groups waiting for others: since when, and members.
        self.total, self.servers_free = 0, 0
        self.events: list[Event] = []
        for worker, start, end in cluster.absences:
            for seconds, what in ((start, _LEAVE), (end, _JOIN)):
                if seconds < float("inf"):
                    heapq.heappush(self.queue, (round(min(seconds * SECOND, LATEST)), what, worker, 0))

    def run(self) -> EventLog:
        for worker in range(self.workers):
            self.start(worker, 0)
        now = 0
        while self.queue and self.total < self.target:
            before, now, ended = now, self.queue[0][0], []
            assert now >= before  # Virtual time never runs back.
            check_time(now, self.cluster)
            while self.queue and self.queue[0][0] == now:
                _, what, worker, plan = heapq.heappop(self.queue)
                if what == _STEP and plan == self.plans[worker]:
                    self.end_step(worker, now)
                    ended.append(worker)
                elif what == _LEAVE and self.present[worker]:
                    self.leave(worker, now)
                elif what == _JOIN and not self.present[worker]:
                    self.join(worker, now)
            for worker in ended:
                if not self.present[worker]:
                    continue
                if not self.is_due(worker):
                    self.start(worker, now)
                elif self.schedule.waits == "server":
                    self.be_served(worker, now)
                else:
                    self.arrived[worker] = now
            for group in range(self.workers // self.group_size if self.arrived or self.parked else 0):
                self.exchange_in_group(group, now)
            self.exchange_globally(now)
        waiting = self.arrived | {worker: since for since, members in self.parked.values() for worker in members}
        rank = {"step": 0, "exchange": 1, "leave": 2, "join": 3}
        events = sorted(self.events, key=lambda event: (event.time, rank[event.kind]))
        return EventLog(self.workers, now, events, waiting, tuple(cost.bytes_sent for cost in self.costs))

    def start(self, worker: int, time: int) -> None:
        """Start a worker's next step at a time."""
        if not self.durations[worker]:
            coming = self.started[worker] + np.arange(64)
            self.durations[worker] = self.step_times(np.full(64, worker), coming)[::-1].tolist()
        self.started[worker] += 1
        self.begun[worker] = time
        self.plans[worker] += 1
        heapq.heappush(self.queue, (time + self.durations[worker].pop(), _STEP, worker, self.plans[worker]))

    def end_step(self, worker: int, now: int) -> None:
        self.steps[worker] += 1
        self.since_exchange[worker] += 1
        self.total += 1
        self.events.append(Event(now, "step", (worker,), (self.begun[worker],), now))
        self.begun[worker] = now

    def leave(self, worker: int, now: int) -> None:
        since = self.arrived.pop(worker, self.begun[worker])
        for group, (parked_since, members) in list(self.parked.items()):
            if worker in members:
                since = parked_since
                members.remove(worker)
                if not members:
                    del self.parked[group]
        self.present[worker] = False
        self.plans[worker] += 1
        self.events.append(Event(now, "leave", (worker,), (since,), now))

    def join(self, worker: int, now: int) -> None:
        """Let a worker join, with no steps since an exchange and the exchanges settled that its peers have settled."""
        there = [other for other in range(self.workers) if self.present[other]]
        nearest = [other for other in there if other // self.group_size == worker // self.group_size] or there
        self.settled[worker] = min((self.settled[other] for other in nearest), default=self.settled[worker])
        self.present[worker] = True
        self.since_exchange[worker] = 0
        self.partners_steps[worker] = self.total - self.steps[worker]
        self.events.append(Event(now, "join", (worker,), (now,), now + self.fetching))
        self.start(worker, now + self.fetching)

    def due(self, worker: int) -> int:
        """Return the number of the last exchange that has been due for a worker."""
        if self.schedule.counts == "own":
            return self.settled[worker] + (self.since_exchange[worker] >= self.period)
        return self.total // (self.workers * self.period)

    def is_due(self, worker: int) -> bool:
        return self.due(worker) > self.settled[worker]

    def settle(self, members: Iterable[int]) -> bool:
        """Settle all exchanges that were due; returns whether one of all groups was among them."""
        due, settled = (max(number(worker) for worker in members) for number in (self.due, self.settled.__getitem__))
        for worker in members:
            self.settled[worker], self.since_exchange[worker] = due, 0
        return self.ratio is not None and due // self.ratio > settled // self.ratio

    def be_served(self, worker: int, now: int) -> None:
        """Exchange with the servers once they have served earlier workers."""
        partners_steps = self.total - self.steps[worker]
        stale = _rounded(partners_steps - self.partners_steps[worker], self.workers - 1)
        self.partners_steps[worker] = partners_steps
        level = int(self.settle([worker]))
        begins = max(now + self.asking, self.servers_free)
        self.servers_free = begins + self.costs[level].occupies
        end = begins + self.costs[level].nanoseconds
        self.events.append(Event(begins, "exchange", (worker,), (now,), end, level, (stale,)))
        self.start(worker, end)

    def exchange_in_group(self, group: int, now: int) -> None:
        """Exchange in a group if all its present members have arrived."""
        first = group * self.group_size
        members = [worker for worker in range(first, first + self.group_size) if self.present[worker]]
        if group in self.parked or not members or any(worker not in self.arrived for worker in members):
            return
        taken = [self.since_exchange[worker] for worker in members]
        stale = tuple(_rounded(sum(taken) - own, len(members) - 1) for own in taken)
        is_global = self.settle(members)
        begun = tuple(self.arrived.pop(worker) for worker in members)
        end = now + self.costs[0].nanoseconds
        self.events.append(Event(now, "exchange", tuple(members), begun, end, 0, stale))
        if is_global:
            self.parked[group] = end, members
        else:
            for worker in members:
                self.start(worker, end)

    def exchange_globally(self, now: int) -> None:
        """Exchange among all groups if all wait for it, except for workers that joined during the wait."""
        if self.ratio is None or not self.parked:
            return
        number = max(self.settled[worker] for _, members in self.parked.values() for worker in members)
        for worker in range(self.workers):
            expected = self.present[worker] and self.settled[worker] // self.ratio < number // self.ratio
            if expected and worker // self.group_size not in self.parked:
                return
        begins = max(now, *(since for since, _ in self.parked.values()))  # Now, if the last missing worker left.
        begun = {worker: since for since, members in self.parked.values() for worker in members}
        end = begins + self.costs[1].nanoseconds
        members = tuple(sorted(begun))
        self.events.append(Event(begins, "exchange", members, tuple(begun[worker] for worker in members), end, 1))
        for worker in members:
            self.settled[worker] = number
            self.start(worker, end)
        self.parked.clear()


def _rounded(total: int, count: int) -> int:
    """Mean, rounded to the nearest integer; 0 if the count is 0."""
    return (2 * total + count) // (2 * count) if count else 0
