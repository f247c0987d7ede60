"""Notebooks and their paired scripts: what they hold, and that their cells run, in their small sizes."""

import re
from pathlib import Path

import jupytext
import pytest
from IPython.core.interactiveshell import InteractiveShell

from tests.reliability import commands

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.py"))
each_notebook = pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {
        "quickstart",
        "own_model",
        "own_task",
        "language_model",
        "comparing_methods",
        "quorum",
        "paper_figures",
        "groups_and_communication",
        "asynchrony",
        "loss_landscape",
    }


class Shell(InteractiveShell):
    """Runs cells as a notebook does, with the figures below them."""

    def enable_gui(self, gui=None):
        """Nothing to start: no window opens."""


def run_cells(sources):
    shell = Shell.instance()
    shell.enable_matplotlib("inline")
    for source in sources:
        shell.run_cell(source).raise_error()


@each_notebook
def test_every_cell_of_a_notebook_runs(script, tmp_path):
    cells = jupytext.read(script.with_suffix(".ipynb")).cells
    sources = [cell.source for cell in cells if cell.cell_type == "code"]
    variables = {"LSGD_SMALL": "1", "IPYTHONDIR": str(tmp_path / "ipython")}
    code, errors = commands.called(run_cells, sources, cwd=tmp_path, **variables)
    assert code == 0, "\n".join(errors)


@each_notebook
def test_a_notebook_has_the_cells_of_its_script_and_outputs(script):
    notebook = jupytext.read(script.with_suffix(".ipynb"))

    def cells(book):
        return [(cell.cell_type, cell.source) for cell in book.cells]

    assert cells(notebook) == cells(jupytext.read(script))
    assert any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")


@each_notebook
def test_a_notebook_says_what_it_teaches_and_what_to_try(script):
    opening, install, *cells, ending = jupytext.read(script).cells
    goals = opening.source.partition("**You will learn**\n\n")[2]
    assert 2 <= len(re.findall("^- ", goals, re.MULTILINE)) <= 4
    assert re.search(r"\*\*Run time:\*\* about .+ on two CPU cores", goals)
    assert 'importlib.util.find_spec("lsgd_jax")' in install.source or '("lsgd_jax", SOURCE)' in install.source
    assert ending.source.startswith("## Try this\n")
    assert 3 <= len(re.findall("^- ", ending.source, re.MULTILINE)) <= 5
    # It needs no files of the repository, and so works outside of it, too.
    assert not any("benchmarks" in cell.source for cell in cells if cell.cell_type == "code")
