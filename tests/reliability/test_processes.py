"""Real processes that are interrupted, killed and out of space, and what is left of their runs."""

import dataclasses
import os
import resource
import signal
import sys
import time
from queue import SimpleQueue

import pytest

from lsgd_jax import cli, distributed, train
from lsgd_jax.distributed import launch
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.run_folder import RunFolder
from lsgd_jax.train import loop
from tests.reliability import commands, faults
from tests.reliability.commands import started
from tests.reliability.faults import until, wait_for_step
from tests.reliability.runs import assert_same, metrics

TRAIN = ["train", "digits", "--width", "0.1", "--batch-size", "8", "--groups", "2", "--workers", "2"]
TRAIN += ["--eval-every", "200", "--checkpoint-every", "100", "--steps", "600", "--run-dir"]
CONFIG = PRESETS["digits"].replace(
    width=0.1,
    batch_size=8,
    groups=2,
    workers=2,
    eval_every=200,
    checkpoint_every=100,
    steps=600,
)
"""The same."""
LAUNCH = ["launch", "--processes", "2"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was not stopped."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    train.train_and_evaluate(CONFIG, path, lines=False)
    return path


def interrupted_after_step_40(*arguments):
    log = RunFolder.log

    def last_log(self, event, **values):
        log(self, event, **values)
        if values.get("step", 0) >= 40:
            RunFolder.log = log
            signal.raise_signal(signal.SIGINT)

    RunFolder.log = last_log
    return commands.lsgd(*arguments)


def test_an_interrupted_run_goes_on_to_the_same_bits(whole, tmp_path, capsys):
    code, [*_, last] = commands.called(interrupted_after_step_40, *TRAIN, "run", cwd=tmp_path)
    assert code == 128 + signal.SIGINT
    assert last.startswith("lsgd: stopped by SIGINT after step ")
    assert last.endswith("of 600; to resume, run the same command with --run-dir run --resume.")
    train.train_and_evaluate(CONFIG, tmp_path / "run", lines=False, resume=True)
    assert "the run resumes from step " in capsys.readouterr().err
    assert_same(tmp_path / "run", whole, 600)


def test_a_second_interrupt_stops_at_once(tmp_path):
    with started(*TRAIN, "run", "--steps", "1000000", "--period", "200", cwd=tmp_path) as command:
        wait_for_step(tmp_path / "run", 200)
        os.kill(command.pid, signal.SIGINT)
        os.kill(command.pid, signal.SIGINT)
        code, errors = command.end()
    assert code in (-signal.SIGINT, 128 + signal.SIGINT)  # The first may have done it.
    assert not any("Traceback" in line for line in errors)


def interrupted_before_the_first_step(*arguments):
    loop.program_of = lambda *_, **__: (signal.raise_signal(signal.SIGINT), time.sleep(faults.HANG))
    return commands.lsgd(*arguments)


def test_an_interrupt_before_the_first_step_is_one_sentence(tmp_path):
    why = "no step was under way, and the same command resumes with --run-dir run --resume"
    stopped = (128 + signal.SIGINT, [f"lsgd: stopped by SIGINT; {why}."])
    assert commands.called(interrupted_before_the_first_step, *TRAIN, "run", cwd=tmp_path) == stopped
    assert commands.done(*TRAIN, "run", "--resume", "--steps", "20", cwd=tmp_path)[0] == 0
    unsaved = [*TRAIN, "other", "--checkpoint-every", "0"]
    _, errors = commands.called(interrupted_before_the_first_step, *unsaved, cwd=tmp_path)
    assert errors == ["lsgd: stopped by SIGINT; nothing was saved."]


IMAGENET = ["train", "resnet50-imagenet-4", "--model", "mlp", "--width", "0.1", "--image-size", "16", "--groups", "1"]
IMAGENET += ["--workers", "2", "--batch", "per_worker", "--batch-size", "2", "--steps", "4000", "--learning-rate"]
IMAGENET += ["0.001", "--data-dir"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_stop_before_the_first_step_leaves_no_process(number, prepared, tmp_path):
    """Of those that decode images: what holds the output of the first has to end before that is read whole."""
    script = tmp_path / "decoding.py"  # What decodes is spawned, and has to be able to import it.
    script.write_text(f"""
import multiprocessing, os, sys, time

def stopped():
    print(*(process.pid for process in multiprocessing.active_children()), flush=True)
    os.kill(os.getpid(), {int(number)})
    time.sleep({faults.HANG})

if __name__ == "__main__":
    import lsgd_jax.train.loop
    from lsgd_jax.__main__ import main

    lsgd_jax.train.loop.deferred_signals = stopped
    sys.exit(main())
""")
    train = [*IMAGENET, str(prepared[0]), "--data-processes", "1"]
    done = faults.run(sys.executable, str(script), *train, cwd=tmp_path)
    assert done.returncode in (128 + number, -number), done.stderr
    assert len(done.stdout.split()) == 1


def test_a_killed_process_is_named_and_the_run_brought_back(tmp_path):
    more = ["--steps", "300", "--checkpoint-every", "20"]
    with started(*LAUNCH, "--restarts", "1", "--", *TRAIN, "run", *more, cwd=tmp_path) as launcher:
        until(lambda: any(path.name.isdecimal() for path in (tmp_path / "run" / "checkpoints").glob("*")))
        os.kill(faults.children(launcher.pid)[1], signal.SIGKILL)
        code, errors = launcher.end()
    assert code == 0, errors
    assert "lsgd: process 1 was killed by SIGKILL; the others were stopped." in errors
    assert "lsgd: the run resumes from its last checkpoint, restart 1 of 1." in errors
    assert any(line.startswith("[0] the run resumes from step ") for line in errors)
    faults.trained(dataclasses.replace(CONFIG, steps=300, checkpoint_every=20), tmp_path / "whole", 2)
    assert_same(tmp_path / "run", tmp_path / "whole", 300)


def test_several_processes_stop_at_one_step_when_one_is_terminated(tmp_path):
    """That is no crash, after which they would be restarted."""
    command = [*LAUNCH, "--restarts", "1", "--", *TRAIN, "run", "--steps", "1000000"]
    with started(*command, cwd=tmp_path) as launcher:
        wait_for_step(tmp_path / "run", 40)
        os.kill(faults.children(launcher.pid)[1], signal.SIGTERM)
        code, errors = launcher.end()
    assert code == 128 + signal.SIGTERM
    assert not any("restart" in line for line in errors)
    [stop] = [line for line in errors if "stopped by" in line]
    assert stop.startswith("[0] lsgd: stopped by SIGTERM after step ")
    step = int(stop.split("after step ")[1].split()[0])
    assert (tmp_path / "run" / "checkpoints" / str(step)).is_dir()
    assert metrics(tmp_path / "run")[-1]["step"] == step


def with_small_files(*arguments):
    """A command that can't write more than 10 KiB to a file, and neither can what it starts."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (10 * 2**10, 10 * 2**10))
    return commands.lsgd(*arguments)


def test_a_full_disk_is_one_sentence_and_what_there_was_is_kept(tmp_path):
    """A limit on files' sizes, which a checkpoint comes to and the metrics do not."""
    train.train_and_evaluate(dataclasses.replace(CONFIG, steps=8), tmp_path / "run", lines=False)
    before = metrics(tmp_path / "run")
    more = [*TRAIN, "run", "--steps", "12", "--resume"]
    code, errors = commands.called(with_small_files, *more, cwd=tmp_path)
    assert (code, (tmp_path / "output.out").read_text()) == (2, "")
    assert errors[-1].startswith("lsgd: ")
    assert not any("Traceback" in line for line in errors)
    assert (tmp_path / "run" / "checkpoints" / "8").is_dir()
    assert metrics(tmp_path / "run")[: len(before)] == before


def test_a_full_disk_is_the_end_of_several_processes_too(tmp_path):
    """None waits for another, and they are not started again: what is wrong would still be."""
    launch = [*LAUNCH, "--restarts", "1", "--", *TRAIN, "run", "--steps", "8", "--workers", "4"]
    code, errors = commands.called(with_small_files, *launch, cwd=tmp_path)
    assert code == 2, errors
    [told] = [line for line in errors if "lsgd: " in line]
    assert told.startswith("[0] lsgd: a checkpoint can't be written to ")
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_picture_that_cannot_be_written_is_the_end_of_several_processes_too(tmp_path):
    """They end together, so that no other has anything to say."""
    train.train_and_evaluate(dataclasses.replace(CONFIG, steps=8), tmp_path / "run", lines=False)
    (tmp_path / "run" / "curves.png").mkdir()
    launch = [*LAUNCH, "--restarts", "1", "--", *TRAIN, "run", "--steps", "8", "--resume"]
    code, errors = commands.done(*launch, cwd=tmp_path)
    assert code == 2
    assert errors[-1] == "[0] lsgd: run/curves.png can't be written (Is a directory)."
    assert not any("[1] " in line for line in errors)


def test_what_one_process_has_said_is_why_all_end(monkeypatch, capfd):
    """Even if it is seen later that it has ended than that another has crashed for it."""

    class LastFirst(SimpleQueue):
        def get(self):
            until(lambda: self.qsize() == 2)
            return max(super().get(), super().get(), key=lambda end: end[0].number)

    monkeypatch.setattr(launch, "SimpleQueue", LastFirst)
    ends = "import os, sys; sys.exit(2 + int(os.environ['LSGD_PROCESS']))"
    assert launch.launch([sys.executable, "-c", ends], 2, restarts=1) == 2
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits", "--resume"], "a run is resumed in its folder: name it with --run-dir."),
        (
            ["train", "digits", "--resume", "--run-dir", "run", "--checkpoint-every", "0"],
            "checkpoint_every is 0: there are",
        ),
        (["launch", "--processes", "2", "--restarts", "1", "--", "train", "digits"], "name it with --run-dir."),
        (
            ["launch", "--processes", "2", "--restarts", "-1", "--", "train", "digits"],
            "restarts must be at least 0, got",
        ),
    ],
)
def test_a_wrong_command_is_one_sentence(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for what in ("initialize", "simulate_devices"):
        monkeypatch.setattr(distributed, what, lambda *arguments: None)
    assert cli.main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("lsgd: ")
    assert message in line
