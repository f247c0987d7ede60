"""Several workers in slots of one device beside as many separate steps, and LSGD beside independent workers.

A step of n workers: "vmapped", with XLA's grouped convolutions; "vmapped, a convolution per worker"; and "one after the
other" in a loop of the program. Beside them, "separate" is n calls of one worker's step.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from benchmarks.gpu.part import Record, timed
from benchmarks.speed.training import Running, jax_step, random_network
from lsgd_jax.config import Config
from lsgd_jax.distributed import SHARED
from lsgd_jax.models import CNN7, ResNet20
from lsgd_jax.models.convolution import by_worker
from lsgd_jax.presets import PRESETS
from lsgd_jax.train.setup import prepare, rounds, step_key, steps_per_call
from lsgd_jax.train.step import init_state, local_steps

SHAPE, CLASSES = (28, 28, 3), 10
UNROLLED = "vmapped, a convolution per worker"


def measure(record: Record, small: bool) -> None:
    """Time 4 and 16 workers."""
    for name, config in lsgd_configs(small).items():
        with record.attempt(name):
            sides = {method: Training(config.replace(method=method)) for method in ("independent", "lsgd")}
            compile_all(list(sides.values()))
            result = timed({**sides, "control": sides["independent"]}, 2 if small else 50, "independent")
            record.keep(name, {"steps": steps_per_call(config)} | result)
    for network in (CNN7, ResNet20):
        for workers in (4,) if small else (4, 16):
            name = f"{network.__name__}, {workers} workers"
            with record.attempt(name):
                batch, calls = (2, 1) if small else (128, 10)
                programs = of_workers(network, workers, batch, calls, small)
                if network is ResNet20 and workers == 16:
                    del programs[UNROLLED]  # It takes minutes to compile.
                compile_all(list(programs.values()))
                result = timed({**programs, "control": programs["separate"]}, 2 if small else 15, "separate", calls)
                record.keep(name, {"batch of a worker": batch} | result)


def of_workers(
    network: Callable[..., nnx.Module], workers: int, batch: int, calls: int, small: bool
) -> dict[str, Running]:
    """The ways to take a step of several workers."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((workers, batch, *SHAPE), np.float32))
    y = jnp.asarray(rng.integers(CLASSES, size=(workers, batch), dtype=np.int32))
    options = {"width": 0.1} if small else {}
    stock, unrolled = (random_network(lambda: network(SHAPE, CLASSES, **options, rngs=nnx.Rngs(0))) for _ in range(2))
    step, state = jax_step(stock)
    for _, module in nnx.iter_modules(unrolled):
        if isinstance(module, nnx.Conv):
            module.conv_general_dilated = convolve_by_worker
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * workers), state)

    def one_after_the_other(states: Any, batches: Any) -> Any:
        return lax.map(lambda both: step(*both), (states, batches))

    return {
        "separate": Running(step, state, [(x[0], y[0])] * workers * calls),
        "vmapped": Running(jax.vmap(step), stacked, [(x, y)] * calls),
        UNROLLED: Running(jax.vmap(jax_step(unrolled)[0]), stacked, [(x, y)] * calls),
        "one after the other": Running(one_after_the_other, stacked, [(x, y)] * calls),
    }


def convolve_by_worker(x: jax.Array, kernel: jax.Array, strides: Any, padding: Any, **options: Any) -> jax.Array:
    """`jax.lax.conv_general_dilated` of which `jax.vmap` makes one convolution per worker, in the gradients, too."""

    def stock(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(x, kernel, strides, padding, **options)

    def x_gradient(g: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: stock(x, kernel), jnp.zeros(x_shape, g.dtype))[1](g)[0]

    def kernel_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(lambda kernel: stock(x, kernel), jnp.zeros(kernel_shape, g.dtype))[1](g)[0]

    @jax.custom_vjp
    def convolution(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return by_worker(stock)(x, kernel)

    def forward(x: jax.Array, kernel: jax.Array) -> tuple:
        return convolution(x, kernel), (x, kernel)

    def backward(saved: tuple, g: jax.Array) -> tuple:
        x, kernel = saved
        return by_worker(x_gradient)(g, kernel), by_worker(kernel_gradient)(x, g)

    x_shape, kernel_shape = x.shape, kernel.shape
    convolution.defvjp(forward, backward)
    return convolution(x, kernel)


def lsgd_configs(small: bool) -> dict[str, Config]:
    """What the package trains, in groups of one."""
    if small:
        configs = {"LSGD, digits, 4 workers": PRESETS["digits"].replace(groups=1, workers=4)}
    else:
        demo, cnn7 = PRESETS["mnist1d"], PRESETS["cnn7-mnist5k-4"].replace(width=1.0)
        configs = {
            "LSGD, Conv1D on MNIST-1D, 4 workers": demo.replace(groups=1, workers=4),
            "LSGD, Conv1D on MNIST-1D, 16 workers": demo.replace(groups=1, workers=16),
            "LSGD, CNN7 on MNIST, 4 workers": cnn7,
            "LSGD, ResNet20 on MNIST, 4 workers": cnn7.replace(model="resnet20"),
        }
    return {name: config.replace(eval_every=100) for name, config in configs.items()}  # So that a program has 4 steps.


class Training:
    """A compiled program of the package, called from where it stood; it takes the local steps up to an exchange."""

    def __init__(self, config: Config) -> None:
        placement, feed, model, optimizer = prepare(config)
        steps = steps_per_call(config)
        self._program: Any = local_steps(config.task, model, optimizer, placement, feed)
        self._state = init_state(model, optimizer, placement)
        batches = next(rounds(feed, placement, config.steps, steps))
        shared = placement.put(feed.shared, SHARED)
        self._rest = shared, batches, np.int32(0), np.float32(1), step_key(config.seed)

    def compile(self) -> None:
        """Compile it now."""
        self._program = self._program.lower(self._state, *self._rest).compile()

    def __call__(self) -> None:
        """Take the steps, and wait for them."""
        self._state, metrics = self._program(self._state, *self._rest)
        jax.block_until_ready(metrics)


def compile_all(programs: list[Any]) -> None:
    """Compile several programs at once."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda program: program.compile(), programs))
