"""The `lsgd` command."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS

if TYPE_CHECKING:
    Preset = Config
else:  # One subcommand a preset, its fields as options.
    Preset = tyro.conf.OmitArgPrefixes[tyro.extras.subcommand_type_from_defaults(PRESETS)]


def train(config: Preset, run_dir: Path | None = None) -> None:
    """Train a preset with LSGD and write a run folder: configuration, environment, metrics, a picture.

    Args:
      config: the preset and what to change in it.
      run_dir: the folder to write; by default one under runs/ named after the data and the time.
    """
    from lsgd_jax import distributed
    from lsgd_jax.train import train_and_evaluate

    distributed.simulate_devices(config.groups * config.workers)
    run_dir = run_dir or Path("runs") / f"{config.dataset}-{time.strftime('%Y%m%d-%H%M%S')}"
    error = train_and_evaluate(config, run_dir)
    from lsgd_jax.figures import run

    print(f"test error of the center after {config.steps} steps: {error:.2%}; see {run.draw(run_dir)}")


def figure(
    name: Annotated[Literal["trajectories", "nonconvex", "matrix-completion", "analytic"], tyro.conf.Positional],
    out: Path = Path("figures"),
) -> None:
    """Compute and draw a figure of the paper: a picture, its curves (CSV) and its numbers (JSON).

    Args:
      name: which figure; analytic: the three of them.
      out: the folder to write to.
    """
    from lsgd_jax.figures import analytic

    figures = analytic()
    for each in figures if name == "analytic" else [name]:
        print(f"{each}\n{figures[each](out)}\nsee {out / each.replace('-', '_')}.png", flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, 2 for a user's mistake."""
    try:
        tyro.extras.subcommand_cli_from_dict(
            {"train": train, "figure": figure},
            prog="lsgd",
            description="Leader SGD in JAX.",
            args=arguments,
            config=(tyro.conf.CascadeSubcommandArgs,),
        )
    except UsageError as error:
        print(f"lsgd: {error}", file=sys.stderr)
        return 2
    return 0
