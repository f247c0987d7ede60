"""The same simulation for very many workers, without a log: the event queue in batches, as arrays over workers.

What a worker does at the end of a step can have no effect on others before a further step is at an end. All steps that
end before the first such time are therefore dealt with at once.
"""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
from jaxtyping import Int

from lsgd_jax.config import Config
from lsgd_jax.simulate.cluster import Cluster, StepTimes, collective_costs, request_nanoseconds, server_costs
from lsgd_jax.simulate.events import Schedule, Totals

_NEVER = np.iinfo(np.int64).max


def throughput(schedule: Schedule, config: Config, cluster: Cluster, params: Any) -> Totals:
    """What `totals(event_log(...))` gives, to the nanosecond, in time for 100,000 workers.

    Args:
      schedule: of the method; the configuration's own method does not matter.
      config: of the workers: how many, their steps, their periods, how leaders are sent, the seed.
      cluster: they run on, without absences.
      params: one worker's, or their shapes and dtypes: what is sent.

    Raises:
      ValueError: if the cluster has absences, or if the steps of workers who wait for each other by their own count
        are no multiple of the longest period.
      UsageError: if the cluster tells of workers that are not there, or its trace can't be read.
    """
    if cluster.absences:
        raise ValueError("workers that are away need an event log.")
    return _Batches(schedule, dataclasses.replace(config, method=schedule.method), cluster, params).run()


