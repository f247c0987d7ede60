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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from benchmarks.speed.interleaved import ratio, report, time_interleaved
from lsgd_jax.models import CNN7, ResNet20

BATCH, PICTURE, CLASSES, STEPS, THREADS = 128, (28, 28, 3), 10, 4, 2
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 1e-4
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


def jax_step(model: nnx.Module) -> tuple[Callable, Any]:
    """The training step and the state to start from."""
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    tx = optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(LEARNING_RATE, MOMENTUM, nesterov=True))

    def step(state: tuple, batch: tuple) -> tuple:
        params, stats, optimizer, key = state
        key, dropout = jax.random.split(key)
        x, y = batch

        def loss(params: nnx.State) -> tuple:
            model = nnx.merge(graphdef, params, stats, copy=True)
            logits = model(x, rngs=nnx.Rngs(dropout=dropout))
            value = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return value, nnx.state(model, nnx.BatchStat)

        grads, stats = jax.grad(loss, has_aux=True)(params)
        updates, optimizer = tx.update(grads, optimizer, params)
        return optax.apply_updates(params, updates), stats, optimizer, key

    return step, (params, stats, tx.init(params), jax.random.key(0))


def running(step: Callable, state: Any, arguments: list) -> Callable[[], None]:
    """A program that steps on from where it stood, once with each of the arguments, in the memory of its last state."""
    step = jax.jit(step, donate_argnums=0)
    held = jax.tree.map(jnp.copy, state)

    def run() -> None:
        nonlocal held
        for argument in arguments:
            held = step(held, argument)
        jax.block_until_ready(held)

    return run


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
        "step": running(step, state, each[:1]),
        "control": running(step, state, each[:1]),
        "stock convolution": running(*jax_step(stock), each[:1]),
        "steps": running(step, state, each),
        "control of steps": running(step, state, each),
        "round": running(
            lambda state, round: lax.scan(lambda s, b: (step(s, b), None), state, round)[0], state, [(x, y)]
        ),
        "workers": running(jax.vmap(step), workers, [(x, y)]),
    }


def torch_program(network: Callable[..., nnx.Module]) -> Callable[[], None]:
    """The same step of the same network in PyTorch, its pictures and kernels channels last."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.stride, self.extra = stride, outputs - inputs
            self.correction = nn.Sequential(
                *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
                *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
            return functional.relu(shortcut + self.correction(x))

    if network is CNN7:
        model = nn.Sequential(
            *(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 128, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(128, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(256, CLASSES),
        )
    else:
        sizes = ((16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2))
        model = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(Block(*size) for size in (*sizes, (64, 64, 1), (64, 64, 1))),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, CLASSES)),
        )
    torch.set_num_threads(THREADS)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY)
    x, y = (torch.from_numpy(part[0]) for part in batches())
    x, y = x.permute(0, 3, 1, 2), y.long()

    def run() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def measure(rounds: int) -> dict[str, dict[str, float]]:
    """The ratios of this process."""
    results = {}
    for network in (CNN7, ResNet20):
        programs = {**jax_programs(network), "torch": torch_program(network)}
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
