"""Eight simulated devices, set before JAX wakes, and strict promotion of ranks; data sets made of made-up archives."""

import gc
import os
import tempfile
from importlib.metadata import version

# Before JAX is imported: what has been compiled once is not compiled again, by none of the processes of these tests. It
# is not kept for the next time: collectives of programs that were read from a cache have been seen to wait for ever.
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

# Nor do they run long enough for most optimizations to pay, here or in the processes that they start. Those are LLVM's,
# which may round otherwise: tests of the core that compare bits are marked `optimized`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

# Nobody looks up which line an operation comes from; writing that down is a twentieth of lowering a program.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

import hypothesis
import jax
import pytest

gc.set_threshold(200_000, 50, 1_000)  # There are millions of objects, of which a collection finds few to free.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same")


SLOWEST = (
    "distributed/test_processes.py",
    "reliability/test_resume.py",
    "test_notebooks.py",
    "reliability/test_processes.py",
    "test_leader.py",
    "train/test_loop.py",
    "test_presets.py",
    "reliability/test_any_tree.py",
    "test_sharded_workers.py",
    "methods/test_methods.py",
    "asynchronous/test_processes.py",
    "train/test_compile_ahead.py",
    "test_cli.py",
    "train/test_chips.py",
    "exchange/test_trees.py",
    "compare/test_comparison.py",
    "reliability/test_failures.py",
    "exchange/test_broadcast.py",
    "test_own_task.py",
    "tasks/test_language.py",
    "costs/test_ledger.py",
    "simulate/test_cli.py",
    "test_libraries.py",
    "test_streaming.py",
    "reliability/test_stops.py",
)
"""Files in the order in which they are begun: the slowest first, among them those that wait for processes apart."""


def pytest_collection_modifyitems(items):
    """Begin with what takes longest, so that all workers of pytest-xdist end at about the same time."""
    places = {f"tests/{file}": place for place, file in enumerate(SLOWEST)}

    def place(item):
        file = item.nodeid.split("::")[0]
        return places.get(file, len(SLOWEST))

    items.sort(key=place)


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


@pytest.fixture(autouse=True)
def _marked_tests_are_optimized(request):
    before = jax.config.read("jax_disable_most_optimizations")
    optimized = request.node.get_closest_marker("optimized") is not None
    jax.config.update("jax_disable_most_optimizations", before and not optimized)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def shared_programs():
    """Runs of one configuration share their programs."""
    from tests import programs

    with programs.shared():
        yield


@pytest.fixture
def png_only(monkeypatch):
    """Figures are written as PNG only: each format takes as long as what is drawn."""
    from lsgd_jax.figures import comparison, output

    for module in (comparison, output):
        monkeypatch.setattr(module, "write_formats", output.write_picture)


@pytest.fixture
def lsgd(tmp_path, monkeypatch, capsys):
    """Run a command in this process, in a folder of its own; returns its exit code, and what it has printed."""
    from lsgd_jax import cli, distributed

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("initialize", "simulate_devices"):
        monkeypatch.setattr(distributed, name, lambda *_, **__: None)

    def run(*arguments):
        code = cli.main(list(arguments))
        return code, *capsys.readouterr()

    return run


@pytest.fixture(scope="session", params=[None, "posted"])
def trained(request, tmp_path_factory):
    """The folder of a small run, in step and asynchronous, with event files for TensorBoard."""
    from lsgd_jax import train
    from tests.figures.runs import SMALL

    path = tmp_path_factory.mktemp("runs") / "run"
    train.train_and_evaluate(SMALL.replace(asynchronous=request.param), path, tensorboard=True)
    return path
