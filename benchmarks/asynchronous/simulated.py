"""Methods in virtual time: stragglers and the time to a test error, and scaling to 100,000 workers.

    python -m benchmarks.asynchronous.simulated

Virtual time does not depend on the machine; the script takes some minutes.

The first experiment trains the digits preset with 8 workers in one group, whose steps take 0.1 s and vary by 1 %, on
links of 10 Gbit/s, with the preset's learning rate. What is told is the median over seeds of the virtual seconds until
the center's test error is at most 5 %. DOWNPOUR, in which the workers' steps add up, has a smaller learning rate, the
best of a few on held-out data without a straggler, and takes more steps.

The second asks how much of the workers' time is computing, without training, for three made-up clusters; the
assumptions are `CLUSTERS`. LSGD in step and joined exchanges in groups every 4 steps and among all every 16; the
board, which serves both, and the centre are spread over one machine for every 8 workers, behind the links between
groups. Other methods exchange every 16 steps, and data parallel every step.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

from lsgd_jax.config import Config
from lsgd_jax.figures.output import write
from lsgd_jax.figures.palette import look
from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate import SCHEDULES, Cluster, event_log, throughput
from lsgd_jax.simulate.training import Network, train_on
from lsgd_jax.tracking.environment import environment
from lsgd_jax.train.compile_ahead import parameter_shapes

RESULTS = Path(__file__).parent / "results"
METHODS = ("lsgd", "lsgd-joined", "lsgd-posted", "easgd", "downpour", "data_parallel")
TARGET = 0.05
DOWNPOUR_STEPS, DOWNPOUR_DIVISOR, DIVISORS_TRIED = 5, 32, (8, 16, 32, 64, 128)
"""How many times as many steps DOWNPOUR takes, and by what its learning rate is divided."""
NEARLY_EQUAL = Cluster(variation="lognormal", sigma=0.01)
"""Steps that never end at the same instant, as on real machines."""
STRAGGLERS = {
    "no straggler": NEARLY_EQUAL,
    "one at half speed": dataclasses.replace(NEARLY_EQUAL, slow=((0, 2.0),)),
    "one at a tenth": dataclasses.replace(NEARLY_EQUAL, slow=((0, 10.0),)),
    "lognormal steps": Cluster(variation="lognormal", sigma=0.5),
}
SIZES = (8, 512, 8192, 100_352)


class Machines(NamedTuple):
    """Assumptions of the scaling experiment."""

    cluster: Cluster
    per_group: int
    parameters: int
    per_server: int
    """Workers for each machine that holds the centre or the board."""


CLUSTERS = {
    # Groups are pods of 256 chips: 800 Gbit/s a chip within, 6 Gbit/s a chip between them.
    "TPU pods": Machines(
        Cluster(0.5, variation="lognormal", sigma=0.02, local_bandwidth=8e11, local_latency=2e-6,
                global_bandwidth=6e9, global_latency=5e-5), 256, 1_000_000_000, 8),
    # Groups are machines with 8 GPUs: 2.4 Tbit/s within, 100 Gbit/s a machine between them.
    "GPUs over Ethernet": Machines(
        Cluster(0.5, variation="lognormal", sigma=0.1, local_bandwidth=2.4e12, local_latency=5e-6,
                global_bandwidth=1.25e10, global_latency=3e-5), 8, 1_000_000_000, 8),
    # Groups are sites with 8 machines: 1 Gbit/s within, 100 Mbit/s for each between them, machines of all ages.
    "across the internet": Machines(
        Cluster(2.0, variation="lognormal", varies_by="worker", sigma=0.5, local_bandwidth=1e9, local_latency=5e-4,
                global_bandwidth=1e8, global_latency=5e-2), 8, 100_000_000, 8),
}  # fmt: skip
PERIOD, GLOBAL_PERIOD, ROUNDS = 4, 16, 8


def straggler_config(steps: int) -> Config:
    """Of 8 workers on digits."""
    return dataclasses.replace(PRESETS["digits"], groups=1, workers=8, steps=steps, eval_every=4)


def for_method(config: Config, method: str) -> Config:
    """The configuration of a method in `SCHEDULES`; DOWNPOUR's has its own learning rate and more steps."""
    config = config.replace(method=SCHEDULES[method].method)
    if method != "downpour":
        return config
    rate, steps = config.learning_rate / DOWNPOUR_DIVISOR, config.steps * DOWNPOUR_STEPS
    return dataclasses.replace(config, learning_rate=rate, steps=steps)


