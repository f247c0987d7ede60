"""How far a comparison has come, with and without a terminal."""

import io
import sys

import pytest

from lsgd_jax.tracking.progress import ComparisonProgress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def compare_two_cells():
    with ComparisonProgress() as display:
        display.expect(3, 300)
        display.finish("lsgd/seed-0", 100, "4.00%", trained=False)
        display.watcher("lsgd/seed-1")(50, "loss 1.0  " + "a long status " * 10)
        display.message("one is trained again")
        task = display._bar.tasks[0]
        half_way = task.completed, task.total
        display.expect(2, 200)
        display.finish("lsgd/seed-1", 100, "5.00%", trained=True)
        return half_way, (task.completed, task.total)


def test_on_a_terminal_there_is_one_bar_whose_end_is_that_of_all_cells(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stdout, stderr = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    # What was trained before is not among the steps to take.
    assert compare_two_cells() == ((50, 200), (100, 100))
    # A long status takes no room from the bar and the time.
    bars = [line for line in stderr.getvalue().splitlines() if "cell" in line]
    assert all("━" * 8 in line and ":" in line for line in bars if "seed" in line)
    assert "cell 2/2" in stderr.getvalue()
    assert "one is trained again" in stderr.getvalue()
    assert stdout.getvalue() == ""


@pytest.mark.parametrize("stderr", [io.StringIO, Terminal])
def test_elsewhere_there_is_a_line_per_cell(stderr, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", stderr())
    compare_two_cells()
    assert capsys.readouterr().out.splitlines() == [
        "[1/3] lsgd/seed-0: 4.00%",
        "one is trained again",
        "[2/2] lsgd/seed-1: 5.00%",
    ]
