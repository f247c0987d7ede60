"""What a training step costs on a CPU with 2 threads, beside the same network and step in PyTorch.

    python -m benchmarks.speed.step_vs_torch

A step is forward, backward and SGD with Nesterov momentum and weight decay, on 128 pictures of 28 x 28, of CNN7 and of
ResNet20. Beside it: the step with XLA's own convolution; a round of 4 steps in a `lax.scan`, and the step under
`jax.vmap` over 4 workers, each against four steps. In processes of their own, the steps of 4 workers with a simulated
device each, as `lsgd` trains, beside those with XLA's own convolution and four steps of PyTorch. The controls time the
same program twice.

All of it runs twice: as it is, and with the C library's allocator told by environment variables, which it reads when a
process starts, to keep the memory that a program frees. A step asks anew for the memory of all its intermediate values;
by default these large blocks go back to the system each time, and the next step waits for tens of thousands of page
faults.
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.speed.interleaved import ratio, report, time_interleaved
from benchmarks.speed.training import Running, jax_step
from lsgd_jax.distributed import simulate_devices
from lsgd_jax.models import CNN7, ResNet20

BATCH, PICTURE, CLASSES, STEPS, THREADS = 128, (28, 28, 3), 10, 4, 2
PLACES = ("one", "devices")
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


def models(network: Callable[..., nnx.Module]) -> tuple[nnx.Module, nnx.Module]:
    """The network, and the same with XLA's own convolution."""
    ours, stock = (network(PICTURE, CLASSES, rngs=nnx.Rngs(0)) for _ in range(2))
    for _, module in nnx.iter_modules(stock):
        if isinstance(module, nnx.Conv):
            module.conv_general_dilated = lax.conv_general_dilated
    return ours, stock


def on_one_device(network: Callable[..., nnx.Module]) -> dict[str, Callable[[], None]]:
    """The step, alone and in its company."""
    ours, stock = models(network)
    step, state = jax_step(ours)
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


def on_devices(network: Callable[..., nnx.Module]) -> dict[str, Callable[[], None]]:
    """A step of workers that have a device each."""
    mesh, spec = jax.make_mesh((STEPS,), ("worker",), axis_types=(AxisType.Auto,)), PartitionSpec("worker")

    def program(model: nnx.Module) -> Running:
        step, state = jax_step(model)

        def on_device(*stacked: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[None], step(*jax.tree.map(lambda leaf: leaf[0], stacked)))

        mapped = jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)
        states = jax.tree.map(lambda leaf: jnp.stack([leaf] * STEPS), state)
        placed = jax.device_put((states, batches()), NamedSharding(mesh, spec))
        return Running(mapped, placed[0], [placed[1]])

    ours, stock = models(network)
    return {"devices": program(ours), "control": program(ours), "stock convolution": program(stock)}


def torch_step(network: Callable[..., nnx.Module]) -> Callable[[], None]:
    """The same step of the same network in PyTorch."""
    import torch

    from benchmarks.speed import torch_training

    torch.set_num_threads(THREADS)
    x, y = (torch.from_numpy(part[0]) for part in batches())
    model = torch_training.network(network.__name__, CLASSES)
    return torch_training.torch_program(model, x.permute(0, 3, 1, 2), y.long())


def measure(place: str, rounds: int) -> dict[str, dict[str, float]]:
    """The ratios of this process, on one device or on several."""
    if place == "devices":
        simulate_devices(STEPS)
    results = {}
    for network in (CNN7, ResNet20):
        programs = on_devices(network) if place == "devices" else on_one_device(network)
        seconds = time_interleaved({**programs, "torch": torch_step(network)}, rounds)
        if place == "devices":
            seconds["four steps of torch"] = STEPS * seconds["torch"]
            compared = [(name, "devices") for name in ("control", "stock convolution", "four steps of torch")]
        else:
            compared = [(name, "step") for name in ("control", "stock convolution", "torch")]
            compared += [(name, "steps") for name in ("control of steps", "round", "workers")]
        for name, base in compared:
            results[f"{network.__name__}: {name} / {base}"] = ratio(seconds[name], seconds[base])
    return results


def main() -> None:
    """Time, print and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="times that every program is timed")
    parser.add_argument("--here", choices=PLACES, help="time in this process only, and print JSON")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.error("PyTorch is missing: pip install torch==2.13.0.")
    if arguments.here:
        print(json.dumps(measure(arguments.here, arguments.rounds)))
        return
    results: dict[str, dict[str, float]] = {}
    for (allocator, variables), place in itertools.product(ALLOCATORS.items(), PLACES):
        print(allocator, place, *(f"{name}={value}" for name, value in variables.items()), flush=True)
        options = [f"--here={place}", f"--rounds={arguments.rounds}"]
        command = [sys.executable, "-m", "benchmarks.speed.step_vs_torch", *options]
        output = subprocess.run(command, env=os.environ | variables, check=True, stdout=subprocess.PIPE).stdout
        results |= {f"{allocator}: {name}": result for name, result in json.loads(output).items()}
    settings = {"batch": BATCH, "picture": PICTURE, "steps and workers": STEPS, "threads": THREADS}
    report("step_vs_torch", results, settings | {"rounds": arguments.rounds, "allocators": ALLOCATORS})


if __name__ == "__main__":
    main()
