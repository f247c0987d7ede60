"""What a run folder has for a report."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lsgd_jax import files
from lsgd_jax.config import Config
from lsgd_jax.figures.run import Errors, by_worker, errors_of, logged_positions
from lsgd_jax.tracking.run_folder import MOST_BYTES, making_sense_of, read_config, read_metrics


class Elections(NamedTuple):
    """Elections of one level."""

    steps: np.ndarray
    """Of each leader's election."""
    leaders: np.ndarray
    """Their ranks among all workers."""
    distances: list[tuple[int, np.ndarray]]
    """Steps, and how far the leaders' followers were from them."""


class Run(NamedTuple):
    """A run."""

    name: str
    config: Config
    environment: dict[str, str]
    step: int
    """The last of which anything is logged."""
    errors: Errors
    losses: np.ndarray
    """[evaluations, workers]"""
    bytes_sent: np.ndarray
    """By a worker until each evaluation."""
    worker_steps: np.ndarray
    """[evaluations, workers]; without workers if they take their steps together."""
    elections: dict[str, Elections]
    """By their title: of all, and in the groups."""
    scores: list[tuple[int, np.ndarray]]
    """Steps, and the workers' scores."""
    events: list[list[str]]
    """Steps, and what has happened on them."""

    @property
    def progress(self) -> str:
        """How far it has come."""
        tested = self.errors.steps
        finished = len(tested) and tested[-1] >= self.config.steps
        return f"{self.step:,}" + ("" if finished else f" of {self.config.steps:,}, not finished")


def read(run: Path, name: str) -> Run:
    """Read a run from its folder.

    Raises:
      UsageError: if it is not one of a run.
    """
    config = read_config(run)
    evaluations, exchanges = read_metrics(run, "evaluation"), read_metrics(run, "exchange")
    events = read_metrics(run, "failure", "revival", "resume")
    with making_sense_of(run):
        logged_positions([config.groups * config.workers - 1])
        return Run(
            name=name,
            config=config,
            environment=_environment(run),
            step=max((int(entry["step"]) for entry in [*evaluations, *exchanges, *events]), default=0),
            errors=errors_of(run),
            losses=by_worker(evaluations, "train_losses"),
            bytes_sent=np.array([entry["bytes_sent"] for entry in evaluations], float),
            worker_steps=by_worker(evaluations if config.asynchronous else [], "worker_steps"),
            elections={
                "The leader of all": elections(exchanges, "", config.workers),
                "The leader of a group": elections(exchanges, "local_", config.workers),
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
    """The elections on exchanges.

    Args:
      exchanges: the events.
      level: "" for elections among all, "local_" for those in groups.
      workers: in a group, where an exchange is one worker's.
    """
    leaders: list[tuple[int, int]] = []
    apart: list[tuple[int, np.ndarray]] = []
    for entry in exchanges:
        if f"{level}distances" in entry:
            # In each group, or among all.
            elected = np.ravel(logged_positions(entry["local_leaders" if level else "leader"]))
            distances = _numbers(entry[f"{level}distances"]).reshape(len(elected), -1)
            size = distances.shape[1]
            led = elected >= 0
            apart.append((entry["step"], distances[led[:, None] & (np.arange(size) != elected[:, None])]))
            ranks = np.arange(len(elected)) * size + elected
            leaders += [(entry["step"], int(rank)) for rank in ranks[led]]
        elif f"{level}distance" in entry and entry[f"{level}leader"] >= 0:
            worker, position = logged_positions([entry["worker"], entry[f"{level}leader"]]).tolist()
            rank = position + (worker - worker % workers if level else 0)
            leaders.append((entry["step"], rank))
            if rank != worker:
                apart.append((entry["step"], _numbers(entry[f"{level}distance"])))
    leaders.sort(key=lambda leader: leader[0])  # Workers at their own speed may log late.
    steps, ranks = np.array(leaders, int).reshape(-1, 2).T
    return Elections(steps, ranks, apart)


def _numbers(values: Any) -> np.ndarray:
    """What was logged, as a line of numbers; null is NaN."""
    return np.ravel(np.array(values, float))


def _sentence(entry: dict) -> str:
    """What has happened."""
    if entry["event"] == "resume":
        groups, workers = np.shape(entry["workers_from"])
        return (
            f"The run went on with {groups} x {workers} workers on {entry['devices']} devices of"
            f" {entry['processes']} processes."
        )
    who = f"worker{'s' * (len(entry['workers']) > 1)} {', '.join(map(str, entry['workers']))}"
    if entry["event"] == "revival":
        return f"From the leader, {who} started anew."
    return f"NaN or infinite parameters: {who}."


def text_of(value: Any) -> str:
    """A value of the configuration or the environment."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {of}" for name, of in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return "not given" if value is None else str(value)
