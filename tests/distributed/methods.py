"""What one process or several call: a tiny problem is trained with every method, and written by the first process."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lsgd_jax import distributed
from lsgd_jax.distributed import SHARED, STACKED, place
from lsgd_jax.methods import METHODS
from lsgd_jax.variants import links

GROUPS, WORKERS, STEPS = 2, 2, 50
CURVATURES = np.array([1.0, 0.3, 2.0])
OPTIONS = {"period": 3, "pull": 0.1, "global_pull": 0.05, "global_period": 6, "window": 4, "prox": 0.05}


BROADCASTS = ("ring", "chain", "hierarchical")
STREAMED = {"fragments": 2, "overlap": 1}
RUNS = {name: (name, {}) for name in METHODS}
RUNS |= {f"lsgd by {broadcast}": ("lsgd", {"broadcast": broadcast}) for broadcast in BROADCASTS}
RUNS |= {f"{name} streamed": (name, STREAMED) for name in ("lsgd", "diloco")}
"""Methods and options by label."""
OF_EACH_EXCHANGE = ["lsgd", *(f"lsgd by {broadcast}" for broadcast in BROADCASTS), "lsgd streamed"]
OF_EACH_EXCHANGE += ["local_sgd", "quorum", "coordinate_median"]
"""Labels of one run per kind of exchange."""


def method(name, placement, given):
    """The method with the options that it has, over the placement's axes."""
    options = inspect.signature(METHODS[name].build).parameters
    own = {option: value for option, value in ({"broadcast": "all_reduce"} | OPTIONS).items() if option in options}
    axes = {"axis_name": placement.axes}
    if "group_axis_name" in options:
        axes = {"axis_name": placement.worker_axes, "group_axis_name": placement.group_axes}
    return METHODS[name].build(optax.sgd(0.01, 0.9, nesterov=True), **axes, **own | given)


def parted(x):
    """Two arrays in place of one, so that there are fragments."""
    return [x[:1], x[1:]]


def train(out, labels=tuple(RUNS)):
    """Train, and write all paths, centers and leaders to a file."""
    distributed.simulate_devices(GROUPS * WORKERS)
    jax.config.update("jax_enable_x64", True)
    placement = place(GROUPS, WORKERS)
    rng = np.random.default_rng(0)
    sizes = (len(CURVATURES),), (STEPS,), (STEPS, len(CURVATURES))  # Start, loss noise and gradient noise.
    problem = tuple(rng.normal(size=(GROUPS * WORKERS, *size))[placement.own_workers] for size in sizes)
    results = {"processes": np.vectorize(lambda device: device.process_index)(placement.mesh.devices)}
    for label in labels:
        name, given = RUNS[label]
        tx = method(name, placement, given)

        def of_worker(x, loss_noise, gradient_noise, name=name, tx=tx):
            def step(carry, now):
                x, state = carry
                number, loss_noise, gradient_noise = now
                loss, grads = loss_noise + jnp.sum(CURVATURES * x**2) / 2, CURVATURES * x + gradient_noise
                updates, state = tx.update(parted(grads), state, parted(x), value=loss, step=number)
                x = optax.apply_updates(x, jnp.concatenate(updates))
                leaders = jnp.stack([pull.leader.position for pull in links(state)]) if name == "lsgd" else ()
                return (x, state), (x, leaders)

            noises = jnp.arange(STEPS), loss_noise, gradient_noise
            (x, state), (path, leaders) = jax.lax.scan(step, (x, tx.init(parted(x))), noises)
            return path, leaders, jnp.concatenate(METHODS[name].center(parted(x), state, placement.axes))

        mapped = placement.over_workers(of_worker, (STACKED,) * 3, (STACKED, STACKED, SHARED))
        program = jax.jit(mapped, out_shardings=placement.sharding(SHARED))
        path, leaders, center = jax.device_get(program(*placement.put(problem, STACKED)))
        results |= {f"{label} path": path, f"{label} center": center}
        if name == "lsgd":
            results[f"{label} leaders"] = leaders
    if distributed.process_index() == 0:
        np.savez(out, **results)
