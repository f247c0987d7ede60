"""How much of a broadcast is hidden behind the steps of the next period, as a delayed pull allows.

    sudo python -m benchmarks.communication.overlap

Four processes on hosts of their own with links of 200 Mbit/s (see network.py), 10 MB of parameters, sent by a chain.
In a round, every process takes its steps and either then waits for the broadcast (a pull at once) or has it running on
a thread of its own meanwhile (delay=1). What is exposed is the time that the broadcast adds to the steps', as a share
of the time it takes alone. Steps either leave the cores idle, as those of an accelerator do, or compute: four processes
share this machine's cores.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from benchmarks.communication.exchanges import ARRAYS, over
from benchmarks.communication.network import hosts
from lsgd_jax import distributed
from lsgd_jax.distributed import STACKED, place
from lsgd_jax.exchange import broadcast_from
from lsgd_jax.tracking.environment import environment

RESULTS = Path(__file__).parent / "results" / "overlap.json"
PROCESSES, MEGABITS, PARAMETERS = 4, 200, 2_500_000
STEPS_LAST = 1.0
"""Seconds of the steps of a round, when nothing else is done: about twice a broadcast."""


def main() -> None:
    """Measure on all hosts, print the shares and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--on-host", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.on_host:
        on_host(arguments.rounds, arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder, hosts(PROCESSES, MEGABITS) as net:
        command = [sys.executable, "-m", "benchmarks.communication.overlap", "--on-host", "--out", folder]
        log = Path(folder) / "log"
        try:
            with log.open("w") as output:
                net.run([*command, "--rounds", str(arguments.rounds)], output=output)
        except subprocess.SubprocessError:
            sys.exit(f"a process failed:\n{log.read_text()}")
        found = [json.loads((Path(folder) / f"{number}.json").read_text()) for number in range(PROCESSES)]
    seconds = {name: np.max([of_host[name] for of_host in found], axis=0) for name in found[0]}
    result: dict[str, Any] = {"seconds": {name: values.tolist() for name, values in seconds.items()}, "exposed": {}}
    print("| steps | control | pull at once | delayed pull |\n|---|---|---|---|")
    for kind in ("idle", "computing"):
        result["exposed"][kind] = {
            way: interval(seconds[f"{kind}: {way}"], seconds[f"{kind}: steps"], seconds["broadcast"])
            for way in ("control", "pull at once", "delayed pull")
        }
        cells = (f"{of['share']:.2f} [{of['low']:.2f}, {of['high']:.2f}]" for of in result["exposed"][kind].values())
        print(f"| {kind} | {' | '.join(cells)} |")
    settings = {"processes": PROCESSES, "megabits": MEGABITS, "parameters": PARAMETERS, "rounds": arguments.rounds}
    arguments.out.write_text(json.dumps({**settings, **result, "environment": environment()}, indent=1) + "\n")


def interval(with_broadcast: np.ndarray, steps: np.ndarray, broadcast: np.ndarray) -> dict[str, float]:
    """The exposed share of a broadcast, of medians, with a 95 % bootstrap interval over rounds."""
    rounds = np.random.default_rng(0).integers(len(steps), size=(2000, len(steps)))
    shares = (np.median(with_broadcast[rounds], 1) - np.median(steps[rounds], 1)) / np.median(broadcast[rounds], 1)
    low, high = np.quantile(shares, [0.025, 0.975])
    share = (np.median(with_broadcast) - np.median(steps)) / np.median(broadcast)
    return {"share": float(share), "low": float(low), "high": float(high)}


def on_host(rounds: int, out: Path) -> None:
    """One worker's part: time every kind of round and write the seconds."""
    distributed.initialize()
    placement = place(1, distributed.process_count())
    tree = {str(i): np.full((1, PARAMETERS // ARRAYS), float(i), np.float32) for i in range(ARRAYS)}
    x = placement.put(tree, STACKED)
    send = over(placement, lambda x, last, root: broadcast_from(x, root, placement.axes, method="chain"))

    def broadcast(number: int) -> None:
        jax.block_until_ready(send(x, x, np.int32(number % placement.shape[1])))

    def at_once(steps: Callable[[], None], number: int) -> None:
        steps()
        broadcast(number)

    def delayed(steps: Callable[[], None], number: int) -> None:
        sending = threading.Thread(target=broadcast, args=(number,))
        sending.start()
        steps()
        sending.join()

    programs: dict[str, Callable[[int], None]] = {"broadcast": broadcast}
    for kind, steps in (("idle", partial(time.sleep, STEPS_LAST)), ("computing", computing())):
        programs[f"{kind}: steps"] = programs[f"{kind}: control"] = lambda number, steps=steps: steps()
        programs[f"{kind}: pull at once"] = partial(at_once, steps)
        programs[f"{kind}: delayed pull"] = partial(delayed, steps)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for i in range(-1, rounds):  # Once to compile.
        for name in np.random.default_rng(i + 1).permutation(list(programs)):
            multihost_utils.sync_global_devices(f"{name} {i}")
            start = time.perf_counter()
            programs[name](i + 1)
            if i >= 0:
                seconds[name].append(time.perf_counter() - start)
    (out / f"{distributed.process_index()}.json").write_text(json.dumps(seconds))


def computing() -> Callable[[], None]:
    """Steps that compute, about as long as `STEPS_LAST` on cores that others use too."""
    step = jax.jit(lambda x: jnp.tanh(x @ x))
    x = jnp.full((300, 300), 1e-3)
    jax.block_until_ready(step(x))
    multihost_utils.sync_global_devices("calibration")
    start, count = time.perf_counter(), 50
    for _ in range(count):
        jax.block_until_ready(step(x))
    own = np.float32((time.perf_counter() - start) / count)
    count = round(STEPS_LAST / float(np.max(multihost_utils.process_allgather(own))))

    def steps() -> None:
        y = x
        for _ in range(count):
            y = jax.block_until_ready(step(y))

    return steps


if __name__ == "__main__":
    main()
