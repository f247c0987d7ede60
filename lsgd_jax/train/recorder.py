"""What a run records."""

from typing import Any

from lsgd_jax.config import Config
from lsgd_jax.tracking.run_folder import RunFolder
from lsgd_jax.train.step import Leaders


def log_exchange(folder: RunFolder, config: Config, step: int, leaders: Leaders, **more: Any) -> None:
    """Log a step on which an exchange was due, with what else there is to tell; `leaders` is on the host."""
    scores, positions, distances = leaders.score, leaders.positions, leaders.distances
    levels: dict[str, Any] = {}
    if config.groups > 1:
        levels = {"local_leaders": positions[:, 0, 0], "local_distances": distances[:, :, 0]}
    if step % config.levels[-1].period == 0:
        levels |= {"leader": positions[0, 0, -1], "distances": distances[:, :, -1]}
    folder.log("exchange", step=step, scores=scores, **levels, **more)
