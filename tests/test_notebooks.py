"""Notebooks and their paired scripts; the notebooks themselves are executed by `pytest --nbmake`."""

from pathlib import Path

import jupytext
import pytest

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.py"))


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {
        "quickstart",
        "own_model",
        "own_task",
        "language_model",
        "comparing_methods",
        "paper_figures",
        "groups_and_communication",
        "asynchrony",
        "loss_landscape",
    }


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_the_cells_of_its_script_and_outputs(script):
    notebook = jupytext.read(script.with_suffix(".ipynb"))

    def cells(book):
        return [(cell.cell_type, cell.source) for cell in book.cells]

    assert cells(notebook) == cells(jupytext.read(script))
    assert any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
