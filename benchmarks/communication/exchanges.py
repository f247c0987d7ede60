"""What it takes to give all workers the leader's parameters: bytes on the wire and time, over links of a limited rate.

    sudo python -m benchmarks.communication.exchanges

Every worker is a process on a host of its own (see network.py). Each way of sending is run from a new root every time,
all ways interleaved. Bytes are the kernel's counters of every host's link, with all headers. Times are those of the
slowest host, beside |x| / bandwidth, with |x| the parameters in float32. "average" is the mean of all workers'
parameters, as local SGD sends it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from benchmarks.communication.network import bytes_out, hosts
from lsgd_jax import distributed
from lsgd_jax.costs.ledger import rounded_collectives
from lsgd_jax.distributed import SHARED, STACKED, Placement, place
from lsgd_jax.exchange import broadcast_rounded, mean
from lsgd_jax.tracking.environment import environment

RESULTS = Path(__file__).parent / "results" / "exchanges.json"
WAYS: dict[str, dict[str, Any]] = {
    "all-reduce": {"method": "all_reduce"},
    "ring": {"method": "ring"},
    "chain": {"method": "chain"},
    "hierarchical, 2 groups": {"method": "hierarchical"},
    "all-reduce, bfloat16": {"method": "all_reduce", "wire": "bfloat16"},
    "chain, bfloat16": {"method": "chain", "wire": "bfloat16"},
    "chain, int8": {"method": "chain", "wire": "int8"},
}
ARRAYS = 8
"""Into which the parameters are parted."""
# Processes, Mbit/s, parameters and rounds.
GRID = [
    *[(processes, 200, 2_500_000, 7) for processes in (4, 8)],
    *[(processes, 50, 2_500_000, 3) for processes in (4, 8)],
    *[(processes, 1000, size, 3) for processes in (4, 8) for size in (250_000, 2_500_000, 10_000_000)],
    *[(processes, 200, size, 5) for processes in (2, 4, 8) for size in (10_000, 100_000, 1_000_000)],
]


def main() -> None:
    """Measure on all hosts, print the tables and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--on-host", help=argparse.SUPPRESS)  # What the processes are started with.
    arguments = parser.parse_args()
    if arguments.on_host:
        on_host(**json.loads(arguments.on_host), out=arguments.out)
        return
    arguments.out.parent.mkdir(exist_ok=True)
    measured: list[dict[str, Any]] = []
    for cell in GRID:
        measured.append(measure(*cell))
        arguments.out.write_text(json.dumps({"cells": measured, "environment": environment()}, indent=1) + "\n")
    print("\n".join(tables(measured)))


def measure(processes: int, megabits: float, parameters: int, rounds: int) -> dict[str, Any]:
    """Bytes of every host and the slowest's seconds, [rounds], by way."""
    settings = {"parameters": parameters, "rounds": rounds}
    with tempfile.TemporaryDirectory() as folder, hosts(processes, megabits) as net:
        command = [sys.executable, "-m", "benchmarks.communication.exchanges", "--out", folder]
        log = Path(folder) / "log"
        try:
            with log.open("w") as output:
                net.run([*command, "--on-host", json.dumps(settings)], output=output)
        except subprocess.SubprocessError:
            sys.exit(f"a process failed:\n{log.read_text()}")
        found = [json.loads((Path(folder) / f"{number}.json").read_text()) for number in range(processes)]
    cell: dict[str, Any] = {"processes": processes, "megabits": megabits, **settings, "ways": {}}
    for way in found[0]:
        cell["ways"][way] = {
            "bytes": np.mean([of_host[way]["bytes"] for of_host in found], axis=1).tolist(),
            "most_loaded": np.max([of_host[way]["bytes"] for of_host in found], axis=0).tolist(),
            "seconds": np.max([of_host[way]["seconds"] for of_host in found], axis=0).tolist(),
        }
    print(f"{processes} processes, {megabits} Mbit/s, {parameters:,} parameters: measured", flush=True)
    return cell


