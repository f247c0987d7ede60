"""Faults to try a run with: stops, kills, numbers that are not, damaged files, full disks."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from lsgd_jax import train
from lsgd_jax.exchange import worker_index

ROOT = Path(__file__).parents[2]
LSGD = [sys.executable, "-m", "lsgd_jax"]
HANG = 300
"""Seconds after which a process hangs."""


def stop_after(monkeypatch, programs, number):
    """Let the training loop find a signal after so many programs."""

    @contextlib.contextmanager
    def deferred_signals():
        calls = itertools.count(1)
        yield lambda: number if next(calls) >= programs else None

    monkeypatch.setattr(train, "deferred_signals", deferred_signals)


def poison(monkeypatch, steps, workers):
    """Let the gradients of some workers be NaN on some steps, counted from 0."""
    make_optimizer = train.make_optimizer

    def poisoned(config, placement):
        optimizer = make_optimizer(config, placement)

        def update(updates, state, params=None, *, step, **extra):
            hit = jnp.isin(worker_index(placement.axes), jnp.array(workers)) & jnp.isin(step, jnp.array(steps))
            updates = jax.tree.map(lambda u: jnp.where(hit, jnp.nan, u), updates)
            return optimizer.update(updates, state, params, step=step, **extra)

        return optax.GradientTransformationExtraArgs(optimizer.init, update)

    monkeypatch.setattr(train, "make_optimizer", poisoned)


def files(folder):
    """All that are not empty: some repeat what others hold, and not all are read."""
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 0]


def flip_a_bit(path):
    """In the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path, share):
    """A file, to a share of its length."""
    os.truncate(path, int(path.stat().st_size * share))


def environment(**changed):
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "COLUMNS": "200"} | changed


def run(*command, cwd, **options):
    """A process, to its end."""
    return subprocess.run(
        command, capture_output=True, text=True, timeout=HANG, check=False, cwd=cwd, env=environment(), **options
    )


@contextlib.contextmanager
def running(*command, cwd):
    """A process, killed in the end if it has not ended."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment()
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for_step(run_dir, step):
    """Until a run has logged an event of this step or of a later one."""
    metrics, end = run_dir / "metrics.jsonl", time.monotonic() + HANG
    while time.monotonic() < end:
        lines = metrics.read_text().split("\n")[:-1] if metrics.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run_dir} has not come to step {step}")


def children(pid):
    """The processes that a process has started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]
