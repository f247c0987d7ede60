"""What faults did to a run, from its events and the faults that were injected."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

MARGIN = 5.0
"""Seconds before a fault, by another's clock, and after it in which what is noticed may be due to it."""


class Span(NamedTuple):
    """Seconds of one kind: how many times there are, their median and the longest."""

    times: int
    median: float | None
    longest: float | None

    @staticmethod
    def of(seconds: Iterable[float]) -> "Span":
        """The span of some durations."""
        found = list(seconds)
        return Span(len(found), statistics.median(found), max(found)) if found else Span(0, None, None)


class Summary(NamedTuple):
    """The summary of a run with faults. Times are in seconds."""

    workers: int
    seconds: float
    """From the start of training of all workers to the end, of which the first `quiet` were without faults."""
    quiet: float
    faults: dict[str, int]
    """How many there were of each kind."""
    noticed: Span
    """From a kill until each of the others took the worker for dead."""
    back: Span
    """From a kill until its replacement trained: the restart's delay, imports and compilation included."""
    away: int
    """Killed workers whose replacements had not begun to train in the end."""
    lost: list[int]
    """For every worker that was replaced, its steps that nobody knew of and that were taken again."""
    stalls: Span
    """What workers to which nothing was done waited beyond their steps, where it was more than a step."""
    ended: list[str]
    """Workers that died although nothing was done to them."""
    wrong: int
    """How often a worker was taken for dead although nothing was done to it or its links."""
    steps: int
    quiet_throughput: float
    """Steps of all workers per second without faults."""
    throughput: float
    """Share of it while there were faults."""
    living: float
    """Share of the workers that lived and were not stopped while there were faults."""
    error: float | None
    """Headline measure of the evaluated model, as evaluated last."""

    def table(self, measure: str) -> str:
        """The summary as text.

        Args:
          measure: name of the headline measure.
        """
        faults = ", ".join(f"{count} x {kind}" for kind, count in self.faults.items()) or "none"
        share = self.throughput / self.living if self.living else 0.0
        rows = {
            "workers": f"{self.workers}, for {self.seconds:.0f} s",
            "faults": f"{sum(self.faults.values())} ({faults})",
            "deaths noticed after": _text(self.noticed),
            "replacements trained after": _text(self.back) + (f"; {self.away} not by the end" if self.away else ""),
            "stalls of survivors": _text(self.stalls),
            "died although nothing was done": ", ".join(self.ended) or "nobody",
            "taken for dead although nothing was done": str(self.wrong),
            "steps": f"{self.steps:,}, of which {sum(self.lost):,} were lost by {len(self.lost)} workers",
            "throughput without faults": f"{self.quiet_throughput:.1f} steps per second",
            "throughput with faults": f"{self.throughput:.1%} of it, {share:.1%} of the living workers' share",
            measure: "not evaluated" if self.error is None else f"{self.error:.4g}",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def summarize(
    events: Sequence[dict[str, Any]], faults: Sequence[dict[str, Any]], *, quiet: float, measure: str
) -> Summary:
    """Sum up a run.

    Args:
      events: of the run, as `lsgd_jax.tracking.run_folder.read_metrics` reads them.
      faults: records of `lsgd_jax.chaos.Injector.inject`.
      quiet: seconds at the start without faults.
      measure: name of the headline measure in evaluations.
    """
    lives = _lives(events)
    workers = sorted({worker for worker, _ in lives})
    begin = max(lives[worker, min(life for other, life in lives if other == worker)][0][0] for worker in workers)
    end = max(points[-1][0] for points in lives.values())
    hits = [(fault, hit["worker"], hit["life"]) for fault in faults for hit in fault["hit"]]
    dead = [event for event in events if event["event"] == "dead" and event["seconds"] <= end]
    kills: dict[tuple[int, int], float] = {}
    for fault, worker, life in hits:
        if fault["kind"] == "kill":  # Who is killed while it starts is hit in the life before, which has ended by then.
            kills.setdefault((worker, life), fault["time"])
    after = {key: points for key in lives if (points := _after(key, lives)) is not None}
    noticed = [event["seconds"] - kills.get((event["worker"], event["life"]), math.inf) for event in dead]
    kills = {key: at for key, at in kills.items() if key in lives}  # The others had not begun to train.
    back = [after[key][0][0] - at for key, at in kills.items() if key in after]
    lost = [points[-1][1] - after[key][0][1] for key, points in lives.items() if key in after]
    stopped = [
        (worker, fault["time"], fault["time"] + fault["seconds"])
        for fault, worker, _ in hits
        if fault["kind"] == "stop"
    ]
    ending = {(worker, life) for fault, worker, life in hits if fault["kind"] in ("kill", "stop", "disk")}
    kinds = [fault["kind"] for fault in faults if fault["hit"]]
    calm, stormy = _throughput(lives, begin, begin + quiet), _throughput(lives, begin + quiet, end)
    evaluations = [event for event in events if event["event"] == "evaluation"]
    return Summary(
        workers=len(workers),
        seconds=end - begin,
        quiet=quiet,
        faults={kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        noticed=Span.of(seconds for seconds in noticed if seconds >= 0),
        back=Span.of(back),
        away=len(kills) - len(back),
        lost=[max(0, steps) for steps in lost],
        stalls=Span.of(_stalls(lives, stopped)),
        ended=[
            f"worker {worker} in life {life}"
            for worker, life in sorted(lives)
            if (worker, life) in after and (worker, life) not in ending
        ],
        wrong=sum(not _is_explained(event, faults) for event in dead),
        steps=sum(max(life[-1][1] for (other, _), life in lives.items() if other == worker) for worker in workers),
        quiet_throughput=calm,
        throughput=stormy / calm if calm else 0.0,
        living=_living(lives, kills, stopped, begin + quiet, end),
        error=evaluations[-1][f"center_{measure}"] if evaluations else None,
    )


def _lives(events: Sequence[dict[str, Any]]) -> dict[tuple[int, int], list[tuple[float, int]]]:
    """When each worker had taken how many steps, by worker and life, in order."""
    lives: dict[tuple[int, int], list[tuple[float, int]]] = {}
    for event in events:
        if event["event"] in ("start", "exchange") or (event["event"] == "checksum" and not event["pulled"]):
            step = event["worker_step"] if event["event"] == "exchange" else event["step"]
            lives.setdefault((event["worker"], event["life"]), []).append((event["time"], step))
    return {key: sorted(points) for key, points in lives.items()}


def _after(
    key: tuple[int, int], lives: dict[tuple[int, int], list[tuple[float, int]]]
) -> list[tuple[float, int]] | None:
    """The worker's next life that has events; None if there is none. One that ends before it trains has none."""
    worker, life = key
    later = min((other for same, other in lives if same == worker and other > life), default=None)
    return None if later is None else lives[worker, later]


def _is_explained(death: dict[str, Any], faults: Iterable[dict[str, Any]]) -> bool:
    """Whether a fault may be why a worker was taken for dead."""
    for fault in faults:
        if death["seconds"] < fault["time"] - MARGIN:
            continue
        is_over = death["seconds"] > fault["time"] + fault["seconds"] + MARGIN
        was_hit = any((death["worker"], death["life"]) == (hit["worker"], hit["life"]) for hit in fault["hit"])
        if fault["kind"] in ("kill", "disk"):  # It ends, be it after a while.
            is_explained = was_hit
        elif fault["kind"] == "stop":
            is_explained = was_hit and not is_over
        else:  # Whoever was hit, others are apart from it, too.
            is_explained = bool(fault["hit"]) and not is_over
        if is_explained:
            return True
    return False


def _stalls(
    lives: dict[tuple[int, int], list[tuple[float, int]]], stopped: Sequence[tuple[int, float, float]]
) -> Iterator[float]:
    """Seconds that each worker waited beyond its steps between two of its events, where it was not stopped itself."""
    for (worker, _), points in lives.items():
        gaps = [(b[0] - a[0], b[1] - a[1], a[0], b[0]) for a, b in pairwise(points)]
        paces = [seconds / steps for seconds, steps, *_ in gaps if steps > 0]
        if not paces:
            continue
        pace = statistics.median(paces)
        for seconds, steps, first, last in gaps:
            own = any(other == worker and first <= end and start <= last for other, start, end in stopped)
            if (beyond := seconds - steps * pace) > pace and not own:
                yield beyond


def _throughput(lives: dict[tuple[int, int], list[tuple[float, int]]], first: float, last: float) -> float:
    """Steps per second of all workers between two times; those that were lost count against it."""
    newest: dict[int, list[list[tuple[float, int]]]] = {}
    for (worker, _), points in sorted(lives.items()):
        newest.setdefault(worker, []).append(points)
    steps = sum(_steps_at(lives_of, last) - _steps_at(lives_of, first) for lives_of in newest.values())
    return steps / (last - first) if last > first else 0.0


def _steps_at(lives_of: Sequence[list[tuple[float, int]]], at: float) -> float:
    """The steps of a worker at some time, between two of its events in proportion."""
    points = next((points for points in reversed(lives_of) if points[0][0] <= at), lives_of[0])
    for (before, a), (after, b) in pairwise(points):
        if before <= at <= after:
            return a + (b - a) * (at - before) / (after - before) if after > before else b
    return points[-1][1] if points[0][0] <= at else points[0][1]


def _living(
    lives: dict[tuple[int, int], list[tuple[float, int]]],
    kills: dict[tuple[int, int], float],
    stopped: Sequence[tuple[int, float, float]],
    first: float,
    last: float,
) -> float:
    """The mean share of workers that lived and were not stopped, between two times."""

    def overlap(start: float, end: float) -> float:
        return max(0.0, min(end, last) - max(start, first))

    workers = {worker for worker, _ in lives}
    lived = 0.0
    for key, points in lives.items():
        lived += overlap(points[0][0], kills.get(key, points[-1][0]))
    lived -= sum(overlap(start, end) for _, start, end in stopped)
    return lived / (len(workers) * (last - first)) if last > first else 1.0


def _text(span: Span) -> str:
    if span.median is None or span.longest is None:
        return "none"
    return f"{span.median:.2f} s (median of {span.times}), at most {span.longest:.2f} s"
