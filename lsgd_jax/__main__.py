"""`python -m lsgd_jax` is the `lsgd` command."""

import gc
import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the `lsgd` command; returns its exit code."""
    gc.disable()  # Imports leave a million objects and no garbage: to look for it takes a sixth of a short run.
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in stops}
    for number in stops:
        if before[number] != signal.SIG_IGN:
            signal.signal(number, _stop)
    from lsgd_jax import cli

    if not cli.overview.may_run(sys.argv[1:]):
        gc.enable()
        return cli.main()
    from lsgd_jax.cli.allocator import keep_memory

    keep_memory()
    try:
        import jax  # noqa: F401 - it reads its variables of the environment.
    except ValueError as error:
        print(f"lsgd: JAX can't read a variable of the environment ({error}): change or unset it.", file=sys.stderr)
        return 2
    from lsgd_jax.distributed.interruption import end_process

    try:
        signal.signal(signal.SIGINT, before[signal.SIGINT])  # With which commands remove what they have half written.
        from lsgd_jax.cli import commands  # noqa: F401 - with most of what commands need.

        gc.freeze()
        gc.enable()
        return cli.main()
    except KeyboardInterrupt:
        end_process(signal.SIGINT)


def _stop(number: int, frame: FrameType | None) -> None:
    """Say in a sentence that a signal stops this process, and end it at once, also while JAX is imported."""
    told_by_first = "LSGD_LAUNCHER" in os.environ and os.environ.get("LSGD_PROCESS") != "0"
    if not told_by_first:
        os.write(2, f"lsgd: stopped by {signal.Signals(number).name}.\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