def tried_divisors(base: Config) -> dict[str, float]:
    """The error on held-out data after all steps, by what DOWNPOUR's learning rate is divided by."""
    held_out = dataclasses.replace(for_method(base, "downpour"), validation=0.2)
    log = event_log(SCHEDULES["downpour"], held_out, NEARLY_EQUAL, parameter_shapes(base))
    found = {}
    for divisor in DIVISORS_TRIED:
        config = dataclasses.replace(held_out, learning_rate=base.learning_rate / divisor)
        found[str(divisor)] = train_on(log, SCHEDULES["downpour"], config, Network(config)).center[-1]
    return found


def stragglers(seeds: int, steps: int) -> tuple[dict[str, Any], list[list]]:
    """Train with every straggler and every method."""
    base = straggler_config(steps)
    params = parameter_shapes(base)
    summary: dict[str, Any] = {name: {method: [] for method in METHODS} for name in STRAGGLERS}
    rows: list[list] = []
    for seed in range(seeds):
        seeded = dataclasses.replace(base, seed=seed)
        of_downpour, of_others = Network(for_method(seeded, "downpour")), Network(seeded)
        for name, cluster in STRAGGLERS.items():
            for method in METHODS:
                config = for_method(seeded, method)
                log = event_log(SCHEDULES[method], config, cluster, params)
                network = of_downpour if method == "downpour" else of_others
                course = train_on(log, SCHEDULES[method], config, network)
                summary[name][method].append(course.seconds_to(TARGET))
                print(f"seed {seed}, {name}, {method}: {course.seconds_to(TARGET)} s to {TARGET:.0%},"
                      f" {course.center[-1]:.2%} after {course.seconds[-1]:.1f} s", flush=True)  # fmt: skip
                points = zip(course.seconds, course.steps, course.center, strict=True)
                rows += [[seed, name, method, f"{s:.3f}", f"{k:g}", f"{e:.5f}"] for s, k, e in points]
    return summary, rows


