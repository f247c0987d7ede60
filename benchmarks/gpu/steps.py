"""A training step of each network beside the same step in PyTorch, eager and compiled, on the same card.

The step is that of `benchmarks.speed.training`. Both sides round float32 alike, which the part `device` shows; bfloat16
is the networks' `dtype` here and autocast there. A program takes several steps before it waits, as training does.
"""

import importlib
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.gpu.device import in_torch
from benchmarks.gpu.part import Record, timed
from benchmarks.speed.training import TRANSFORMER, Running, jax_step, random_network
from lsgd_jax.models import CNN7, ResNet20, ResNet50

DTYPES = ("float32", "bfloat16")


class Case(NamedTuple):
    """What a network is trained on."""

    build: Callable[..., nnx.Module]
    """Takes the shape of an example, the number of classes, a dtype and `rngs`."""
    shape: tuple[int, ...]
    """Shape of an image, or of a window of tokens."""
    classes: int
    batch: int
    steps: int
    """Steps before a program waits."""
    modes: tuple[str, ...] = ("default", "reduce-overhead")
    """Modes of `torch.compile`; "reduce-overhead" uses CUDA graphs."""


class LanguageModel(nnx.Module):
    """Transformer, called as the other networks are."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> None:
        module = importlib.import_module("lsgd_jax.models.transformer")
        self.transformer = module.Transformer(classes, **TRANSFORMER, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, rngs: nnx.Rngs | None = None) -> jax.Array:
        """Compute logits."""
        return self.transformer(tokens)


CASES = {
    "CNN7": Case(CNN7, (28, 28, 3), 10, batch=128, steps=20),
    "ResNet20": Case(ResNet20, (28, 28, 3), 10, batch=128, steps=20),
    "Transformer": Case(LanguageModel, (256,), 256, batch=32, steps=5),
    "ResNet50": Case(ResNet50, (224, 224, 3), 1000, batch=64, steps=4, modes=("default",)),
}


def case(name: str, small: bool) -> Case:
    """What a network is trained on; in the small size, as little as it takes."""
    full = CASES[name]
    if not small:
        return full
    shapes = {(224, 224, 3): (32, 32, 3), (256,): (8,)}
    compiles = name == "CNN7" and jax.default_backend() == "gpu"  # On a CPU, PyTorch takes minutes to compile it.
    modes = ("default",) if compiles else ()
    return full._replace(shape=shapes.get(full.shape, full.shape), batch=2, steps=1, modes=modes)


def batch(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Random examples and labels."""
    rng, shape = np.random.default_rng(0), (case.batch, *case.shape)
    if len(case.shape) == 1:
        return tuple(rng.integers(case.classes, size=(2, *shape), dtype=np.int32))
    return rng.standard_normal(shape, np.float32), rng.integers(case.classes, size=case.batch, dtype=np.int32)


def jax_program(case: Case, dtype: str) -> Running:
    """The steps in JAX, not compiled yet."""
    model = random_network(lambda: case.build(case.shape, case.classes, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0)))
    step, state = jax_step(model)
    return Running(step, state, [jax.device_put(batch(case))] * case.steps)


def torch_program(name: str, case: Case, dtype: str, mode: str | None = None) -> Callable[[], None]:
    """The steps in PyTorch."""
    torch = in_torch()
    from benchmarks.speed import torch_training

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = (torch.from_numpy(part).to(device) for part in batch(case))
    if x.ndim == 4:
        x = x.permute(0, 3, 1, 2)
    model = torch_training.network(name, case.classes)
    return torch_training.torch_program(model, x, y.long(), steps=case.steps, dtype=dtype, mode=mode)


def measure(record: Record, small: bool, name: str) -> None:
    """Time a network's steps in both data types; first without what PyTorch compiles, which may take long."""
    own, rounds = case(name, small), 2 if small else 20
    programs, compiling = {}, {}
    for dtype in DTYPES:
        with record.attempt(f"{name}, {dtype}"):
            programs[dtype] = jax_program(own, dtype)
    with ThreadPoolExecutor() as pool:
        started = {dtype: pool.submit(duration, program.compile) for dtype, program in programs.items()}
    sides: dict[str, dict[str, Any]] = {}
    for dtype, future in started.items():
        label = f"{name}, {dtype}"
        with record.attempt(label):
            compiling[dtype] = {"JAX": future.result()}
            sides[dtype] = {"JAX": programs[dtype], "control": programs[dtype]}
            if in_torch():
                sides[dtype]["PyTorch, eager"] = torch_program(name, own, dtype)
            keep(record, label, own, sides[dtype], rounds, compiling[dtype])
    if not in_torch():
        record.keep(f"{name}, PyTorch", {"error": "PyTorch is not installed."})
        return
    for dtype, of in sides.items():
        for mode in own.modes:
            compiled = f"PyTorch, compiled{', CUDA graphs' if mode == 'reduce-overhead' else ''}"
            with record.attempt(f"{name}, {dtype}, {compiled}"):
                program = torch_program(name, own, dtype, mode)
                compiling[dtype][compiled] = duration(program)
                of[compiled] = program
        if own.modes:
            with record.attempt(f"{name}, {dtype}, with what PyTorch compiles"):
                keep(record, f"{name}, {dtype}", own, of, rounds, compiling[dtype])


def keep(
    record: Record,
    label: str,
    case: Case,
    programs: dict[str, Callable[[], Any]],
    rounds: int,
    compiling: dict[str, float],
) -> None:
    """Time the programs of a network and a data type."""
    result = timed(programs, rounds, "JAX", case.steps)
    rates = {program: 1e3 * case.batch / of["median"] for program, of in result["milliseconds"].items()}
    about = {"batch": case.batch, "example": case.shape, "examples per second": rates}
    record.keep(label, about | result | {"seconds to compile or, from a cache, to load": compiling})


def duration(program: Callable[[], Any]) -> float:
    """Seconds that a program takes."""
    start = time.perf_counter()
    program()
    return time.perf_counter() - start


def fill_cache(name: str, small: bool) -> None:
    """Have PyTorch compile a network's steps into its cache, without measuring."""
    own = case(name, small)
    for dtype in DTYPES:
        for mode in own.modes if in_torch() else ():
            try:
                seconds = duration(torch_program(name, own, dtype, mode))
                print(f"{name}, {dtype}: torch.compile, {mode}: {seconds:.0f} s", flush=True)
            except Exception as error:  # The part that measures keeps it.
                print(f"{name}, {dtype}: torch.compile, {mode}: {error}", file=sys.stderr)
