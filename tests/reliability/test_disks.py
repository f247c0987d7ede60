"""Every command that writes, on disks that are too small for it."""

import shutil
import time

import pytest

from lsgd_jax.compare import curves
from lsgd_jax.tracking.run_folder import read_config, read_metrics
from tests.reliability import commands, faults
from tests.reliability.runs import metrics

TRAIN = [*commands.TRAIN, "--steps", "24", "--eval-every", "12", "--checkpoint-every", "8", "--resume"]
WRITING = {
    "train": [*TRAIN, "--run-dir"],
    "train in two processes": ["launch", "--processes", "2", "--", *TRAIN, "--run-dir"],
    "compare": [*commands.COMPARE, "--out"],
    "figure trajectories": ["figure", "trajectories", "--out"],
    "simulate": ["simulate", "digits", "--costs-only", "--steps", "40", "--out"],
    "report": ["report", "run", "--out"],
}
"""What comes next is what they write."""
MOST_SECONDS = 100
"""From the last write to the end, in which a command may also begin and compile, beside others."""
LIMITS = [*((kind, number) for kind in ("size", "nr_inodes") for number in range(12 if faults.SOAK else 1))]
"""Kinds of limits, and which of those between nothing and what is needed."""


def check_what_is_saved(name, path):
    """It can be read, and is a whole of what was begun."""
    if name.startswith("train") and (path / "config.json").exists() and (path / "metrics.jsonl").exists():
        read_metrics(path)
        assert not list(path.rglob("*.new"))
    if name == "compare":
        for run in path.glob("*/seed-0"):
            curves([run], read_config(run).task.headline)


def written(path):
    """The names of all files, but for those of locks and of what was cut off."""
    return {
        str(file.relative_to(path.parent))
        for file in (path, *path.rglob("*"))
        if file.is_file() and not file.name.startswith(".")
    }


def needed(path):
    """The bytes, in pages, and the inodes of what a command has written."""
    paths = [path, *path.rglob("*")]
    pages = sum(-(-file.stat().st_size // 4096) for file in paths if file.is_file())
    return {"size": pages * 4096, "nr_inodes": len(paths) + 1}


@pytest.fixture(scope="module", params=WRITING if faults.SOAK else ["train"])
def unlimited(request, tmp_path_factory):
    """A command, and what it writes where there is room."""
    cwd = tmp_path_factory.mktemp("room")
    run = cwd / "run"
    assert commands.done(*TRAIN, "--run-dir", "run", cwd=cwd)[0] == 0
    if request.param == "train":
        return request.param, run, run
    out = cwd / ("out.html" if request.param == "report" else "out")
    code, errors = commands.done(*WRITING[request.param], out, cwd=cwd)
    assert code == 0, errors
    return request.param, run, out


@pytest.mark.parametrize(("kind", "number"), LIMITS)
def test_a_small_disk_is_one_sentence(kind, number, unlimited, tmp_path, record_property):
    """It ends in bounded time, what was saved can be read, and the same command works when there is room."""
    name, run, whole = unlimited
    shutil.copytree(run, tmp_path / "run")
    most = needed(whole)[kind]
    limit = 1 + (most - 1) * number // 11 if faults.SOAK else most // 2
    if kind == "size":
        limit = max(1, limit // 4096) * 4096
    with commands.small_disk(tmp_path / "disk", f"{kind}={limit}") as disk:
        if disk is None:
            record_property("not tried, since no file system may be mounted here: small disks", 1)
            return
        out = disk.path / whole.name
        code, errors = commands.done(*WRITING[name], out, cwd=tmp_path)
        ended = time.time()
        commands.assert_one_sentence(code, errors, f"{name} with {kind}={limit}")
        commands.assert_no_process_in(tmp_path)
        if disk_times := [file.stat().st_mtime for file in disk.path.rglob("*")]:
            seconds = ended - max(disk_times)
            assert seconds < MOST_SECONDS, f"{name} with {kind}={limit} goes on for {seconds:.1f} s: {errors}"
            record_property(f"most seconds from the last write on a small disk to the end: {name}", round(seconds, 1))
        check_what_is_saved(name, out)
        disk.make_room()
        code, errors = commands.done(*WRITING[name], out, cwd=tmp_path)
        assert code == 0, errors
        assert written(out) >= written(whole)  # Of a run, perhaps metrics from before its first checkpoint, too.
        if name.startswith("train"):
            evaluations = [event for event in metrics(out) if event["event"] == "evaluation"]
            assert evaluations == [event for event in metrics(whole) if event["event"] == "evaluation"]
    record_property(f"small disks: {name}", 1)
