"""The allocator keeps memory where JAX runs on CPUs, unless it is told not to."""

import os
import subprocess
import sys

import pytest

FREED = """
import importlib.util, resource, sys, threading
from pathlib import Path
from lsgd_jax.cli.allocator import keep_memory

def has_libtpu(name):
    return object() if name == "libtpu" and "with libtpu" in sys.argv else None

importlib.util.find_spec = has_libtpu
keep_memory()

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

def use():  # As a step does in a thread of XLA's.
    before = resident()
    array = bytearray(b"1") * 50_000_000
    del array
    print(resident() - before)

thread = threading.Thread(target=use)
thread.start()
thread.join()
"""


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
def test_what_is_freed_is_kept_or_goes_back(environment, arguments, keeps):
    others = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "JAX_", "LSGD_"))
    }
    command = [sys.executable, "-c", FREED, *arguments]
    said = subprocess.run(command, env=others | environment, capture_output=True, text=True, check=True, timeout=60)
    kept = int(said.stdout)
    assert kept > 40_000_000 if keeps else kept < 10_000_000


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
