"""Leader SGD and its peers as optax gradient transformations over named worker axes."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lsgd_jax.exchange import NOBODY, broadcast_from, elect
    from lsgd_jax.leader import leader_pull
    from lsgd_jax.methods.lsgd import leader_sgd, lsgd
    from lsgd_jax.scores import LeaderPullState, LeaderState
    from lsgd_jax.variants import apply_updates
else:  # Imported when they are used, so that the `lsgd` command can report what JAX's import raises.

    def __getattr__(name):
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from lsgd_jax import exchange, leader, scores, variants
        from lsgd_jax.methods import lsgd

        modules = (exchange, leader, scores, variants, lsgd)
        return next(vars(module)[name] for module in modules if name in vars(module))


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