def draw_stragglers(summary: dict[str, Any]) -> Figure:
    """Plot a dot per method and seed at its time to the target; a seed that did not reach it has none."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    panels = figure.subplots(1, len(STRAGGLERS), sharex=True, sharey=True)
    for axes, name in zip(panels, STRAGGLERS, strict=True):
        for height, method in enumerate(reversed(METHODS)):
            times = [seconds for seconds in summary[name][method] if seconds is not None]
            axes.plot(times, [height] * len(times), "o", color=look(method).color, markersize=8)
        axes.set_yticks(range(len(METHODS)), [look(method).name for method in reversed(METHODS)])
        axes.set(title=name, xlabel=f"virtual seconds to {TARGET:.0%} error", xscale="log")
        axes.set_xticks([5, 10, 20, 40])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.grid(alpha=0.3, axis="x")
    return figure


def stragglers_table(summary: dict[str, Any]) -> str:
    lines = ["| method | " + " | ".join(STRAGGLERS) + " |", "|---" * (len(STRAGGLERS) + 1) + "|"]
    for method in METHODS:
        cells = []
        for name in STRAGGLERS:
            middle = float(np.median([np.inf if s is None else s for s in summary[name][method]]))
            cells.append("not reached" if np.isinf(middle) else f"{middle:.1f} s")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def downpour_line(tried: dict[str, float]) -> str:
    cells = [f"{divisor}: {error:.1%}" for divisor, error in tried.items()]
    return (
        f"DOWNPOUR's learning rate is divided by {DOWNPOUR_DIVISOR}, and it takes {DOWNPOUR_STEPS} times as many steps."
        f" By divisor, the error on held-out data after these steps: {', '.join(cells)}."
    )


def scaling() -> tuple[dict[str, Any], list[list]]:
    """Simulate costs for every cluster, method and number of workers."""
    methods = [method for method in METHODS if method != "downpour"]  # Its times are EASGD's.
    summary: dict[str, Any] = {}
    rows = []
    for name, machines in CLUSTERS.items():
        summary[name] = {"assumptions": dataclasses.asdict(machines.cluster) | machines._asdict(), "methods": {}}
        summary[name]["assumptions"].pop("cluster")
        params = jax.ShapeDtypeStruct((machines.parameters,), np.float32)
        for method in methods:
            found = []
            for size in SIZES:
                workers = min(size, machines.per_group)
                config = PRESETS["digits"].replace(
                    groups=size // workers, workers=workers, period=PERIOD,
                    global_period=GLOBAL_PERIOD if size > workers else None, steps=ROUNDS * GLOBAL_PERIOD,
                )  # fmt: skip
                if SCHEDULES[method].method != "lsgd":
                    config = dataclasses.replace(config, period=GLOBAL_PERIOD)
                cluster = dataclasses.replace(machines.cluster, servers=max(size // machines.per_server, 1))
                found.append(throughput(SCHEDULES[method], config, cluster, params).summary())
                numbers = [found[-1][of] for of in ("efficiency", "waiting", "exchanging", "mean_staleness")]
                rows.append([name, method, size, *(f"{number or 0:.4f}" for number in numbers)])
                print(*rows[-1], flush=True)
            summary[name]["methods"][method] = found
    return summary, rows


def draw_scaling(summary: dict[str, Any]) -> Figure:
    """Plot the share of time spent computing against the number of workers."""
    figure = Figure(figsize=(4 * len(summary), 3.6), layout="constrained")
    for axes, (name, of) in zip(figure.subplots(1, len(summary), sharey=True), summary.items(), strict=True):
        for method, found in of["methods"].items():
            axes.plot(SIZES, [100 * each["efficiency"] for each in found], marker=".", **look(method).line)
        axes.set(title=name, xlabel="workers", xscale="log", ylim=(0, 103))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("time spent computing (%)")
    figure.axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def scaling_table(summary: dict[str, Any]) -> str:
    lines = ["| machines | method | " + " | ".join(f"{size:,}" for size in SIZES) + " | lost with the most to |"]
    lines.append("|---" * (len(SIZES) + 3) + "|")
    for name, of in summary.items():
        for method, found in of["methods"].items():
            cells = " | ".join(f"{each['efficiency']:.0%}" for each in found)
            last = found[-1]
            lost = f"waiting {last['waiting']:.0%}, exchanging {last['exchanging']:.0%}"
            lines.append(f"| {name} | {method} | {cells} | {lost} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    summary, rows = scaling()
    columns = ["machines", "method", "workers", "efficiency", "waiting", "exchanging", "mean_staleness"]
    periods = {"period": PERIOD, "global_period": GLOBAL_PERIOD}
    write(arguments.out, "scaling", draw_scaling(summary), columns, rows, {**periods, "machines": summary})
    table = scaling_table(summary)
    (arguments.out / "scaling.md").write_text(table + "\n")
    print(table, flush=True)
    summary, rows = stragglers(arguments.seeds, arguments.steps)
    columns = ["seed", "stragglers", "method", "seconds", "steps", "center_error"]
    tried = tried_divisors(straggler_config(arguments.steps))
    about = {"target_error": TARGET, "seconds_to_target": summary, "environment": environment()}
    about |= {"downpour": {"divisor": DOWNPOUR_DIVISOR, "error_by_divisor_held_out": tried}}
    write(arguments.out, "stragglers", draw_stragglers(summary), columns, rows, about)
    table = stragglers_table(summary) + "\n\n" + downpour_line(tried)
    (arguments.out / "stragglers.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
