"""Eight simulated devices, set before JAX wakes, and strict promotion of ranks; data sets made of made-up archives."""

import os
import tempfile
from importlib.metadata import version

# Before JAX is imported: what has been compiled once is not compiled again, by none of the processes of these tests.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="compiled-")  # Removed with the process that has made it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    # A process can find what another has half written, or has been killed at; it compiles it then.
    os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry"

# These tests compile most of their time, and for that XLA's older code generator is the quicker one, where it is
# still to be had: an unknown flag ends the process. Demo and benchmarks compile as JAX does by itself.
if "XLA_FLAGS" not in os.environ:
    os.environ["XLA_FLAGS"] = "--xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10."):
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A folder in which all data sets are prepared from made-up archives, and what is in these."""
    from lsgd_jax.data import preparation
    from tests.data import archives

    data_dir = tmp_path_factory.mktemp("data")
    folder = data_dir / "downloads" / "manual"
    folder.mkdir(parents=True)
    make = {
        "cifar10": archives.make_cifar10,
        "cifar100": archives.make_cifar100,
        "mnist": archives.make_mnist,
        "imagenet2012": archives.make_imagenet,
    }
    truth = {name: make[name](folder) for name in make}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in make:
            archives.accept(monkeypatch, name, folder)
            preparation.prepare(name, data_dir)
    return data_dir, truth


@pytest.fixture
def quick_compilation():
    """Compile without most optimisations, for tests of large programs that run for a few steps."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session", params=[None, "posted"])
def trained(request, tmp_path_factory):
    """The folder of a small run, in step and asynchronous, with event files for TensorBoard."""
    from lsgd_jax import train
    from tests.figures.runs import SMALL

    path = tmp_path_factory.mktemp("runs") / "run"
    jax.config.update("jax_disable_most_optimizations", True)  # Compiling takes longer than the few steps.
    train.train_and_evaluate(SMALL.replace(asynchronous=request.param), path, tensorboard=True)
    jax.config.update("jax_disable_most_optimizations", False)
    return path
