"""What a language model's training step costs on a CPU with 2 threads, beside the same step in PyTorch.

    python -m benchmarks.speed.language_model_vs_torch

A step is forward, backward, clipping by the global norm and AdamW, of the transformer in two sizes: that of the preset
tragedies, and one of 8.4 million parameters. PyTorch's network has the same weights and gives the same logits. Beside
them: the step whose blocks run in a `lax.scan`. The control times the same program twice.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.speed.interleaved import ratio, report, time_interleaved
from benchmarks.speed.step_vs_torch import THREADS
from benchmarks.speed.training import Running
from lsgd_jax.models.transformer import Transformer

SIZES: dict[str, dict[str, int]] = {
    "tragedies": {"vocabulary": 128, "width": 64, "depth": 4, "heads": 4, "context": 64, "batch": 8},
    "8.4M": {"vocabulary": 8192, "width": 256, "depth": 8, "heads": 4, "context": 128, "batch": 8},
}
LEARNING_RATE, B1, B2, WEIGHT_DECAY, CLIP_NORM = 1e-3, 0.9, 0.98, 0.1, 1.0


def network(size: dict[str, int], *, unroll: bool) -> Transformer:
    """The transformer of a size."""
    vocabulary, width, depth, heads = (size[name] for name in ("vocabulary", "width", "depth", "heads"))
    return Transformer(vocabulary, width=width, depth=depth, heads=heads, unroll=unroll, rngs=nnx.Rngs(0))


def windows(size: dict[str, int]) -> np.ndarray:
    """A batch of random tokens, one more than the context."""
    shape = size["batch"], size["context"] + 1
    return np.random.default_rng(0).integers(size["vocabulary"], size=shape, dtype=np.int32)


def jax_step(model: Transformer) -> tuple[Callable, Any]:
    """The training step and the state to start from."""
    graphdef, params = nnx.split(model)
    adamw = optax.adamw(LEARNING_RATE, B1, B2, weight_decay=WEIGHT_DECAY)
    tx = optax.chain(optax.clip_by_global_norm(CLIP_NORM), adamw)

    def step(state: tuple, tokens: jax.Array) -> tuple:
        params, optimizer = state

        def loss(params: nnx.State) -> jax.Array:
            logits = nnx.merge(graphdef, params)(tokens[:, :-1])
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        updates, optimizer = tx.update(jax.grad(loss)(params), optimizer, params)
        return optax.apply_updates(params, updates), optimizer

    return step, (params, tx.init(params))


def torch_program(model: Transformer, tokens: np.ndarray) -> Callable[[], None]:
    """The same step of the same network in PyTorch, which starts from this one's parameters."""
    import torch
    from torch.nn import functional

    from benchmarks.speed import torch_training

    torch.set_num_threads(THREADS)
    twin = torch_training.Transformer.like(model)
    optimizer = torch.optim.AdamW(twin.parameters(), LEARNING_RATE, (B1, B2), weight_decay=WEIGHT_DECAY)
    x, y = torch.from_numpy(tokens[:, :-1]).long(), torch.from_numpy(tokens[:, 1:]).long()
    np.testing.assert_allclose(twin(x).detach().numpy(), model(jnp.asarray(tokens[:, :-1])), atol=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        functional.cross_entropy(twin(x).flatten(0, 1), y.flatten()).backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), CLIP_NORM)
        optimizer.step()

    return run


def measure(name: str, rounds: int) -> dict[str, dict[str, float]]:
    """The ratios of a size."""
    size, tokens = SIZES[name], windows(SIZES[name])
    step, state = jax_step(network(size, unroll=True))
    programs: dict[str, Callable[[], Any]] = {
        "step": Running(step, state, [jnp.asarray(tokens)]),
        "control": Running(step, state, [jnp.asarray(tokens)]),
        "scanned blocks": Running(*jax_step(network(size, unroll=False)), [jnp.asarray(tokens)]),
        "torch": torch_program(network(size, unroll=True), tokens),
    }
    seconds = time_interleaved(programs, rounds)
    for program in ("step", "torch"):
        rate = size["batch"] * size["context"] / np.median(seconds[program])
        print(f"{name}: {program}: {rate:.0f} tokens/s", file=sys.stderr)
    return {f"{name}: {other} / step": ratio(seconds[other], seconds["step"]) for other in programs if other != "step"}


def main() -> None:
    """Time, print and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="times that every program is timed")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="sizes of the network")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        parser.error("PyTorch is missing: pip install torch==2.13.0.")
    results: dict[str, dict[str, float]] = {}
    for name in arguments.sizes:
        results |= measure(name, arguments.rounds)
    report("language_model_vs_torch", results, {"sizes": SIZES, "threads": THREADS, "rounds": arguments.rounds})


if __name__ == "__main__":
    main()
