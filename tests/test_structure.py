"""The package's structure: modules import each other without cycles, and no file is too long to be read."""

import ast
import functools
import graphlib
from pathlib import Path

import pytest

import lsgd_jax

ROOT = Path(lsgd_jax.__file__).parent
MOST_LINES = 400
MOST_LINES_OF = {"leader.py": 200}


def module_name(path):
    parts = ("lsgd_jax", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imported(source):
    """The package's modules that a source names in its imports, also in those inside of functions.

    Importing `a.b` also runs `a/__init__.py`, but that alone needs nothing of what `a` imports.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else str(node.module) for name in submodules]
        else:
            continue
        yield from (name for name in names if name in MODULES)


@functools.cache
def imports():
    """What every module imports."""
    return {name: set(imported(path.read_text())) for name, path in MODULES.items()}


def find_cycle(graph):
    """A cycle of modules that import each other, if there is one."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def test_no_modules_import_each_other():
    graph = imports()
    assert graph["lsgd_jax.train.loop"] >= {"lsgd_jax.train.asynchronous", "lsgd_jax.train.recorder"}
    assert find_cycle(graph) is None


def test_a_cycle_through_a_function_is_found():
    source = "def evaluate():\n    from lsgd_jax.train import loop\n    import lsgd_jax.train.step\n"
    assert set(imported(source)) == {"lsgd_jax.train.loop", "lsgd_jax.train.step"}
    graph = imports() | {"lsgd_jax.train.evaluate": set(imported(source))}
    assert {"lsgd_jax.train.evaluate", "lsgd_jax.train.loop"} <= set(find_cycle(graph))


@pytest.mark.parametrize(("room", "others"), [("asynchronous", ("train",)), ("distributed", ("train", "asynchronous"))])
def test_what_lies_below_knows_nothing_of_what_lies_above(room, others):
    below = {name for name in MODULES if name.startswith(f"lsgd_jax.{room}")}
    assert below
    for name in below:
        for other in others:
            assert not {used for used in imports()[name] if used.startswith(f"lsgd_jax.{other}")}, name


def test_no_file_is_too_long():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES.values()}
    assert not {name for name, length in lengths.items() if length > MOST_LINES_OF.get(name, MOST_LINES)}
