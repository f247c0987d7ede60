"""The `lsgd` command."""

import functools
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from lsgd_jax.cli import overview
from lsgd_jax.errors import AgreedError, Interrupted, RunFailed, UsageError
from lsgd_jax.tracking.output import Output, say


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code (2 for a user error)."""
    # A stream that was closed before the start is None.
    stdout: Any = Output(sys.stdout or io.StringIO())
    stderr: Any = Output(sys.stderr or io.StringIO())
    arguments = sys.argv[1:] if arguments is None else arguments
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            code = _run(arguments) if overview.may_run(arguments) else overview.answer(arguments)
        finally:
            stdout.flush()
            stderr.flush()
        lost = stdout.problem
        if code is None and lost is not None and not isinstance(lost, BrokenPipeError):
            print(f"lsgd: the output can't be written ({lost.strerror}).", file=sys.stderr)
            return 2
    return code or 0


def _run(arguments: list[str]) -> int | None:
    """Run a command; returns the exit code, or None if the command only prints."""
    from lsgd_jax import distributed  # Here, since they import JAX: an overview is printed without.
    from lsgd_jax.cli import commands, costs, faults, help, launch, preparation
    from lsgd_jax.cli.options import REFUSED, check_spelling

    try:
        if (here := os.getcwd()) not in sys.path:  # As python -m has it: modules of tasks may be here.
            sys.path.insert(0, here)
        own = overview.own_preset(arguments)
        by_name: dict[str, Callable[..., Any]] = {
            "train": commands.train,
            "compare": commands.compare,
            "figure": commands.figure,
            "data": preparation.data,
            "report": commands.report,
            "simulate": commands.simulate,
            "replay": faults.replay,
            "chaos": faults.chaos,
            "info": costs.info,
            "launch": launch.launch,
            "join": launch.join,
            "compile": costs.compile_ahead,
        }
        name, command = arguments[0], by_name[arguments[0]]
        check_spelling(arguments, own)
        if not {"-h", "--help"}.isdisjoint(arguments):
            print(help.show(name, command, arguments[1:], own, REFUSED.get(name, ())))
            return None
        return _parsed(arguments, by_name, own)()
    except UsageError as error:
        together = distributed.process_count() == 1 or isinstance(error, AgreedError)
        if distributed.process_index() == 0 or not together:
            say(f"lsgd: {error}", sys.stderr)
        if not together:
            os._exit(2)  # As below.
        return 2
    except RunFailed as error:
        say(f"lsgd: {error}", sys.stderr)
        if distributed.process_count() > 1:
            os._exit(1)  # An orderly exit would wait for the other processes, which wait for this one.
        return 1
    except Interrupted as stop:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # A second interrupt ends the process immediately, here too.
        for number in (signal.SIGTERM, signal.SIGHUP):  # The launcher sends them when another process has stopped.
            signal.signal(number, signal.SIG_IGN)
        if distributed.process_index() == 0:
            say(f"lsgd: {stop}", sys.stderr)
        return 128 + stop.number
    except Exception as error:
        if distributed.process_count() == 1:
            raise
        if "by peer" in str(error):  # Gloo's message for a closed or reset connection.
            say("lsgd: another process of the run has ended, so that this one can't go on.", sys.stderr)
        else:
            traceback.print_exc()
        os._exit(1)  # As above.


def _parsed(
    arguments: Sequence[str], by_name: Mapping[str, Callable[..., Any]], own: str | None
) -> Callable[[], int | None]:
    """The command with its arguments.

    Raises:
      UsageError: if the arguments are not those of a command.
    """
    import tyro

    from lsgd_jax.cli.options import in_a_sentence, with_presets

    def later(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def bound(*values: Any, **options: Any) -> Callable[[], int | None]:
            return functools.partial(command, *values, **options)

        return bound

    with in_a_sentence():
        return tyro.extras.subcommand_cli_from_dict(
            {name: with_presets(later(command), own) for name, command in by_name.items()},
            prog="lsgd",
            description="Leader SGD in JAX.",
            args=arguments,
            config=(tyro.conf.CascadeSubcommandArgs,),
        )
