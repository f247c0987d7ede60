"""The allocator keeps memory where JAX runs on CPUs, unless it is told not to."""

import os
import subprocess
import sys

import pytest

FREED_TWICE = """
import importlib.util, resource, sys, threading
from lsgd_jax.cli.allocator import keep_memory

def has_libtpu(name):
    return object() if name == "libtpu" and "with libtpu" in sys.argv else None

importlib.util.find_spec = has_libtpu
keep_memory()

def use():  # As a step does that leaves its arrays in a thread of XLA's.
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        array = bytearray(b"1") * 50_000_000
        del array
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=use)
thread.start()
thread.join()
"""
PAGES = 50_000_000 // 4096


@pytest.mark.parametrize(
    ("environment", "arguments", "keeps"),
    [
        ({}, [], True),
        ({"LSGD_KEEP_MEMORY": "0"}, [], False),
        ({"MALLOC_ARENA_MAX": "2"}, [], False),
        ({}, ["with libtpu"], False),
        ({"JAX_PLATFORMS": "cpu"}, ["with libtpu"], True),
    ],
)
def test_pages_are_cleared_once_or_at_each_step(environment, arguments, keeps):
    others = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "JAX_"))}
    command = [sys.executable, "-c", FREED_TWICE, *arguments]
    said = subprocess.run(command, env=others | environment, capture_output=True, text=True, check=True, timeout=60)
    cleared = int(said.stdout)
    assert cleared < PAGES / 10 if keeps else cleared > PAGES / 2


def test_the_command_sets_it_up_before_jax_is_imported():
    program = """
import sys
from lsgd_jax import __main__
from lsgd_jax.cli import allocator

allocator.keep_memory = lambda: sys.exit(4 if "jax" in sys.modules else 3)
sys.argv = ["lsgd", "info"]
__main__.main()
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 3
