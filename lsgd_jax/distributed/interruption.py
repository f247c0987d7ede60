"""Stopping on a signal: a run that saves stops at a step on which all its processes agree, all else stops at once."""

import itertools
import multiprocessing
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state

from lsgd_jax.distributed import LAUNCHER, PROCESS, process_count, process_index

NOTICE = 0.2
"""Seconds in which a process notices that another has to stop."""
GRACE = 10.0
"""Seconds that the other processes have to agree on a step."""


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a process to stop: SIGINT, SIGTERM and, unless it is ignored as by nohup, SIGHUP."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + ([] if ignored else [signal.SIGHUP])


class _Signals:
    """What to do with the signals that ask for a stop, and the first of them if it waits for a step."""

    def __init__(self, note: str) -> None:
        self.note = note
        self.received: int | None = None
        self.deferred = False

    def take(self, number: int) -> None:
        """End the process, unless the signal can wait; one that waits already is only overtaken by a SIGINT."""
        if self.received is not None:
            if number == signal.SIGINT:
                end_process(number, "a second signal does not wait for a checkpoint")
        elif self.deferred:
            self.received = number
        else:
            end_process(number, self.note)


def end_process(number: int, note: str = "") -> NoReturn:
    """Say in a sentence that a signal stops this process, and end it and its children, wherever the main thread is.

    Args:
      number: the signal's.
      note: the rest of the sentence, after the signal's name and a semicolon, if there is one.
    """
    try:
        for process in multiprocessing.active_children():
            process.kill()
        sentence = f"lsgd: stopped by {signal.Signals(number).name}{note and f'; {note}'}.\n"
        descriptor = 2  # Not through `sys.stderr`, on which another thread may be waiting.
        if os.isatty(descriptor):
            sentence = "\x1b[?25h\n" + sentence  # Below the progress bar, which has hidden the cursor.
        told_by_first = LAUNCHER in os.environ and os.environ.get(PROCESS) != "0"  # Which is stopped with this one.
        if not told_by_first and select.select([], [descriptor], [], 1)[1]:
            os.write(descriptor, sentence.encode())
    finally:
        os._exit(128 + number)  # JAX may be compiling, and would crash if it were torn down meanwhile.


_current: _Signals | None = None


@contextmanager
def _taken_signals(note: str) -> Iterator[_Signals]:
    """Take the signals by a thread, unless that is done already or this is not the main thread.

    The main thread can be in a call for minutes, and Python's handlers wait for its end; what they raise is lost if it
    happens to be in a destructor.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield _current or _Signals(note)
        return
    numbers = stop_signals()
    if _current is not None:
        _handle(numbers)  # Again: what JAX has loaded meanwhile may have handlers of its own.
        yield _current
        return
    _current = signals = _Signals(note)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def read() -> None:
        while number := os.read(reading, 1):
            if number[0] in numbers:
                signals.take(number[0])

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    before = _handle(numbers)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writing)
        thread.join()
        os.close(reading)
        _current = None


def _handle(numbers: list[signal.Signals]) -> dict[signal.Signals, Any]:
    """Let the signals do nothing but be written to the wakeup descriptor; returns their handlers from before."""
    return {number: signal.signal(number, lambda *_: None) for number in numbers}


@contextmanager
def stopped_at_once(note: str) -> Iterator[None]:
    """Let a signal end the process at once, with a sentence and 128 + the signal for its exit code.

    Args:
      note: the rest of the sentence, as for `end_process`.
    """
    with _taken_signals(note):
        yield


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int | None]]:
    """Let a signal wait for a step at which the run can stop; a SIGINT after it ends the process at once.

    Outside the main thread, where Python handles no signals, they do what they did.

    Yields:
      A function to be called on all processes at every such step: the signal on which to stop there, the same on all
      processes, or None.
    """
    with _taken_signals("") as signals:
        signals.deferred = True
        agreement = _Agreement(signals) if process_count() > 1 else None
        try:
            yield agreement or (lambda: signals.received)
        finally:
            # Until a stopped run has ended, another SIGTERM changes nothing.
            signals.deferred = agreement is not None and agreement.end()


class _Agreement:
    """The call at which all processes stop once one of them has received a signal: the first that none has made yet.

    The signal and the numbers of calls are told through the store of JAX's coordination service, which a thread looks
    into. JAX's own preemption service does the like, but takes SIGTERM away from everybody else.
    """

    _numbers = itertools.count()

    def __init__(self, signals: _Signals) -> None:
        assert global_state.client is not None  # Where there are several processes, they are connected.
        self._store = global_state.client
        self._name = f"lsgd_jax/stop/{next(self._numbers)}"  # All processes make theirs in one order.
        self._signals = signals
        self._lock = threading.Lock()
        self._calls = 0
        self._stop: tuple[int, int] | None = None
        """The number of the call at which to stop, and the signal."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __call__(self) -> int | None:
        with self._lock:
            self._calls += 1
            return self._stop[1] if self._stop is not None and self._calls == self._stop[0] else None

    def end(self) -> bool:
        """Call no more, and let the others know how often this process has; returns whether a stop is agreed on."""
        self._ended.set()
        self._thread.join()
        with suppress(jax.errors.JaxRuntimeError):  # The first process may have ended, and the store with it.
            self._tell_calls()
        return self._stop is not None

    def _tell_calls(self) -> None:
        self._store.key_value_set(f"{self._name}/calls/{process_index()}", str(self._calls), allow_overwrite=True)

    def _watch(self) -> None:
        while not self._ended.wait(NOTICE):
            try:
                if self._signals.received is not None:
                    self._store.key_value_set(
                        f"{self._name}/signal/number", str(self._signals.received), allow_overwrite=True
                    )
                if asked := self._store.key_value_dir_get(f"{self._name}/signal/"):
                    with self._lock:  # No call is made before it is known at which to stop.
                        self._stop = self._agree(int(asked[0][1]))
                    return
            except jax.errors.JaxRuntimeError:  # Another process has ended, and JAX ends this one, too.
                if self._signals.received is not None:
                    end_process(self._signals.received, "no checkpoint was written, since another process has ended")

    def _agree(self, number: int) -> tuple[int, int]:
        self._tell_calls()
        end = time.monotonic() + GRACE
        while len(calls := self._store.key_value_dir_get(f"{self._name}/calls/")) < process_count():
            if time.monotonic() > end:
                end_process(number, "no checkpoint was written, since the other processes do not answer")
            time.sleep(NOTICE / 10)
        return max(int(count) for _, count in calls) + 1, number
