"""How a run shows itself: a progress bar on a terminal, a plain line an evaluation otherwise."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class RunProgress:
    """A context that shows a run's steps, loss, test error, leader and speed."""

    def __init__(self, steps: int, console: Console | None = None) -> None:
        """Show nothing yet.

        Args:
          steps: of the whole run.
          console: where to; None: the standard error.
        """
        self._console = console or Console(stderr=True)
        self._steps = steps
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, status="compiling")

    def __enter__(self) -> "RunProgress":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def show(self, step: int, *, loss: float, error: float, leader: int, steps_per_second: float) -> None:
        """Show where the run is, after an evaluation.

        Args:
          step: local steps done.
          loss: the workers' mean of their last training losses.
          error: the center's test error, in [0, 1].
          leader: the position of the last leader of all.
          steps_per_second: local steps of every worker.
        """
        status = f"loss {loss:.4f}  test error {error:.2%}  leader {leader}  {steps_per_second:.0f} steps/s"
        self._bar.update(self._task, completed=step, status=status)
        if not self._console.is_terminal:
            self._console.print(f"step {step}/{self._steps}  {status}", highlight=False, soft_wrap=True)
