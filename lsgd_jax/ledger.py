"""What a method sends, by formula."""

from lsgd_jax.config import Config


def bytes_sent(config: Config, parameter_bytes: int, steps: int) -> float:
    """The bytes that each worker has sent after some local steps.

    An exchange is an all-reduce of the parameters, an average as well as a leader's masked broadcast: each of n workers
    sends 2 (n - 1) / n times their size. A method's first average, where it forms a centre, and the scalars of
    elections are left out.

    Args:
      config: of the run.
      parameter_bytes: the size of one worker's parameters.
      steps: local steps.

    Example:
      >>> from lsgd_jax.presets import PRESETS
      >>> bytes_sent(PRESETS["mnist1d"], 1_000_000, steps=16)  # 4 exchanges among 4 workers and one among all 8.
      7750000.0
    """
    return sum(steps // period * 2 * (among - 1) / among * parameter_bytes for among, period in config.levels)
