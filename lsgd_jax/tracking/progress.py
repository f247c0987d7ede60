"""The progress of a run on standard error: a progress bar on a terminal, otherwise one plain line per evaluation."""

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lsgd_jax.distributed import process_index
from lsgd_jax.tracking.output import Output


class RunProgress:
    """A context that shows a run's steps, loss, headline, leader and speed; of several processes, the first does.

    When standard error can't be written any more, the run continues without it and logs an `output_lost` event.
    """

    def __init__(self, steps: int, *, log: Callable[..., None], lines: bool = True) -> None:
        """Show nothing yet.

        Args:
          steps: of the whole run.
          log: takes the name of an event and its values.
          lines: whether to print one line per evaluation.
        """
        stderr: Any = sys.stderr
        self._output = stderr if isinstance(stderr, Output) else Output(stderr)
        self._log, self._loss_is_logged = log, False
        self._console = Console(file=cast(TextIO, self._output), quiet=process_index() > 0)
        self._steps, self._lines = steps, lines
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
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
        self._bar.update(self._task, status=status)

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
        self._bar.update(self._task, completed=step, status=status)
        if self._lines:
            self._console.print(f"step {step}/{self._steps}  {status}", highlight=False, soft_wrap=True)
        problem = self._output.problem
        if problem is not None and not self._loss_is_logged:
            self._loss_is_logged = True
            self._log("output_lost", step=step, reason=problem.strerror)