class _Batches:
    """The state of a simulation, an entry a worker in every array."""

    def __init__(self, schedule: Schedule, config: Config, cluster: Cluster, params: Any) -> None:
        workers = config.groups * config.workers
        self.schedule, self.workers = schedule, workers
        (self.group_size, self.period), *wider = config.levels
        self.ratio = wider[0][1] // self.period if wider else None
        together = schedule.waits == "together"
        self.costs = (collective_costs if together else server_costs)(config, cluster, params)
        self.asking = request_nanoseconds(config, cluster)
        self.step_times = StepTimes(cluster, workers, config.seed)
        self.target = workers * config.steps
        # Nobody looks in between where workers wait for each other by their own count: a period is as one step.
        self.at_once = self.period if together and schedule.counts == "own" else 1
        if self.at_once > 1 and config.steps % config.levels[-1][1]:
            raise ValueError(f"the steps must be a multiple of {config.levels[-1][1]}, the longest period.")

        def zeros() -> Int[np.ndarray, " workers"]:
            return np.zeros(workers, np.int64)

        everyone = np.arange(workers)
        self.group_of = everyone // self.group_size
        self.started = zeros()
        self.ends = self.next_times(everyone)  # Of the step at hand; never, of those that wait.
        self.following = self.next_times(everyone)  # How long the step after it takes.
        self.steps, self.steps_before = zeros(), zeros()  # In all, and when they last exchanged.
        self.settled = zeros()  # The number of the last exchange that was due.
        self.partners_steps, self.arrived, self.due = zeros(), zeros(), zeros()
        self.missing = np.full(workers // self.group_size, self.group_size)  # How many a group waits for.
        self.parked = np.full(workers // self.group_size, _NEVER)  # Since when a group waits for others.
        self.last = [(zeros(), zeros(), zeros()) for _ in self.costs]  # An exchange: since when, when, until when.
        self.total = self.servers_free = self.waiting = self.exchanging = 0
        self.exchanges, self.staleness = [0] * len(self.costs), Counter[int]()

    def run(self) -> Totals:
        end = None
        while end is None:
            waits = self.ends == _NEVER
            before = (np.where(waits, self.ends.min(), self.ends) + self.following).min()
            who = np.flatnonzero(self.ends < before)
            time = self.ends[who]
            end = self.reached(self.target, time)
            if end is not None:
                who, time = who[time <= end], time[time <= end]
            self.end_steps(who, time)
        still = self.ends == _NEVER
        since = np.where(self.parked == _NEVER, 0, self.parked).repeat(self.group_size)
        since = np.where(since > 0, since, self.arrived)[still]
        self.waiting += int((end - np.minimum(since, end)).sum())
        for of_level in self.last:  # What goes on beyond the end is cut off there.
            begun, begins, ends = (int(np.maximum(times - end, 0).sum()) for times in of_level)
            self.waiting -= begins - begun
            self.exchanging -= ends - begins
        return Totals(
            workers=self.workers,
            nanoseconds=int(end),
            steps=int(self.steps.sum()),
            exchanges=tuple(self.exchanges),
            bytes_sent=sum(count * cost.bytes_sent for count, cost in zip(self.exchanges, self.costs, strict=True)),
            waiting=self.waiting,
            exchanging=self.exchanging,
            away=0,
            staleness=dict(sorted(self.staleness.items())),
        )

    def next_times(self, who: np.ndarray) -> np.ndarray:
        times = np.zeros(len(who), np.int64)
        for _ in range(self.at_once):
            times += self.step_times(who, self.started[who])
            self.started[who] += 1
        return times

    def go_on(self, who: np.ndarray, time: np.ndarray) -> None:
        self.ends[who] = time + self.following[who]
        self.following[who] = self.next_times(who)

    def reached(self, count: int, time: np.ndarray) -> int | None:
        """When all steps together reach a count by steps that end at these times; None if they don't."""
        wanted = -(-(count - self.total) // self.at_once)
        return int(np.partition(time, wanted - 1)[wanted - 1]) if wanted <= len(time) else None

    def end_steps(self, who: np.ndarray, time: np.ndarray) -> None:
        self.steps[who] += self.at_once
        if self.schedule.counts == "own":
            number = self.settled[who] + (self.steps[who] - self.steps_before[who] >= self.period)
        else:
            last, every = self.total // (self.workers * self.period), self.workers * self.period
            reached = self.reached((last + 1) * every, time)  # Each ends one step, so that it is one exchange at most.
            number = last + (time >= reached if reached is not None else np.zeros(len(who), int))
        due = number > self.settled[who]
        self.go_on(who[~due], time[~due])
        if due.any() and self.schedule.waits == "server":
            by_time = np.flatnonzero(due)[np.argsort(time[due], kind="stable")]
            counts = self.total + np.searchsorted(np.sort(time), time[by_time], side="right")
            self.be_served(who[by_time], time[by_time], counts, number[by_time])
        elif due.any():
            self.arrive(who[due], time[due], number[due])
            groups = np.flatnonzero(self.missing == 0)
            if len(groups):
                self.exchange_in_groups(groups)
        self.total += self.at_once * len(who)

    def be_served(self, who: np.ndarray, time: np.ndarray, counts: np.ndarray, number: np.ndarray) -> None:
        """Serve workers in this order, given the count of all steps when each asks."""
        partners_steps = counts - self.steps[who]
        self.note_staleness(partners_steps - self.partners_steps[who], self.workers - 1)
        self.partners_steps[who] = partners_steps
        level = self.levels(number, self.settled[who])
        self.settled[who], self.steps_before[who] = number, self.steps[who]
        occupies, takes = (np.array([getattr(c, of) for c in self.costs])[level] for of in ("occupies", "nanoseconds"))
        # begins[k] = max(asked[k], begins[k - 1] + occupies[k - 1]), by a running maximum.
        served_before = np.cumsum(occupies) - occupies
        begins = time + self.asking - served_before
        begins[0] = max(begins[0], self.servers_free)
        begins = np.maximum.accumulate(begins) + served_before
        self.servers_free = int(begins[-1] + occupies[-1])
        for i in range(len(self.costs)):
            at = level == i
            self.note_exchange(i, who[at], time[at], begins[at], (begins + takes)[at])
        self.go_on(who, begins + takes)

    def arrive(self, who: np.ndarray, time: np.ndarray, number: np.ndarray) -> None:
        self.arrived[who], self.ends[who], self.due[who] = time, _NEVER, number
        self.missing -= np.bincount(self.group_of[who], minlength=len(self.missing))

    def exchange_in_groups(self, groups: np.ndarray) -> None:
        members = groups[:, None] * self.group_size + np.arange(self.group_size)
        begins = self.arrived[members].max(1)
        taken = self.steps[members] - self.steps_before[members]
        self.note_staleness(taken.sum(1, keepdims=True) - taken, self.group_size - 1)
        settled = self.settled[members].max(1)
        number = self.due[members].max(1)  # What the last to arrive has seen.
        self.settled[members], self.steps_before[members] = number[:, None], self.steps[members]
        self.missing[groups] = self.group_size
        ends = begins + self.costs[0].nanoseconds
        begun = self.arrived[members].reshape(-1)
        each_begins, each_ends = begins.repeat(self.group_size), ends.repeat(self.group_size)
        self.note_exchange(0, members.reshape(-1), begun, each_begins, each_ends)
        of_all = self.levels(number, settled) == 1
        self.go_on(members[~of_all].reshape(-1), ends[~of_all].repeat(self.group_size))
        self.parked[groups[of_all]] = ends[of_all]
        if self.parked.max() < _NEVER:
            everyone, begins = np.arange(self.workers), np.full(self.workers, self.parked.max())
            ends = begins + self.costs[1].nanoseconds
            self.note_exchange(1, everyone, self.parked.repeat(self.group_size), begins, ends)
            self.settled[:] = self.settled.max()
            self.go_on(everyone, ends)
            self.parked[:] = _NEVER

    def levels(self, number: np.ndarray, settled: np.ndarray) -> np.ndarray:
        """1 where what is due is of all groups, 0 elsewhere."""
        return np.zeros_like(number) if self.ratio is None else 1 * (number // self.ratio > settled // self.ratio)

    def note_exchange(
        self, level: int, who: np.ndarray, begun: np.ndarray, begins: np.ndarray, ends: np.ndarray
    ) -> None:
        self.exchanges[level] += len(who)
        self.waiting += int((begins - begun).sum())
        self.exchanging += int((ends - begins).sum())
        for kept, times in zip(self.last[level], (begun, begins, ends), strict=True):
            kept[who] = times

    def note_staleness(self, partners_steps: np.ndarray, partners: int) -> None:
        stale = (2 * partners_steps + partners) // (2 * partners) if partners else np.zeros_like(partners_steps)
        values, times = np.unique(stale, return_counts=True)
        self.staleness.update(dict(zip(values.tolist(), times.tolist(), strict=True)))
