"""Faults to try a run with: stops, kills, numbers that are not, damaged files, full disks."""

import contextlib
import errno
import gc
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from lsgd_jax import distributed
from lsgd_jax import files as lsgd_files
from lsgd_jax.distributed.launch import _free_port
from lsgd_jax.exchange import worker_index
from lsgd_jax.train import loop, setup

ROOT = Path(__file__).parents[2]
LSGD = [sys.executable, "-m", "lsgd_jax"]
HANG = 300
"""Seconds after which a process hangs."""

SOAK = "LSGD_SOAK" in os.environ
"""Whether to try many times what the tests try once: `make soak`."""
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("lsgd_jax.train", "lsgd_jax.compare", "lsgd_jax.figures.run", "lsgd_jax.figures.simulation"),
        *("lsgd_jax.cli.launch", "lsgd_jax.data.preparation", "tests.reliability.commands", "tests.test_notebooks"),
    ]
)


def _here(function, arguments, processes, process, address):
    """What each process does that `together` starts."""
    gc.freeze()
    jax.config.update("jax_platforms", "cpu")
    if processes > 1:
        names = (distributed.COORDINATOR, "JAX_COORDINATOR_BIND_ADDRESS", distributed.PROCESSES, distributed.PROCESS)
        os.environ |= dict(zip(names, (address, address, str(processes), str(process)), strict=True))
        distributed.initialize()
    function(*arguments)
    if processes > 1:
        jax.distributed.shutdown()


@contextlib.contextmanager
def together(processes, function, *arguments):
    """Processes of one run that call a function, forked from one that has imported what they need; in the end they are
    killed."""
    address = f"127.0.0.1:{_free_port()}"
    started = [
        FORKS.Process(target=_here, args=(function, arguments, processes, process, address))
        for process in range(processes)
    ]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def called(processes, function, *arguments):
    """Call a function in so many processes of one run, to the end."""
    with together(processes, function, *arguments) as started:
        for process in started:
            process.join(HANG)
    assert [process.exitcode for process in started] == [0] * processes


def train_here(config, path, resume):
    """Train in this process, which has no devices yet."""
    distributed.simulate_devices(config.groups * config.workers * config.chips_per_worker)
    loop.train_and_evaluate(config, path, lines=False, resume=resume)


def training(config, path, processes, *, resume=False):
    """Processes that train; in the end they are killed."""
    return together(processes, train_here, config, path, resume)


def trained(config, path, processes, *, resume=False):
    """Train to the end in so many processes; one is this one."""
    if processes == 1:
        loop.train_and_evaluate(config, path, lines=False, resume=resume)
    else:
        called(processes, train_here, config, path, resume)


def killed(config, path, processes, lines, rng, *, resume):
    """Train until the metrics have so many lines, and a little longer; returns whether it was not over before."""
    metrics, end = path / "metrics.jsonl", time.monotonic() + HANG
    with training(config, path, processes, resume=resume) as started:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert time.monotonic() < end, "it hangs"
            assert all(process.exitcode in (None, 0) for process in started), "it has failed"
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))
        rng.choice(started).kill()
    return any(process.exitcode == -signal.SIGKILL for process in started)


def stop_after(monkeypatch, programs, number):
    """Let the training loop find a signal after so many programs."""

    @contextlib.contextmanager
    def deferred_signals():
        calls = itertools.count(1)
        yield lambda: number if next(calls) >= programs else None

    monkeypatch.setattr(loop, "deferred_signals", deferred_signals)


def poison(monkeypatch, steps, workers):
    """Let the gradients of some workers be NaN on some steps, counted from 0."""
    make_optimizer = setup.make_optimizer

    def poisoned(config, placement):
        optimizer = make_optimizer(config, placement)

        def update(updates, state, params=None, *, step, **extra):
            hit = jnp.isin(worker_index(placement.axes), jnp.array(workers)) & jnp.isin(step, jnp.array(steps))
            updates = jax.tree.map(lambda u: jnp.where(hit, jnp.nan, u), updates)
            return optimizer.update(updates, state, params, step=step, **extra)

        return optax.GradientTransformationExtraArgs(optimizer.init, update)

    monkeypatch.setattr(setup, "make_optimizer", poisoned)


def files(folder):
    """All that are not empty: some repeat what others hold, and not all are read."""
    return [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size > 0]


def fill_disk(monkeypatch, *names):
    """Let there be no room for files and folders of some names, however far they have been written."""
    replacing, mkdir = lsgd_files.replacing, os.mkdir

    def refuse(path):
        if Path(path).name in names:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    @contextlib.contextmanager
    def replacing_until_full(path):
        with replacing(path) as file:
            yield file
            refuse(path)

    def mkdir_unless_full(path, *arguments, **options):
        refuse(path)
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(lsgd_files, "replacing", replacing_until_full)
    monkeypatch.setattr(os, "mkdir", mkdir_unless_full)


def flip_a_bit(path, at=0.5):
    """In the middle of a file, or at another share of its length."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
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


def until(condition):
    """Wait for a condition."""
    end = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < end, "it hangs"
        time.sleep(0.01)


def wait_for_step(run_dir, step):
    """Until a run has logged an event of this step or of a later one."""
    files, end = ("metrics.jsonl", "events-0.jsonl"), time.monotonic() + HANG
    while time.monotonic() < end:
        texts = [(run_dir / name).read_text() for name in files if (run_dir / name).exists()]
        lines = [line for text in texts for line in text.split("\n")[:-1]]
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run_dir} has not come to step {step}")


def children(pid):
    """The processes that a process has started."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # The thread has ended.
            found += map(int, (task / "children").read_text().split())
    return found
