"""What the board of posted workers costs and how soon it notices deaths, with 3, 8 and 32 processes that only post.

    python -m benchmarks.asynchronous.gossip

Each process posts 20 times a second. After a while at rest, some are killed and replaced, and then some are stopped and
continued, one at a time. A false death is that of a process that was neither killed nor stopped.
"""

import argparse
import json
import multiprocessing
import multiprocessing.connection
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from lsgd_jax.asynchronous import Post
from lsgd_jax.asynchronous.gossip import GossipBoard
from lsgd_jax.tracking.environment import environment

RESULTS = Path(__file__).parent / "results" / "gossip.json"
SIZES = (3, 8, 32)
SECRET = bytes(32)
PARAMS = {"w": np.zeros((1, 1, 1000), np.float32)}
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["lsgd_jax.asynchronous.gossip"])
HANG = 120
"""Seconds after which something is wrong."""


def take_part(folder: Path, position: int, pipe: Connection) -> None:
    """Post without end; send what is seen of the others, and answer with this process's CPU time when asked for it."""

    def log(name: str, **values: Any) -> None:
        seen.append((name, values))

    seen: list = []
    board = GossipBoard(folder, [position], PARAMS, secret=SECRET, log=log)
    step = board.steps[position]
    while True:
        step += 1
        board.write(position, step, Post(board.life, step, 1.0, True, PARAMS))
        board.read()
        while seen:
            pipe.send(seen.pop(0))
        if pipe.poll(0.05):
            pipe.recv()
            pipe.send(("cpu", time.process_time()))


class Members:
    """The processes, and what they see of each other."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.processes: dict[int, Any] = {}
        self.pipes: dict[int, Connection] = {}
        self.seen: list[tuple[str, dict]] = []
        self.cpu: dict[int, float] = {}
        for position in range(count):
            self.start(position)

    def start(self, position: int) -> None:
        """Start the process of a worker."""
        self.pipes[position], pipe = CONTEXT.Pipe()
        process = CONTEXT.Process(target=take_part, args=(self.folder, position, pipe), daemon=True)
        process.start()
        pipe.close()
        self.processes[position] = process

    def listen(self, seconds: float) -> None:
        """Collect what the processes send."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            ready = multiprocessing.connection.wait(list(self.pipes.values()), left)
            for position, pipe in [item for item in self.pipes.items() if item[1] in ready]:
                try:
                    name, value = pipe.recv()
                except (EOFError, ConnectionError):
                    del self.pipes[position]
                    continue
                if name == "cpu":
                    self.cpu[position] = value
                else:
                    self.seen.append((name, value))

    def until(self, condition: Callable[[], bool]) -> None:
        """Listen until a condition holds."""
        end = time.monotonic() + HANG
        while not condition():
            assert time.monotonic() < end, "it takes too long"
            self.listen(0.05)

    def cpu_seconds(self) -> float:
        """CPU time of all processes so far."""
        self.cpu = {}
        for pipe in self.pipes.values():
            pipe.send(None)
        self.until(lambda: len(self.cpu) == self.count)
        return sum(self.cpu.values())

    def delays(self, name: str, position: int, begun: float, by: set[int]) -> list[float]:
        """Wait until these processes have seen an event of a worker since a time; returns after how long each has."""

        def seen() -> dict[int, float]:
            times: dict[int, float] = {}
            for event, values in self.seen:
                if event == name and values["worker"] == position and values["seconds"] >= begun:
                    times.setdefault(values["seen_by"], values["seconds"] - begun)
            return times

        self.until(lambda: by <= seen().keys())
        return [delay for who, delay in seen().items() if who in by]

    def end(self) -> None:
        """Kill all processes."""
        for process in self.processes.values():
            process.kill()
            process.join()


def measure(count: int, seconds: float, faults: int, rng: random.Random) -> dict[str, Any]:
    """Measure with some processes."""
    noticed: dict[str, list[float]] = {"killed": [], "replaced": [], "stopped": [], "continued": []}
    with tempfile.TemporaryDirectory() as folder:
        members = Members(Path(folder), count)
        try:
            for position in range(count):
                members.delays("alive", position, 0.0, set(range(count)) - {position})
            members.listen(2.0)
            before, begun = members.cpu_seconds(), time.monotonic()
            members.listen(seconds)
            cpu = (members.cpu_seconds() - before) / (time.monotonic() - begun) / count
            for _ in range(faults):
                victim = rng.randrange(count)
                others, now = set(range(count)) - {victim}, time.time()
                os.kill(members.processes[victim].pid, signal.SIGKILL)
                noticed["killed"] += members.delays("dead", victim, now, others)
                now = time.time()
                members.start(victim)
                noticed["replaced"] += members.delays("alive", victim, now, others)
                members.listen(rng.random())
            for _ in range(faults):
                victim = rng.randrange(count)
                others, now = set(range(count)) - {victim}, time.time()
                os.kill(members.processes[victim].pid, signal.SIGSTOP)
                noticed["stopped"] += members.delays("dead", victim, now, others)
                now = time.time()
                os.kill(members.processes[victim].pid, signal.SIGCONT)
                noticed["continued"] += members.delays("alive", victim, now, others)
                members.listen(rng.random())
        finally:
            members.end()
    deaths = sum(name == "dead" for name, _ in members.seen)
    return {
        "CPU milliseconds per second and process": 1000 * cpu,
        "seconds until noticed, median and longest": {
            name: [float(np.median(delays)), max(delays)] for name, delays in noticed.items()
        },
        "false deaths": deaths - len(noticed["killed"]) - len(noticed["stopped"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="at rest, over which CPU time is measured")
    parser.add_argument("--faults", type=int, default=10, help="kills, and as many stops")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    rng, results = random.Random(arguments.seed), {}
    kinds = ("killed", "replaced", "stopped", "continued")
    print(f"| processes | CPU ms per s and process | {' | '.join(kinds)} | false deaths |")
    print("|---" * (len(kinds) + 3) + "|")
    for count in SIZES:
        results[f"{count} processes"] = result = measure(count, arguments.seconds, arguments.faults, rng)
        cpu, delays, wrong = result.values()
        shown = [f"{median:.2f} s ({longest:.2f})" for median, longest in (delays[kind] for kind in kinds)]
        print(f"| {count} | {cpu:.1f} | {' | '.join(shown)} | {wrong} |", flush=True)
    settings = {"seconds": arguments.seconds, "faults": arguments.faults, "seed": arguments.seed}
    content = {"settings": settings, "results": results, "environment": environment()}
    arguments.out.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
