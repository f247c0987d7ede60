"""The progress of a run, a comparison or a simulation: a progress bar on a terminal, otherwise lines or nothing."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO, TypeAlias, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from lsgd_jax.distributed import process_index
from lsgd_jax.tracking.output import Output

Watch: TypeAlias = Callable[[int, str], None]
"""Is told the steps that a run has taken, and what it is doing."""


class RunProgress:
    """A context that shows a run's steps, loss, headline, leader and speed on standard error.

    Of several processes, the first does. When standard error can't be written any more, the run continues without it
    and logs an `output_lost` event.
    """

    def __init__(self, steps: int, *, log: Callable[..., None], lines: bool = True, watch: Watch | None = None) -> None:
        """Show nothing yet.

        Args:
          steps: of the whole run.
          log: takes the name of an event and its values.
          lines: whether to print one line per evaluation.
          watch: is told what the bar or the lines would show, instead.
        """
        self._output = _standard_error()
        self._log, self._loss_is_logged = log, False
        self._console = Console(file=cast(TextIO, self._output), quiet=process_index() > 0)
        self._step, self._steps, self._lines, self._watch = 0, steps, lines and watch is None, watch
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
            disable=watch is not None or not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps, status="starting")

    def __enter__(self) -> "RunProgress":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    def status(self, status: str) -> None:
        """Show what the run is doing, where there is a terminal."""
        self._bar.update(self._task, completed=self._step, status=status)
        if self._watch is not None:
            self._watch(self._step, status)

    def message(self, sentence: str) -> None:
        """Print a sentence."""
        self._console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def update(self, step: int, *, loss: float, measured: str, leader: int | None, steps_per_second: float) -> None:
        """Show the results of an evaluation.

        Args:
          step: local steps taken.
          loss: the workers' mean training loss since the last evaluation.
          measured: headline measure of the evaluated model, with its title.
          leader: global index of the last leader of all workers; None if the method has none.
          steps_per_second: local steps per worker per second.
        """
        led = "" if leader is None else f"leader {leader}  "
        status = f"loss {loss:.4f}  {measured}  {led}{steps_per_second:.0f} steps/s"
        self._step = step
        self.status(status)
        if self._lines:
            self.message(f"step {step}/{self._steps}  {status}")
        problem = self._output.problem
        if problem is not None and not self._loss_is_logged:
            self._loss_is_logged = True
            self._log("output_lost", step=step, reason=problem.strerror)


class ComparisonProgress:
    """A context that shows how many cells of a comparison are done.

    On a terminal there is a progress bar, with the time that the steps of all other cells take; otherwise a line per
    cell is printed. Cells that were trained before do not count in the bar.
    """

    def __init__(self) -> None:
        """Show nothing yet."""
        self._console = Console(file=cast(TextIO, _standard_error()))
        self._has_bar = self._console.is_terminal
        self._has_lines = not (self._has_bar and sys.stdout.isatty())
        self._bar = Progress(
            TextColumn("cell {task.fields[cell]}/{task.fields[cells]}"),
            BarColumn(20),
            TimeRemainingColumn(),
            TextColumn(
                "{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")
            ),
            console=self._console,
            disable=not self._has_bar,
            transient=True,
            expand=True,
            redirect_stdout=sys.stdout.isatty(),
            speed_estimate_period=600,
        )
        self._cells = self._done = self._steps = self._taken = self._reused = 0
        self._task = self._bar.add_task("starting", total=None, cell=0, cells=0)

    def __enter__(self) -> "ComparisonProgress":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self._bar.stop()

    def expect(self, cells: int, steps: int) -> None:
        """Tell how many cells there are, and the local steps in all of them; again if it has changed."""
        self._cells, self._steps = cells, steps
        self._bar.update(self._task, total=steps - self._reused, cells=cells)

    def watcher(self, name: str) -> Watch:
        """The function that watches the run of a cell."""

        def watch(step: int, status: str) -> None:
            self._bar.update(self._task, completed=self._taken + step, description=f"{name}  {status}")

        return watch

    def finish(self, name: str, steps: int, measured: str, *, trained: bool) -> None:
        """Show the result of a cell.

        Args:
          name: of the cell.
          steps: of its run.
          measured: its final headline measure.
          trained: whether its run was trained now.
        """
        self._done += 1
        if trained:
            self._taken += steps
        else:
            self._reused += steps
        total = self._steps - self._reused
        status = f"{name}  {measured}"
        self._bar.update(self._task, completed=self._taken, total=total, cell=self._done, description=status)
        if self._has_lines:
            print(f"[{self._done}/{self._cells}] {name}: {measured}", flush=True)

    def message(self, sentence: str) -> None:
        """Print a sentence, above the bar."""
        if self._has_lines:
            print(sentence, flush=True)
        else:
            self._console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def simulation_progress() -> Progress:
    """A bar over the events of all simulated methods, with the time left; without a terminal it shows nothing."""
    console = Console(file=cast(TextIO, _standard_error()))
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _standard_error() -> Output:
    """Standard error as a stream that never fails."""
    stderr: Any = sys.stderr
    return stderr if isinstance(stderr, Output) else Output(stderr)
