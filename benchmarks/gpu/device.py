"""Card and versions; bandwidth, rate of matrix products, and rounding of float32, with JAX and with PyTorch."""

import importlib.util
import subprocess
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu.part import Record, timed
from lsgd_jax.tracking.environment import installed_version

ABOUT = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory,compute_mode"
PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "optax", "nvidia-cudnn-cu13", "torch")
CALLS, ROUNDS = 10, 20


def measure(record: Record, small: bool) -> None:
    """Describe and measure the device."""
    with record.attempt("card"):
        record.keep("card", card())
    record.keep("versions", {package: installed_version(package) for package in PACKAGES})
    with record.attempt("copy"):
        record.keep("copy", copies(2**20 if small else 2**28))
    for dtype in ("float32", "bfloat16"):
        with record.attempt(f"matrix product, {dtype}"):
            record.keep(f"matrix product, {dtype}", products(256 if small else 8192, dtype))
    with record.attempt("relative error of float32"):
        record.keep("relative error of float32", rounding())


def card() -> dict[str, str]:
    """What `nvidia-smi` says, if it is there."""
    try:
        command = ["nvidia-smi", f"--query-gpu={ABOUT}", "--format=csv,noheader"]
        said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout
    except FileNotFoundError:
        return {"name": f"no NVIDIA GPU: {jax.devices()[0].device_kind}"}
    return dict(zip(ABOUT.split(","), said.splitlines()[0].split(", "), strict=True))


def repeated(function: Callable[[], Any]) -> Callable[[], None]:
    """A program that calls a function of JAX and waits."""

    def run() -> None:
        for _ in range(CALLS):
            result = function()
        jax.block_until_ready(result)

    return run


def repeated_in_torch(function: Callable[[], Any], on_gpu: bool) -> Callable[[], None]:
    """The same with PyTorch."""
    import torch

    def run() -> None:
        for _ in range(CALLS):
            function()
        if on_gpu:
            torch.cuda.synchronize()

    return run


def in_torch() -> Any:
    """PyTorch, with the rounding of float32 that JAX has by default; None if it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    torch.set_float32_matmul_precision("high")  # TF32 on GPUs that have it; convolutions use it anyway.
    torch.backends.cudnn.benchmark = True
    return torch


def copies(size: int) -> dict[str, Any]:
    """Read and write an array of so many float32 numbers."""
    x = jnp.ones(size, jnp.float32)
    programs = {"JAX": repeated(partial(jax.jit(lambda x: x + 1), x))}
    if torch := in_torch():
        y = torch.ones(size, device="cuda" if torch.cuda.is_available() else "cpu")
        programs["PyTorch"] = repeated_in_torch(partial(torch.add, y, 1, out=torch.empty_like(y)), y.is_cuda)
    result = timed(programs, ROUNDS, "JAX", CALLS)
    rates = {name: 2 * x.nbytes / 1e6 / of["median"] for name, of in result["milliseconds"].items()}
    return {"bytes read and written": 2 * x.nbytes, "GB per second": rates} | result


def products(size: int, dtype: str) -> dict[str, Any]:
    """Multiply two random square matrices."""
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    programs = {"JAX": repeated(partial(jax.jit(jnp.matmul), x, x))}
    if torch := in_torch():
        y = torch.randn(size, size, device="cuda" if torch.cuda.is_available() else "cpu", dtype=getattr(torch, dtype))
        programs["PyTorch"] = repeated_in_torch(partial(torch.matmul, y, y), y.is_cuda)
    result = timed(programs, ROUNDS, "JAX", CALLS)
    rates = {name: 2 * size**3 / 1e9 / of["median"] for name, of in result["milliseconds"].items()}
    return {"size": size, "TFLOP per second": rates} | result


def rounding() -> dict[str, Any]:
    """Norm of the error over that of the result, of a matrix product and a convolution: 3e-4 is TF32, 1e-6 float32."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((512, 512), np.float32) for _ in range(2))
    x, kernel = rng.standard_normal((8, 16, 16, 64), np.float32), rng.standard_normal((3, 3, 64, 64), np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3), axis=(1, 2))
    exact = {
        "matrix product": a.astype(np.float64) @ b.astype(np.float64),
        "convolution": np.einsum("nhwcij,ijco->nhwo", windows, kernel.astype(np.float64), optimize=True),
    }

    def errors(**results: Any) -> dict[str, float]:
        names = {"product": "matrix product", "convolution": "convolution"}
        differences = {names[key]: np.asarray(of) - exact[names[key]] for key, of in results.items()}
        return {name: float(np.linalg.norm(of) / np.linalg.norm(exact[name])) for name, of in differences.items()}

    found = {}
    for precision in (None, "highest"):
        with jax.default_matmul_precision(precision):
            convolution = lax.conv_general_dilated(
                jnp.asarray(x), jnp.asarray(kernel), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            name = "JAX, as in the steps" if precision is None else f"JAX, {precision}"
            found[name] = errors(product=jnp.matmul(a, b), convolution=convolution)
    if torch := in_torch():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        product = torch.from_numpy(a).to(device) @ torch.from_numpy(b).to(device)
        inputs = torch.from_numpy(x).to(device).permute(0, 3, 1, 2), torch.from_numpy(kernel).to(device)
        convolution = torch.nn.functional.conv2d(inputs[0], inputs[1].permute(3, 2, 0, 1)).permute(0, 2, 3, 1)
        found["PyTorch, as in the steps"] = errors(product=product.cpu(), convolution=convolution.cpu())
    return found
