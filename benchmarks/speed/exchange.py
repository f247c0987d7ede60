"""What an exchange costs, on 8 simulated devices and 0.3 million parameters.

    python -m benchmarks.speed.exchange

An exchange (election, broadcast, pull) beside a bare all-reduce of the same tree, and its parts; and a period of local
steps with its exchange beside the same steps of the same workers without one, for a convolutional net like the embedded
default and for dense layers, which do the least work a parameter. The controls time the same program twice.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from benchmarks.speed.interleaved import ratio, report, time_interleaved
from lsgd_jax import broadcast_from, elect, leader_pull
from lsgd_jax.distributed import simulate_devices
from lsgd_jax.models import MLP, Conv1D

DEVICES, BATCH, PERIOD = 8, 128, 4
EXAMPLE, CLASSES = (40, 1), 10


def over_devices(function: Callable) -> Callable:
    """One worker a device, the worker axis first; waits for the result."""
    spec = PartitionSpec("worker")

    def on_device(*stacked: Any) -> Any:
        own = function(*jax.tree.map(lambda x: x[0], stacked))
        here = lax.axis_index("worker") >= 0  # Types what is equal on all workers as each one's own.
        return jax.tree.map(lambda x: jnp.where(here, x, x)[None], own)

    mesh = jax.make_mesh((DEVICES,), ("worker",), axis_types=(AxisType.Auto,))
    mapped = jax.jit(jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec))
    return lambda *arguments: jax.block_until_ready(mapped(*arguments))


def placed(tree: Any, over: Callable = over_devices) -> Any:
    """A part for every worker, where it is: no program has to move its arguments first."""
    return over(lambda x: x)(tree)


def exchange_programs(params: Any, workers: int = DEVICES, over: Callable = over_devices) -> dict[str, Callable]:
    """One exchange and its parts, and bare all-reduces of the same tree.

    Args:
      params: of one worker.
      workers: how many.
      over: maps one worker's function over all and waits for the result.
    """
    tx = leader_pull(0.1, axis_name="worker")
    stacked = placed(jax.tree.map(lambda x: jnp.broadcast_to(x, (workers, *x.shape)), params), over)
    state = over(lambda params: tx.init(params))(stacked)
    scores = placed(jnp.arange(workers, dtype=jnp.float32), over)

    def exchange(params: Any, state: Any, value: jax.Array) -> tuple:
        updates, state = tx.update(params, state, params, value=value)
        return optax.apply_updates(params, updates), state

    def all_reduce(params: Any) -> Any:
        return lax.psum(params, "worker")

    return {
        "all-reduce": partial(over(all_reduce), stacked),
        "control": partial(over(all_reduce), stacked),
        "election": partial(over(lambda score: elect(score, "worker")), scores),
        "broadcast": partial(over(lambda params: broadcast_from(params, 3, "worker")), stacked),
        "doubling": partial(over(lambda params: jax.tree.map(lambda x: 2 * x, params)), stacked),
        "exchange": partial(over(exchange), stacked, state, scores),
    }


def step_programs(model: nnx.Module) -> dict[str, Callable]:
    """A period of steps with and without its exchange, each step a program of its own."""
    graphdef, params = nnx.split(model, nnx.Param)
    keys = jax.random.split(jax.random.key(1))
    x = placed(jax.random.normal(keys[0], (DEVICES, BATCH, *EXAMPLE)))
    y = placed(jax.random.randint(keys[1], (DEVICES, BATCH), 0, CLASSES))
    stacked = placed(jax.tree.map(lambda x: jnp.broadcast_to(x, (DEVICES, *x.shape)), params))

    def loss(params: nnx.State, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    def period(optimizer: optax.GradientTransformation) -> Callable[[], None]:
        tx = optax.with_extra_args_support(optimizer)

        def step(params: nnx.State, state: Any, x: jax.Array, y: jax.Array) -> tuple:
            value, grads = jax.value_and_grad(loss)(params, x, y)
            updates, state = tx.update(grads, state, params, value=value)
            return optax.apply_updates(params, updates), state

        state = over_devices(lambda params: tx.init(params))(stacked)
        step = over_devices(step)

        def run() -> None:
            now = (stacked, state)
            for _ in range(PERIOD):
                now = step(*now, x, y)

        return run

    sgd = optax.sgd(0.01, 0.9, nesterov=True)
    return {
        "steps": period(sgd),
        "control": period(sgd),
        "with exchange": period(optax.chain(sgd, leader_pull(0.1, axis_name="worker", period=PERIOD))),
    }


def main() -> None:
    """Time, print and keep the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300, help="times that every exchange is timed")
    rounds = parser.parse_args().rounds
    simulate_devices(DEVICES)
    if jax.device_count() != DEVICES:
        parser.error(f"{DEVICES} devices are needed, but there are {jax.device_count()}.")
    models = {
        "convolutional": Conv1D(EXAMPLE, CLASSES, width=220 / 64, rngs=nnx.Rngs(0)),
        "dense": MLP(EXAMPLE, CLASSES, width=520 / 64, rngs=nnx.Rngs(0)),
    }

    results = {}
    seconds = time_interleaved(exchange_programs(nnx.state(models["convolutional"], nnx.Param)), rounds)
    for name in ("control", "election", "broadcast", "doubling", "exchange"):
        results[f"{name} / all-reduce"] = ratio(seconds[name], seconds["all-reduce"])
    for kind, model in models.items():
        seconds = time_interleaved(step_programs(model), rounds // 5)
        for name in ("control", "with exchange"):
            results[f"{kind} net: {name} / a period of steps"] = ratio(seconds[name], seconds["steps"])
    sizes = {kind: sum(x.size for x in jax.tree.leaves(nnx.state(model))) for kind, model in models.items()}
    settings = {"devices": DEVICES, "parameters": sizes, "batch": BATCH, "period": PERIOD, "rounds": rounds}
    report("exchange", results, settings)


if __name__ == "__main__":
    main()
