"""What a training step costs on a CPU with 2 threads, beside the same network and step in PyTorch.

    python -m benchmarks.speed.step_vs_torch

A step is forward, backward and SGD with Nesterov momentum and weight decay, on 128 pictures of 28 x 28, of CNN7 and of
ResNet20. Beside it: the step with XLA's own convolution; a round of 4 steps in a `lax.scan`, and the step under
`jax.vmap` over 4 workers, each against four steps. The controls time the same program twice.

All of it runs twice: as it is, and with the C library's allocator told by environment variables, which it reads when a
process starts, to keep the memory that a program frees. A step asks anew for the memory of all its intermediate values;
by default these large blocks go back to the system each time, and the next step waits for tens of thousands of page
faults.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks.speed.interleaved import ratio, report, time_interleaved
from benchmarks.speed.training import Running, jax_step
from lsgd_jax.models import CNN7, ResNet20

BATCH, PICTURE, CLASSES, STEPS, THREADS = 128, (28, 28, 3), 10, 4, 2
ALLOCATORS: dict[str, dict[str, str]] = {
    "default allocator": {},
    "keeping allocator": {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": "10000000000",
        "MALLOC_TOP_PAD_": "268435456",
    },
}


def batches() -> tuple[np.ndarray, np.ndarray]:
    """Pictures and labels for a round of steps, or for as many workers."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((STEPS, BATCH, *PICTURE), np.float32)
    return x, rng.integers(CLASSES, size=(STEPS, BATCH), dtype=np.int32)


def jax_programs(network: Callable[..., nnx.Module]) -> dict[str, Callable[[], None]]:
    """The step, alone and in its company."""
    step, state = jax_step(network(PICTURE, CLASSES, rngs=nnx.Rngs(0)))
    stock = network(PICTURE, CLASSES, rngs=nnx.Rngs(0))
    for _, module in nnx.iter_modules(stock):
        if isinstance(module, nnx.Conv):
            module.conv_general_dilated = lax.conv_general_dilated
    x, y = (jnp.asarray(part) for part in batches())
    each = list(zip(x, y, strict=True))
    workers = jax.tree.map(lambda leaf: jnp.stack([leaf] * STEPS), state)
    return {
        "step": Running(step, state, each[:1]),
        "control": Running(step, state, each[:1]),
        "stock convolution": Running(*jax_step(stock), each[:1]),
        "steps": Running(step, state, each),
        "control of steps": Running(step, state, each),
        "round": Running(
            lambda state, round: lax.scan(lambda s, b: (step(s, b), None), state, round)[0], state, [(x, y)]
        ),
        "workers": Running(jax.vmap(step), workers, [(x, y)]),
    }


def torch_step(network: Callable[..., nnx.Module]) -> Callable[[], None]:
    """The same step of the same network in PyTorch."""
    import torch

    from benchmarks.speed import torch_training

    torch.set_num_threads(THREADS)
    x, y = (torch.from_numpy(part[0]) for part in batches())
    model = torch_training.network(network.__name__, CLASSES)
    return torch_training.torch_program(model, x.permute(0, 3, 1, 2), y.long())


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """The ratios of this process."""
    results = {}
    for network in (CNN7, ResNet20):
        programs = {**jax_programs(network), "torch": torch_step(network)}
        seconds = time_interleaved(programs, rounds)
        for name, base in (
            ("control", "step"),
            ("stock convolution", "step"),
            ("torch", "step"),
            ("control of steps", "steps"),
            ("round", "steps"),
            ("workers", "steps"),
        ):
            results[f"{network.__name__}: {name} / {base}"] = ratio(seconds[name], seconds[base])
        for name in ("step", "torch"):
            print(f"{network.__name__}: {name}: {BATCH / np.median(seconds[name]):.0f} samples/s", file=sys.stderr)
    return results


def main() -> None:
    """Time, print and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="times that every program is timed")
    parser.add_argument("--here", action="store_true", help="time in this process only, and print JSON")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.error("PyTorch is missing: pip install torch==2.13.0.")
    if arguments.here:
        print(json.dumps(measure(arguments.rounds)))
        return
    results: dict[str, dict[str, float]] = {}
    for allocator, variables in ALLOCATORS.items():
        print(allocator, *(f"{name}={value}" for name, value in variables.items()), flush=True)
        command = [sys.executable, "-m", "benchmarks.speed.step_vs_torch", "--here", f"--rounds={arguments.rounds}"]
        output = subprocess.run(command, env=os.environ | variables, check=True, stdout=subprocess.PIPE).stdout
        results |= {f"{allocator}: {name}": result for name, result in json.loads(output).items()}
    settings = {"batch": BATCH, "picture": PICTURE, "steps and workers": STEPS, "threads": THREADS}
    report("step_vs_torch", results, settings | {"rounds": arguments.rounds, "allocators": ALLOCATORS})


if __name__ == "__main__":
    main()
