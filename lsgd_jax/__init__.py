"""Leader SGD and its peers as optax gradient transformations over named worker axes."""

from lsgd_jax.exchange import NOBODY, broadcast_from, elect
from lsgd_jax.leader import LeaderPullState, LeaderState, apply_updates, leader_pull, leader_sgd, lsgd

__all__ = [
    "NOBODY",
    "LeaderPullState",
    "LeaderState",
    "apply_updates",
    "broadcast_from",
    "elect",
    "leader_pull",
    "leader_sgd",
    "lsgd",
]
