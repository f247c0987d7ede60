"""What a result depends on besides the configuration: versions, machine, devices, settings, commit."""

import functools
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from lsgd_jax.distributed import process_count

_SETTINGS = ("jax_enable_x64", "jax_default_prng_impl", "jax_threefry_partitionable", "jax_default_matmul_precision")
"""JAX settings that change what a run computes."""


def environment() -> dict[str, Any]:
    """What a result depends on besides the configuration: versions, machine, devices, JAX settings, command."""
    packages = ("lsgd-jax", "jax", "jaxlib", "flax", "optax", "numpy")
    device = jax.devices()[0]
    return {
        "command": _command(),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {package: installed_version(package) for package in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "processes": process_count(),
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "settings": {name: getattr(jax.config, name) for name in _SETTINGS} | {"XLA_FLAGS": os.getenv("XLA_FLAGS", "")},
    }


@functools.cache
def _commit() -> str:
    """The git commit of the package's source tree, if it is used from a clone, as it was at the first run."""
    root = Path(__file__).parents[2]
    git = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        if (root / ".git").exists():
            return subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return "unknown"


def installed_version(package: str) -> str:
    """The version of a package; "not installed" also for this one, where its source tree is used as it is."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _command() -> str:
    """The command line of this process, without the path of a script."""
    module = getattr(sys.modules["__main__"], "__spec__", None)  # Only `python -m` sets it.
    program = f"python -m {module.name.removesuffix('.__main__')}" if module else Path(sys.argv[0]).name
    return " ".join(["lsgd" if program == "python -m lsgd_jax" else program, *sys.argv[1:]])
