"""Commands as they are given, in processes that need not import JAX anew, and what ends they may come to."""

import contextlib
import gc
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest

from lsgd_jax.__main__ import main
from tests.reliability import faults

TRAIN = ["train", "digits", "--width", ".1", "--batch-size", "8", "--groups", "2", "--workers", "2"]
COMPARE = ["compare", "digits", "--width", ".1", "--batch-size", "8", "--groups", "1", "--workers", "2"]
COMPARE += ["--methods", "lsgd,independent", "--seeds", "0", "--steps", "12", "--eval-every", "4"]


def _end_with_tests():
    """Leave no process, even if the tests are killed."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def _here(function, arguments, cwd, output, variables):
    """What the process does that `calling` starts."""
    gc.freeze()
    threading.Thread(target=_end_with_tests, daemon=True).start()
    os.setsid()
    os.chdir(cwd)
    os.environ |= {"JAX_PLATFORMS": "cpu"} | variables
    for descriptor, name in ((1, "out"), (2, "err")):
        with open(f"{output}.{name}", "wb") as file:
            os.dup2(file.fileno(), descriptor)
    try:
        code = function(*arguments)
    finally:
        jax.distributed.shutdown()  # As JAX does where a process ends by itself: without, others may die of it.
    sys.exit(code)


def lsgd(*arguments):
    """The command, as a process has it."""
    sys.argv = ["lsgd", *arguments]
    return main()


class Command:
    """A command or a function under way in a process of its own session."""

    def __init__(self, function, arguments, cwd, output, variables):
        """Start it; what it prints goes to two files."""
        self.arguments, self._cwd, self._output = arguments, cwd, output
        Path(f"{output}.err").unlink(missing_ok=True)
        self._process = faults.FORKS.Process(target=_here, args=(function, arguments, str(cwd), str(output), variables))
        self._process.start()
        self.pid = self._process.pid

    @property
    def over(self):
        """Whether it has ended."""
        return self._process.exitcode is not None

    def takes_signals(self):
        """Whether it has come so far that it says that it is stopped."""
        with contextlib.suppress(OSError):
            [caught] = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{self.pid}/status").read_text())
            return bool(int(caught, 16) >> (signal.SIGHUP - 1) & 1)
        return False

    @property
    def errors(self):
        """The lines that it has printed to stderr so far."""
        errors = Path(f"{self._output}.err")
        return errors.read_text().splitlines() if errors.exists() else []

    def end(self):
        """Its exit code and the lines that it has printed to stderr, when it has ended."""
        self._process.join(faults.HANG)
        assert self.over, f"it hangs: {self.arguments}"
        return self._process.exitcode, self.errors

    def kill(self):
        """End it and what it has started, if they have not ended."""
        self._process.kill()
        self._process.join()
        for pid in processes_in(self._cwd):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def calling(function, *arguments, cwd, output="output", **variables):
    """A function's process, in an environment with these variables; in the end it is killed with what it has started.

    It exits with what the function returns.
    """
    command = Command(function, arguments, cwd, Path(cwd) / output, variables)
    try:
        yield command
    finally:
        command.kill()


def called(function, *arguments, cwd, output="output", **variables):
    """Its exit code and the lines of its stderr."""
    with calling(function, *arguments, cwd=cwd, output=output, **variables) as command:
        return command.end()


def started(*arguments, **options):
    """A command, started as `calling` does."""
    return calling(lsgd, *map(str, arguments), **options)


def done(*arguments, **options):
    """Its exit code and the lines of its stderr."""
    return called(lsgd, *map(str, arguments), **options)


def assert_one_sentence(code, errors, reproduction):
    """Exit code 2 has one sentence, which comes last, 0 none; there is no traceback.

    Of several processes the first says it, and JAX may tell in its words that the first has ended.
    """
    said = [line for line in errors if line.removeprefix("[0] ").removeprefix("[1] ").startswith("lsgd: ")]
    shown = f"{reproduction}: exit code {code}\n" + "\n".join(errors)
    assert code in (0, 2), shown
    assert not any("Traceback" in line for line in errors), shown
    assert len(said) == (1 if code else 0), shown
    of_first = [line for line in errors if line in said or not line.startswith("[1] ")]
    assert code == 0 or of_first[-1] == said[0], shown


def processes_in(folder):
    """The processes, other than this one, whose working folder it is."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(path / "cwd") == str(folder):
                found.append(int(path.name))
    return [pid for pid in found if pid != os.getpid()]


def assert_no_process_in(folder):
    """None is left of those whose working folder it is; what has been killed may take a moment to be gone."""
    end = time.monotonic() + faults.HANG
    while left := processes_in(folder):
        assert time.monotonic() < end, f"processes are left: {left}"
        time.sleep(0.01)


class Disk:
    """A file system in memory, seen through the process that holds it; it ends with this."""

    def __init__(self, holder, folder):
        """Of a process that has mounted it at a folder."""
        self._holder = holder
        self.path = Path(f"/proc/{holder.pid}/root{folder}")

    def make_room(self):
        """As much as there is memory."""
        self._holder.stdin.write("\n")
        self._holder.stdin.flush()
        assert self._holder.stdout.readline() == "room\n"


@contextlib.contextmanager
def small_disk(folder, limit):
    """A file system that is limited by an option of tmpfs, such as `size=64k`; None where it may not be mounted."""
    script = (
        'mount -t tmpfs -o "$1" none "$2" && echo mounted && read line'
        ' && mount -o remount,size=256m,nr_inodes=100000 "$2" && echo room && read line'
    )
    folder.mkdir(exist_ok=True)
    command = ["unshare", "-m", "-r", "sh", "-c", script, "sh", limit, str(folder)]
    if shutil.which("unshare") is None:
        yield None
        return
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as holder:
        try:
            yield Disk(holder, folder) if holder.stdout.readline() == "mounted\n" else None
        finally:
            holder.kill()


class Hang(BaseException):
    """Something takes too long; no OSError, which commands turn into a sentence."""


@contextlib.contextmanager
def no_hang():
    """Raise `Hang` where this is the main thread's and takes longer than anything should."""

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(faults.HANG)
    try:
        yield
    except Hang:
        pytest.fail("it hangs")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