def on_host(parameters: int, rounds: int, out: Path) -> None:
    """One worker's part: run every way and write what it sent and how long it took."""
    distributed.initialize()
    workers = distributed.process_count()
    pairs = place(2, workers // 2)
    rng = np.random.default_rng(distributed.process_index())
    tree = {str(i): rng.normal(size=(1, parameters // ARRAYS)).astype(np.float32) for i in range(ARRAYS)}
    x, last = pairs.put(tree, STACKED), pairs.put(jax.tree.map(np.zeros_like, tree), STACKED)
    programs = {"average": over(pairs, lambda x, last, root: mean(x, pairs.axes))}
    for way, options in WAYS.items():
        send = partial(broadcast_rounded, axis_name=pairs.axes, **({"wire": None} | options))
        programs[way] = over(pairs, lambda x, last, root, send=send: send(x, root, last=last))
    measured: dict[str, dict[str, list]] = {way: {"bytes": [], "seconds": []} for way in programs}
    for i in range(-1, rounds):  # Once to compile.
        root = np.int32((3 * i + 1) % workers)
        for way, program in programs.items():
            multihost_utils.sync_global_devices(f"{way} {i}")
            before, start = bytes_out(), time.perf_counter()
            jax.block_until_ready(program(x, last, root))
            seconds = time.perf_counter() - start
            multihost_utils.sync_global_devices(f"{way} {i}, all received")
            if i >= 0:
                measured[way]["seconds"].append(seconds)
                measured[way]["bytes"].append(bytes_out() - before)
    (out / f"{distributed.process_index()}.json").write_text(json.dumps(measured))


def over(placement: Placement, send: Callable) -> Callable:
    """A compiled function of all workers' trees and the root."""

    def one(x: Any, last: Any, root: jax.Array) -> tuple[Any]:
        here = jax.lax.axis_index(placement.axes) >= 0  # Types what is equal on all workers as each one's own.
        return (jax.tree.map(lambda y: jnp.where(here, y, y), send(x, last, root)),)

    return jax.jit(placement.over_workers(one, (STACKED, STACKED, SHARED), (STACKED,)))


def tables(cells: list[dict[str, Any]]) -> list[str]:
    """Bytes and times as markdown."""
    lines = []
    for cell in cells:
        size = 4 * cell["parameters"]
        average = cell["ways"]["average"]
        lines += [
            "",
            f"{cell['processes']} processes, {cell['megabits']} Mbit/s, |x| = {size / 1e6:g} MB",
            "",
            "| way | sent / x | by formula | most loaded | beside average | time · bandwidth / x | beside average |",
            "|---|---|---|---|---|---|---|",
        ]
        for way, of in cell["ways"].items():
            sent, seconds = np.mean(of["bytes"]), np.median(of["seconds"])
            columns = (
                f"{sent / size:.3f}",
                f"{formula(way, cell) / size:.3f}",
                f"{np.mean(of['most_loaded']) / size:.3f}",
                f"{sent / np.mean(average['bytes']):.2f}",
                f"{seconds * cell['megabits'] * 1e6 / 8 / size:.2f}",
                f"{seconds / np.median(average['seconds']):.2f}",
            )
            lines.append(f"| {way} | {' | '.join(columns)} |")
    return lines


def formula(way: str, cell: dict[str, Any]) -> float:
    """What the ledger counts for a worker, on average."""
    options = WAYS.get(way, {"method": "all_reduce"})
    leaves = [jax.ShapeDtypeStruct((cell["parameters"] // ARRAYS,), np.float32)] * ARRAYS
    parts = rounded_collectives(leaves, (2, cell["processes"] // 2), options["method"], options.get("wire"))
    return sum(part.sent * (part.times or 0) for part in parts)


if __name__ == "__main__":
    main()
