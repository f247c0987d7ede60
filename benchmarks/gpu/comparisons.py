"""Tuned comparisons like those of the paper's Figures 4 and 5, on the images that a package ships, with a small budget.

Each method trains in a process of its own; then one comparison of all of them finds their runs and sums them up.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.gpu.part import Record

SMALL = "--width 0.05 --workers 2 --steps 4 --eval-every 4 --tune-learning-rates 0.01 --seeds 0"
COMPARISONS = {
    "F4-like: CNN7 on 5,000 images of MNIST, 4 workers": (
        "cnn7-mnist5k-4 --width 1 --steps 600 --eval-every 60 --seeds 0..1"
    ),
    "F5-like: ResNet20 on 5,000 images of MNIST, 4 workers": (
        "cnn7-mnist5k-4 --model resnet20 --width 1 --batch-size 32 --steps 400 --eval-every 40"
        " --tune-learning-rates 0.03 0.1 --seeds 0"
    ),
}
METHODS = ("lsgd", "easgd", "downpour", "data_parallel")


def measure(record: Record, small: bool) -> None:
    """Train and compare."""
    comparisons = {"F4-like, as small as it goes": f"cnn7-mnist5k-4 {SMALL}"} if small else COMPARISONS
    methods = METHODS[:2] if small else METHODS

    def compare(name: str) -> None:
        with record.attempt(name), tempfile.TemporaryDirectory() as folder:
            record.keep(name, compared(comparisons[name].split(), methods, Path(folder)))

    with ThreadPoolExecutor() as pool:
        list(pool.map(compare, comparisons))


def compared(options: list[str], methods: tuple[str, ...], folder: Path) -> dict:
    """The summary of a comparison whose methods train at the same time."""
    cache = folder / "compiled"

    def train(method: str) -> None:
        lsgd("compare", *options, "--tune", "--methods", method, "--out", str(folder / method), cache=cache)

    with ThreadPoolExecutor() as pool:
        list(pool.map(train, methods))
    together = folder / methods[0]
    for method in methods[1:]:
        shutil.copytree(folder / method / method, together / method)
    command = ["compare", *options, "--tune", "--methods", ",".join(methods)]
    lsgd(*command, "--out", str(together), cache=cache)
    summary = json.loads((together / "comparison.json").read_text())
    table = (together / "comparison.md").read_text().splitlines()
    return {"command": " ".join(["lsgd", *command]), "table": table, "methods": summary["methods"]}


def lsgd(*arguments: str, cache: Path) -> None:
    """Run the `lsgd` command."""
    variables = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, "-m", "lsgd_jax", *arguments]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"lsgd {' '.join(arguments)}: {done.stderr[-600:] or done.stdout[-600:]}")
