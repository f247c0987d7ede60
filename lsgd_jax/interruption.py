"""Stopping at a step on which all processes agree, when one of them is interrupted or terminated."""

import itertools
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from jax.experimental import multihost_utils

from lsgd_jax.distributed import process_count


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int | None]]:
    """Let SIGINT and SIGTERM wait for a step at which a run can stop; a second SIGINT ends the process at once.

    In several processes JAX's preemption service sees a SIGTERM of any one, and chooses the step. Outside the main
    thread, where Python handles no signals, they do what they did.

    Yields:
      A function to be called on all processes at every such step: the signal on which to stop there, the same on all
      processes, or None.
    """
    several, received, calls = process_count() > 1, [0], itertools.count()

    def take(number: int, frame: FrameType | None) -> None:
        received[0] = number
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if several:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked_to_stop() -> int | None:
        if several:  # The service chooses a number that may lie between those of steps.
            return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(next(calls)) else None
        return received[0] or None

    in_main_thread = threading.current_thread() is threading.main_thread()
    handled = [signal.SIGINT] if several else [signal.SIGINT, signal.SIGTERM]  # JAX has its handler of SIGTERM.
    before = {number: signal.signal(number, take) for number in handled} if in_main_thread else {}
    try:
        yield asked_to_stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
