"""Stopping on a signal: a run with checkpoints stops at a step that all processes agree on, all else stops at once."""

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
"""Seconds within which a process notices that another is to stop."""
GRACE = 10.0
"""Seconds that the other processes have to agree on a step."""


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a process to stop: SIGINT, SIGTERM and, unless ignored (as under nohup), SIGHUP."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM] + ([] if ignored else [signal.SIGHUP])


class _Signals:
    """Handling of the signals that ask for a stop; remembers the first one if it is deferred."""

    def __init__(self, note: str) -> None:
        self.note = note
        self.received: int | None = None
        self.deferred = False

    def take(self, number: int) -> None:
        """End the process, unless signals are deferred; after a deferred one, only a SIGINT ends it."""
        if self.received is not None:
            if number == signal.SIGINT:
                end_process(number, "a second signal does not wait for a checkpoint")
        elif self.deferred:
            self.received = number
        else:
            end_process(number, self.note)


def end_process(number: int, note: str = "") -> NoReturn:
    """Print one sentence and end this process and its children, whatever the main thread is doing.

    Args:
      number: of the signal that stops the process.
      note: the rest of the sentence, after the signal's name and a semicolon, if there is one.
    """
    try:
        for process in multiprocessing.active_children():
            process.kill()
        sentence = f"lsgd: stopped by {signal.Signals(number).name}{note and f'; {note}'}.\n"
        descriptor = 2  # Not `sys.stderr`, which another thread may have locked.
        if os.isatty(descriptor):
            sentence = "\x1b[?25h\n" + sentence  # Below the progress bar, which has hidden the cursor.
        printed_by_first = LAUNCHER in os.environ and os.environ.get(PROCESS) != "0"  # The launcher stops both.
        if not printed_by_first and select.select([], [descriptor], [], 1)[1]:
            os.write(descriptor, sentence.encode())
    finally:
        os._exit(128 + number)  # JAX would crash if it were torn down while it compiles.


_current: _Signals | None = None


@contextmanager
def _taken_signals(note: str) -> Iterator[_Signals]:
    """Receive signals in a thread, unless that is done already or this is not the main thread.

    The main thread can be in one call for minutes, and Python's handlers wait for it to return; an exception that they
    raise is lost if it hits a destructor.
    """
    global _current
    if threading.current_thread() is not threading.main_thread():
        yield _current or _Signals(note)
        return
    numbers = stop_signals()
    if _current is not None:
        _handle(numbers)  # Again: libraries loaded meanwhile may have set handlers of their own.
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
    """Let signals only be written to the wakeup descriptor; returns their previous handlers."""
    return {number: signal.signal(number, lambda *_: None) for number in numbers}


@contextmanager
def stopped_at_once(note: str) -> Iterator[None]:
    """Let a signal end the process at once, with one sentence and exit code 128 + signal.

    Args:
      note: the rest of the sentence, as for `end_process`.
    """
    with _taken_signals(note):
        yield


@contextmanager
def deferred_signals() -> Iterator[Callable[[], int | None]]:
    """Defer a signal to a step at which the run can stop; a further SIGINT ends the process at once.

    Outside the main thread, where Python handles no signals, nothing changes.

    Yields:
      A function that all processes call at every such step: it returns the signal on which to stop there, the same in
      all processes, or None.
    """
    with _taken_signals("") as signals:
        signals.deferred = True
        agreement = _Agreement(signals) if process_count() > 1 else None
        try:
            yield agreement or (lambda: signals.received)
        finally:
            # Until a stopped run has ended, another SIGTERM has no effect.
            signals.deferred = agreement is not None and agreement.end()


class _Agreement:
    """Agreement on the call at which all processes stop after a signal: the first that none of them has made yet.

    The signal and the processes' numbers of calls go through the key-value store of JAX's coordination service, which a
    thread polls. JAX's own preemption service works similarly, but takes SIGTERM away from everything else.
    """

    _numbers = itertools.count()

    def __init__(self, signals: _Signals) -> None:
        assert global_state.client is not None  # Where there are several processes, they are connected.
        self._store = global_state.client
        self._name = f"lsgd_jax/stop/{next(self._numbers)}"  # All processes create theirs in the same order.
        self._signals = signals
        self._lock = threading.Lock()
        self._calls = 0
        self._stop: tuple[int, int] | None = None
        """Number of the call at which to stop, and the signal."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def __call__(self) -> int | None:
        with self._lock:
            self._calls += 1
            return self._stop[1] if self._stop is not None and self._calls == self._stop[0] else None

    def end(self) -> bool:
        """Publish the final number of calls; returns whether a stop is agreed on."""
        self._ended.set()
        self._thread.join()
        with suppress(jax.errors.JaxRuntimeError):  # The first process may have ended, and the store with it.
            self._publish_calls()
        return self._stop is not None

    def _publish_calls(self) -> None:
        self._store.key_value_set(f"{self._name}/calls/{process_index()}", str(self._calls), allow_overwrite=True)

    def _watch(self) -> None:
        while not self._ended.wait(NOTICE):
            try:
                if self._signals.received is not None:
                    self._store.key_value_set(
                        f"{self._name}/signal/number", str(self._signals.received), allow_overwrite=True
                    )
                if asked := self._store.key_value_dir_get(f"{self._name}/signal/"):
                    with self._lock:  # No call is made until it is known at which one to stop.
                        self._stop = self._agree(int(asked[0][1]))
                    return
            except jax.errors.JaxRuntimeError:  # Another process has ended, and JAX ends this one, too.
                if self._signals.received is not None:
                    end_process(self._signals.received, "no checkpoint was written, since another process has ended")

    def _agree(self, number: int) -> tuple[int, int]:
        self._publish_calls()
        end = time.monotonic() + GRACE
        while len(calls := self._store.key_value_dir_get(f"{self._name}/calls/")) < process_count():
            if time.monotonic() > end:
                end_process(number, "no checkpoint was written, since the other processes do not answer")
            time.sleep(NOTICE / 10)
        return max(int(count) for _, count in calls) + 1, number
