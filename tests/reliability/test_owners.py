"""Commands that would write one folder at the same time."""

import pytest

from lsgd_jax.tracking.run_folder import read_metrics
from tests.reliability import commands, faults

RACES = 20 if faults.SOAK else 1


def race(arguments, folder, seed):
    """Two commands that start within some hundredths of a second; returns how often one was kept out."""
    with (
        commands.started(*arguments, cwd=folder, output="one") as one,
        commands.started(*arguments, cwd=folder, output="other") as other,
    ):
        ends = sorted((one.end(), other.end()))
    reproduction = f"race {seed}: {ends}"
    for code, errors in ends:
        commands.assert_one_sentence(code, errors, reproduction)
    (first, _), (second, errors) = ends
    assert first == 0, reproduction
    if second == 0:  # The first may have ended before the second came.
        return 0
    assert " is being written by " in errors[-1], reproduction
    return 1


def folders(path):
    """New ones, for a race that may have to be tried again, since one was over before the other came."""
    for number in range(5):
        (folder := path / str(number)).mkdir()
        yield folder


@pytest.mark.parametrize("seed", range(RACES))
def test_of_two_that_train_into_a_folder_one_does(seed, tmp_path, record_property):
    """Several times in one folder, so that the races begin with an empty one, and with one to go on in."""
    for folder in folders(tmp_path):
        kept_out = 0
        for steps in (24, 48):
            arguments = [*commands.TRAIN, "--steps", steps, "--eval-every", "12", "--checkpoint-every", "8"]
            kept_out += race([*arguments, "--run-dir", "run", "--resume"], folder, seed)
        evaluations = [event["step"] for event in read_metrics(folder / "run", "evaluation")]
        assert evaluations == [12, 24, 36, 48]
        if kept_out:
            break
    assert kept_out > 0, "no two commands were there at the same time"
    record_property("races of two commands for a folder: train", 2)
    record_property("races of two commands for a folder, in which one was kept out: train", kept_out)


@pytest.mark.parametrize("seed", range(RACES))
def test_of_two_that_compare_into_a_folder_one_does(seed, tmp_path, record_property):
    for folder in folders(tmp_path):
        kept_out = race([*commands.COMPARE, "--out", "c"], folder, seed)
        runs = list((folder / "c").glob("*/seed-0"))
        for run in runs:
            assert [event["step"] for event in read_metrics(run, "evaluation")] == [4, 8, 12]
        assert len(runs) == 2
        if kept_out:
            break
    assert kept_out > 0, "no two commands were there at the same time"
    record_property("races of two commands for a folder: compare", 1)
    record_property("races of two commands for a folder, in which one was kept out: compare", kept_out)
