"""Leader SGD and its peers as optax gradient transformations over named worker axes."""

from lsgd_jax.exchange import NOBODY, broadcast_from, elect
from lsgd_jax.leader import LeaderPullState, LeaderState, leader_pull, lsgd

__all__ = ["NOBODY", "LeaderPullState", "LeaderState", "broadcast_from", "elect", "leader_pull", "lsgd"]
