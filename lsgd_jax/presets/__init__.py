"""One file an experiment; `PRESETS` maps its name to its configuration."""

from lsgd_jax.config import Config
from lsgd_jax.presets import digits, mnist1d

PRESETS: dict[str, Config] = {"mnist1d": mnist1d.CONFIG, "digits": digits.CONFIG}
