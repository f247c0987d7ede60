"""The paper's picture over slow links: test error against wall-clock, when exchanges take their time.

    sudo python -m benchmarks.communication.constrained

Four workers, each a process on a host of its own whose link is limited (see network.py), train an MLP of 2.5 million
parameters on 5,000 images of MNIST, 16 a worker and step. All but data-parallel SGD exchange every 16 steps; with
period 32 others send as many bytes as LSGD by a chain does. Every method's learning rate is the best of the same three,
by the error on held-out training data after as many steps, one seed each, on one machine without links. Wall-clock is
that of training; evaluations are left out.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.communication.network import hosts
from lsgd_jax import distributed
from lsgd_jax.config import Config
from lsgd_jax.figures.output import write_formats
from lsgd_jax.figures.palette import look
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.environment import environment
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import train_and_evaluate

RESULTS = Path(__file__).parent / "results"
RATES = (0.01, 0.03, 0.1)
MEGABITS = (1000, 200, 50)
TARGET = 0.08
PRESET = "cnn7-mnist5k-4"
BASE = PRESETS[PRESET].replace(
    model="mlp",
    width=19.25,
    steps=320,
    period=16,
    eval_every=16,
    checkpoint_every=0,  # Nothing else is to be timed.
)
RUNS: dict[str, dict[str, Any]] = {
    "LSGD, chain": {"method": "lsgd", "broadcast": "chain"},
    "LSGD, chain, int8": {"method": "lsgd", "broadcast": "chain", "wire": "int8"},
    "EASGD": {"method": "easgd"},
    "EASGD, period 32": {"method": "easgd", "period": 32, "eval_every": 32},
    "local SGD": {"method": "local_sgd"},
    "local SGD, period 32": {"method": "local_sgd", "period": 32, "eval_every": 32},
    "DiLoCo": {"method": "diloco"},
    "data parallel": {"method": "data_parallel", "steps": 160, "eval_every": 8},
}


def main() -> None:
    """Tune, train over all links, keep the results, and draw and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    out = parser.parse_args().out
    distributed.simulate_devices(BASE.workers)
    configs = {name: tuned(BASE.replace(**options)) for name, options in RUNS.items()}
    found: dict[str, Any] = {"target": TARGET, "links": {}, "environment": environment()}
    found["learning_rates"] = {name: config.learning_rate for name, config in configs.items()}
    for megabits in MEGABITS:
        found["links"][megabits] = {name: run(config, megabits) for name, config in configs.items()}
        (out / "constrained.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))
    draw(found, out / "constrained.png")


def tuned(config: Config) -> Config:
    """The configuration with the best of the learning rates."""

    def validation_error(rate: float) -> float:
        trial = dataclasses.replace(config, learning_rate=rate, validation=0.2, eval_every=config.steps)
        with tempfile.TemporaryDirectory() as folder:
            error = train_and_evaluate(trial, Path(folder) / "run", lines=False)
            assert error is not None
        print(f"{config.method}, period {config.period}, learning rate {rate}: {error:.2%}", flush=True)
        return error

    return dataclasses.replace(config, learning_rate=min(RATES, key=validation_error))


def run(config: Config, megabits: float) -> dict[str, list[float]]:
    """Wall-clock and test error of the center at all evaluations of a run over such links."""
    changed = {name: value for name, value in config.flat.items() if value != PRESETS[PRESET].flat[name]}
    with tempfile.TemporaryDirectory() as folder, hosts(config.workers, megabits) as net:
        command = [sys.executable, "-m", "lsgd_jax", "train", PRESET, "--run-dir", f"{folder}/run", *options(changed)]
        log = Path(folder) / "log"
        try:
            with log.open("w") as output:
                net.run(command, output=output)
        except subprocess.SubprocessError:
            sys.exit(f"a process failed:\n{log.read_text()}")
        evaluations = read_metrics(Path(folder) / "run", "evaluation")
    found = {name: [entry[name] for entry in evaluations] for name in ("step", "seconds", "center_error", "bytes_sent")}
    print(f"{megabits} Mbit/s, {config.method}, period {config.period}: {found['center_error'][-1]:.2%}", flush=True)
    return found


def options(changed: dict[str, Any]) -> list[str]:
    """Fields of a configuration as options of the command line."""
    found = []
    for name, value in changed.items():
        found.append("--" + name.replace("_", "-"))
        found.append(str(value))
    return found


def seconds_to(target: float, curve: dict[str, list[float]]) -> float:
    """When the test error was first at most the target; infinite if never."""
    reached = np.asarray(curve["center_error"]) <= target
    return curve["seconds"][int(reached.argmax())] if reached.any() else float("inf")


def table(found: dict[str, Any]) -> str:
    """Time to the target beside data-parallel SGD's, and final errors, as markdown."""
    links = found["links"]
    columns = " | ".join(f"{megabits} Mbit/s" for megabits in links)
    lines = [
        f"| method | learning rate | time to {found['target']:.0%}, data parallel = 1: {columns} | last error |",
        "|---|---|" + "---|" * (len(links) + 1),
    ]
    for name, rate in found["learning_rates"].items():
        ratios = [
            seconds_to(found["target"], curves[name]) / seconds_to(found["target"], curves["data parallel"])
            for curves in links.values()
        ]
        cells = ["not reached" if np.isinf(ratio) else f"{ratio:.3f}" for ratio in ratios]
        last = next(iter(links.values()))[name]["center_error"][-1]
        lines.append(f"| {name} | {rate} | {' | '.join(cells)} | {last:.2%} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], path: Path) -> None:
    """Test errors against wall-clock, a panel a link."""
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    panels = figure.subplots(1, len(found["links"]), sharex=True, sharey=True)
    for axes, (megabits, curves) in zip(panels, found["links"].items(), strict=True):
        drawn: set[str] = set()
        for name, curve in curves.items():
            method = RUNS[name]["method"]
            style = {"color": look(method).color, "linestyle": "--" if method in drawn else "-", "label": name}
            drawn.add(method)
            axes.plot(curve["seconds"], 100 * np.asarray(curve["center_error"]), linewidth=1.4, **style)
        axes.axhline(100 * found["target"], color="black", linewidth=0.6)
        axes.set(title=f"{megabits} Mbit/s", xlabel="seconds of training", xscale="log", yscale="log", ylim=(5, 30))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.2, which="both")
    panels[0].set_ylabel("test error of the evaluated model (%)")
    panels[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    write_formats(path, figure, dpi=120)


if __name__ == "__main__":
    main()
