"""Reads a run folder for a report."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lsgd_jax import files
from lsgd_jax.config import Config
from lsgd_jax.figures.run import Curves, by_worker, curves_of, logged_indices
from lsgd_jax.tracking.run_folder import MOST_BYTES, making_sense_of, read_config, read_metrics


class Elections(NamedTuple):
    """Elections at one level: among all workers, or in groups."""

    steps: np.ndarray
    """Step of each election."""
    leaders: np.ndarray
    """Global index of each elected leader."""
    distances: list[tuple[int, np.ndarray]]
    """Steps, with the followers' distances to their leaders."""


class Run(NamedTuple):
    """Contents of a run folder."""

    name: str
    config: Config
    environment: dict[str, str]
    step: int
    """Last step with an event."""
    curves: Curves
    losses: np.ndarray
    """Training loss [evaluations, workers]."""
    bytes_sent: np.ndarray
    """Bytes sent per worker until each evaluation."""
    worker_steps: np.ndarray
    """Steps taken [evaluations, workers]; no workers in a synchronous run."""
    elections: dict[str, Elections]
    """Elections by chart title: global and group leaders."""
    scores: list[tuple[int, np.ndarray]]
    """Steps, with the workers' scores."""
    events: list[list[str]]
    """Steps, with a description of each event."""

    @property
    def is_finished(self) -> bool:
        """Whether it has been evaluated after its last step."""
        tested = self.curves.steps
        return len(tested) > 0 and tested[-1] >= self.config.steps

    @property
    def progress(self) -> str:
        """Steps taken, out of how many if unfinished."""
        return f"{self.step:,}" + ("" if self.is_finished else f" of {self.config.steps:,}, not finished")


def read(run: Path, name: str) -> Run:
    """Read a run folder.

    Raises:
      UsageError: if it is not a run folder, or can't be read.
    """
    config = read_config(run)
    evaluations, exchanges = read_metrics(run, "evaluation"), read_metrics(run, "exchange")
    events = [
        entry
        for entry in read_metrics(run, "failure", "revival", "resume", "start", "dead")
        if entry["event"] != "start" or entry.get("life") != 1
    ]
    with making_sense_of(run):
        logged_indices([config.groups * config.workers - 1])
        return Run(
            name=name,
            config=config,
            environment=_environment(run),
            step=max((int(entry["step"]) for entry in [*evaluations, *exchanges, *events]), default=0),
            curves=curves_of(run, config.task.headline),
            losses=by_worker(evaluations, "train_losses"),
            bytes_sent=np.array([entry["bytes_sent"] for entry in evaluations], float),
            worker_steps=by_worker(evaluations if config.asynchronous else [], "worker_steps"),
            elections={
                "Global leader": elections(exchanges, "", config.workers),
                "Group leader": elections(exchanges, "local_", config.workers),
            },
            scores=[(entry["step"], _numbers(entry["scores"])) for entry in exchanges if "scores" in entry],
            events=[[f"{entry['step']:,}", _sentence(entry)] for entry in events],
        )


def _environment(run: Path) -> dict[str, str]:
    try:
        found = json.loads(files.read_text(run / "environment.json", MOST_BYTES))
        return {name: text_of(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def elections(exchanges: list[dict], level: str, workers: int) -> Elections:
    """Collect the elections at one level from exchange events.

    Args:
      exchanges: exchange events of the run.
      level: "" for elections among all workers, "local_" for elections in groups.
      workers: number of workers per group.
    """
    leaders: list[tuple[int, int]] = []
    apart: list[tuple[int, np.ndarray]] = []
    for entry in exchanges:
        if f"{level}distances" in entry:
            # One leader per group, or one among all workers.
            elected = np.ravel(logged_indices(entry["local_leaders" if level else "leader"]))
            distances = _numbers(entry[f"{level}distances"]).reshape(len(elected), -1)
            size = distances.shape[1]
            led = elected >= 0
            apart.append((entry["step"], distances[led[:, None] & (np.arange(size) != elected[:, None])]))
            ranks = np.arange(len(elected)) * size + elected
            leaders += [(entry["step"], int(rank)) for rank in ranks[led]]
        elif f"{level}distance" in entry and entry[f"{level}leader"] >= 0:
            worker, position = logged_indices([entry["worker"], entry[f"{level}leader"]]).tolist()
            rank = position + (worker - worker % workers if level else 0)
            leaders.append((entry["step"], rank))
            if rank != worker:
                apart.append((entry["step"], _numbers(entry[f"{level}distance"])))
    leaders.sort(key=lambda leader: leader[0])  # Asynchronous workers may log late.
    steps, ranks = np.array(leaders, int).reshape(-1, 2).T
    return Elections(steps, ranks, apart)


def _numbers(values: Any) -> np.ndarray:
    """Flatten logged values to a 1-D array; null becomes NaN."""
    return np.ravel(np.array(values, float))


def _sentence(entry: dict) -> str:
    """Describe an event."""
    if entry["event"] == "resume":
        groups, workers = np.shape(entry["workers_from"])
        return (
            f"Resumed with {groups} x {workers} workers on {entry['devices']} devices of"
            f" {entry['processes']} processes."
        )
    if entry["event"] == "dead":
        return f"Worker {entry['worker']} had ended in its life {entry['life']}, worker {entry['seen_by']} has seen."
    if entry["event"] == "start":
        begun = entry["from"] or {}
        source = f"worker {begun['worker']}" if "worker" in begun else "what it had saved" if begun else "the start"
        return f"Worker {entry['worker']} began its life {entry['life']} after {entry['step']} steps, from {source}."
    who = f"worker{'s' * (len(entry['workers']) > 1)} {', '.join(map(str, entry['workers']))}"
    if entry["event"] == "revival":
        return f"Revived from the leader: {who}."
    return f"NaN or infinite parameters: {who}."


def text_of(value: Any) -> str:
    """Format a value of the configuration or the environment."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {entry}" for name, entry in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "not given" if value is None else str(value)
