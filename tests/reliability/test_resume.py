"""A run that was stopped goes on to the bits of one that was not."""

import dataclasses
import json
import os
import random
import shutil
import signal

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lsgd_jax import train
from lsgd_jax.checkpoint import Checkpoints, Progress
from lsgd_jax.config import Config
from lsgd_jax.data import InMemory
from lsgd_jax.errors import Interrupted, UsageError
from lsgd_jax.figures.run import draw
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.run_folder import RunFolder, read_metrics
from lsgd_jax.step import state_shapes
from tests.reliability import faults
from tests.reliability.runs import SMALL, arrays, assert_same, metrics

CONFIGS = {name: {"method": name, "groups": 1} for name in METHODS if name != "lsgd"}
CONFIGS["downpour"]["learning_rate"] = 0.02
CONFIGS |= {
    "lsgd, plain": {"sampling": "independent", "global_period": 8},
    "lsgd, int8 wire, delay and stale pulls": {
        "wire": "int8",
        "delay": 1,
        "stale_pull": 0.1,
        "global_stale_pull": 0.1,
        "global_period": 8,
    },
    "lsgd, one group, adamw": {
        "groups": 1,
        "workers": 4,
        "local_optimizer": "adamw",
        "learning_rate": 0.01,
        "learning_rate_drops": (0.4,),
    },
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.usefixtures("quick_compilation")
def test_a_stop_at_any_step_changes_no_bit(name, tmp_path, monkeypatch, record_property):
    config = dataclasses.replace(SMALL, **CONFIGS[name])
    error = train.train_and_evaluate(config, tmp_path / "whole", lines=False)
    steps = range(4, config.steps, 4)
    for stop in steps if faults.SOAK else [random.Random(name).choice(steps)]:
        path = tmp_path / str(stop)
        with monkeypatch.context() as patched:
            faults.stop_after(patched, stop // 4, signal.SIGTERM)
            with pytest.raises(
                Interrupted, match=f"stopped by SIGTERM after step {stop} of 24; the same command goes on"
            ):
                train.train_and_evaluate(config, path, lines=False)
        assert train.train_and_evaluate(config, path, lines=False, resume=True) == error
        assert_same(path, tmp_path / "whole", config.steps)
        record_property(f"stops by a signal, resumed to the bit: {name}", 1)


KILLS = 6 if faults.SOAK else 1
KILLED = [(name, processes) for name in CONFIGS for processes in (1, 2)] if faults.SOAK else [("easgd", 1)]


@pytest.mark.parametrize(("name", "processes"), KILLED)
def test_kills_at_any_point_change_no_bit(name, processes, tmp_path, record_property):
    """While it is imported, restored, compiled, trained or saved; every program of four steps is saved."""
    config = dataclasses.replace(SMALL, steps=64, eval_every=8, checkpoint_every=4, **CONFIGS[name])
    faults.trained(config, tmp_path / "whole", processes)
    rng, path = random.Random(f"{name} {processes}"), tmp_path / "parts"
    lines = len(metrics(tmp_path / "whole"))
    kills = [
        faults.killed(config, path, processes, count, rng, resume=path.exists())
        for count in sorted(rng.sample(range(1, lines - 1), KILLS))
    ]
    faults.trained(config, path, processes, resume=True)
    assert_same(path, tmp_path / "whole", config.steps)
    record_property(f"kills by SIGKILL, resumed to the bit: {name}, {processes} processes", sum(kills))


@pytest.mark.parametrize(
    ("saved", "now", "options"),
    [((1, 4), (2, 4), {"method": "lsgd", "wire": "int8", "stale_pull": 0.1}), ((2, 2), (1, 2), {"method": "easgd"})],
)
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_goes_on_with_other_workers(saved, now, options, tmp_path, capsys):
    config = dataclasses.replace(SMALL, groups=saved[0], workers=saved[1], steps=12, **options)
    path = tmp_path / "run"
    train.train_and_evaluate(config, path, lines=False)
    resized = dataclasses.replace(config, groups=now[0], workers=now[1], steps=24)
    train.train_and_evaluate(resized, path, lines=False, resume=True)
    [event] = [event for event in metrics(path) if event["event"] == "resume"]
    assert np.shape(event["workers_from"]) == now
    if config.method == "lsgd":
        assert np.ravel(event["workers_from"]).tolist() == [0, 1, 2, 3] + [best_first(path)[0]] * 4
    assert Config.load(path) == resized
    assert np.shape(metrics(path)[-1]["worker_errors"]) == now
    assert draw(path).exists()
    assert f"{now[0]} x {now[1]} workers in place of {saved[0]} x {saved[1]}: " in capsys.readouterr().err


def best_first(path):
    """The positions of the workers by their scores after step 12."""
    [scores] = [e["scores"] for e in metrics(path) if e["event"] == "exchange" and e["step"] == 12]
    return np.argsort(np.ravel(scores), kind="stable").tolist()


@pytest.mark.usefixtures("quick_compilation")
def test_an_epoch_goes_on_with_other_workers(tmp_path, monkeypatch):
    """An epoch is six steps of four workers; others take what is left of it, and rates drop when it is at its end."""
    counts, given = np.zeros(768, int), InMemory.batches

    def counted(feed, first, end):
        for batch in given(feed, first, end):
            np.add.at(counts, batch.ravel(), 1)
            yield batch

    monkeypatch.setattr(InMemory, "batches", counted)
    config = dataclasses.replace(
        SMALL,
        method="independent",
        groups=1,
        batch_size=32,
        validation=669 / 1437,
        eval_every=4,
        checkpoint_every=4,
        learning_rate_drops=(1.0, 2.0),
        learning_rate_drops_in="epochs",
    )
    ends = []
    for workers, steps in [(4, 8), (2, 12), (2, 20), (3, 24)]:  # 256 examples, 512, 1024 and 1408.
        resized = dataclasses.replace(config, workers=workers, steps=steps)
        train.train_and_evaluate(resized, tmp_path / "run", lines=False, resume=True)
        ends.append(np.bincount(counts, minlength=4).tolist())
    assert ends == [[0, 512, 256, 0], [0, 256, 512, 0], [0, 0, 512, 256], [0, 0, 128, 640]]
    rates = [event["learning_rate_factor"] for event in metrics(tmp_path / "run") if event["event"] == "evaluation"]
    np.testing.assert_allclose(rates, [1, 1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.usefixtures("quick_compilation")
def test_a_run_of_two_processes_goes_on_in_one_and_in_four(tmp_path):
    """In one with half of the workers, and in both with twice as many, which then do the same."""
    config = dataclasses.replace(SMALL, groups=1, workers=2, steps=12)
    faults.trained(config, tmp_path / "fewer", 2)
    for name in ("one", "four"):
        shutil.copytree(tmp_path / "fewer", tmp_path / name)
    twice = dataclasses.replace(config, workers=4, steps=20)
    faults.trained(twice, tmp_path / "four", 4, resume=True)
    train.train_and_evaluate(twice, tmp_path / "one", lines=False, resume=True)
    train.train_and_evaluate(
        dataclasses.replace(config, workers=1, steps=20), tmp_path / "fewer", lines=False, resume=True
    )
    resumes = {}
    for name in ("one", "four", "fewer"):
        [resumes[name]] = [event for event in metrics(tmp_path / name) if event["event"] == "resume"]
    assert resumes["one"] == resumes["four"] | {"processes": 1}
    assert resumes["four"]["processes"] == 4
    assert np.ravel(resumes["fewer"]["workers_from"]).tolist() == best_first(tmp_path / "fewer")[:1]
    one, four = arrays(tmp_path / "one", 20), arrays(tmp_path / "four", 20)
    assert one.keys() == four.keys()
    for name, x in one.items():
        np.testing.assert_allclose(x, four[name], rtol=1e-3, atol=1e-4, err_msg=name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with checkpoints of the steps 8, 12 (its best or not), 16 and 24."""
    path = tmp_path_factory.mktemp("runs") / "run"
    train.train_and_evaluate(dataclasses.replace(SMALL, keep_checkpoints=9), path, lines=False)
    return path


LONGER = dataclasses.replace(SMALL, keep_checkpoints=9, steps=28)


@pytest.mark.parametrize("damage", ["bit", "cut", "progress", "missing", "metrics"])
def test_the_newest_good_checkpoint_is_found(damage, finished, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    newest = path / "checkpoints" / "24"
    if damage == "bit":
        for file in faults.files(newest / "state"):
            faults.flip_a_bit(file)
    elif damage == "cut":
        for file in faults.files(newest / "state"):
            faults.cut(file, 0.5)
    elif damage == "progress":
        (newest / "progress" / "metadata").write_text('{"progress": {"step": "24"}, "arrays": 1}')
    elif damage == "missing":
        shutil.rmtree(newest / "state")
    else:
        faults.cut(path / "metrics.jsonl", 0.9)
    train.train_and_evaluate(LONGER, path, lines=False, resume=True)
    told = capsys.readouterr().err
    assert "the checkpoint of step 24 can't be read, since " in told
    assert "the run goes on from step 16" in told
    assert (path / "unreadable-checkpoint-24").is_dir()
    assert [e["step"] for e in metrics(path) if e["event"] == "evaluation"] == [12, 24, 28]
    assert metrics(path)[: len(metrics(finished))] == metrics(finished)


def test_a_line_that_was_not_finished_is_written_anew(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "exchange", "step": 28, "sco')
    assert read_metrics(path, "evaluation") == read_metrics(finished, "evaluation")
    train.train_and_evaluate(LONGER, path, lines=False, resume=True)
    assert metrics(path)[: len(metrics(finished))] == metrics(finished)
    assert metrics(path)[-1]["step"] == 28


def damage_all(path):
    for folder in (path / "checkpoints").iterdir():
        for file in faults.files(folder / "state"):
            faults.cut(file, 0.1)


def link_checkpoints(path):
    (path / "checkpoints").rename(path.parent / "elsewhere")
    (path / "checkpoints").symlink_to(path.parent / "elsewhere")


def save_nowhere(path):
    shutil.rmtree(path / "checkpoints")
    (path / "config.json").write_text(LONGER.replace(checkpoint_every=0).to_json())


@pytest.mark.parametrize(
    ("damage", "changed", "message"),
    [
        (damage_all, {}, "none of the checkpoints in .* can be read, that of step 24 since "),
        (link_checkpoints, {}, "checkpoints is a link, through which the run would write elsewhere"),
        (lambda path: (path / "config.json").unlink(), {}, "is no folder of a run, its config.json can't be read"),
        (lambda path: None, {"learning_rate": 0.2}, "can't go on with another learning_rate: 0.2, not 0.1"),
        (save_nowhere, {}, "can't go on: its checkpoint_every is 0, and nothing was saved"),
        (lambda path: None, {"steps": 20}, "steps must be at least the 24 that the run has taken, got 20"),
    ],
)
def test_what_cannot_go_on_is_one_sentence_and_stays_as_it_is(damage, changed, message, finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    damage(path)
    with pytest.raises(UsageError, match=message):
        train.train_and_evaluate(dataclasses.replace(LONGER, **changed), path, lines=False, resume=True)
    assert metrics(path) == metrics(finished)


def test_metrics_without_a_checkpoint_are_kept_beside(finished, tmp_path, capsys):
    """As a run that was killed before its first one leaves them, twice."""
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    logged = (path / "metrics.jsonl").read_bytes()
    for number in (1, 2):
        shutil.rmtree(path / "checkpoints")
        train.train_and_evaluate(dataclasses.replace(SMALL, keep_checkpoints=9), path, lines=False, resume=True)
        beside = f"metrics-before-{number}.jsonl"
        assert f"yet: the run starts, and its metrics of before are in {beside} now" in capsys.readouterr().err
        assert metrics(path) == metrics(finished)
        assert len((path / beside).read_bytes().splitlines()) == len(logged.splitlines())
    assert (path / "metrics-before-1.jsonl").read_bytes() == logged


def test_a_finished_run_is_finished(finished, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    config = dataclasses.replace(SMALL, keep_checkpoints=9)
    error = train.train_and_evaluate(config, path, lines=False, resume=True)
    assert error == read_metrics(finished, "evaluation")[-1]["center_error"]
    assert metrics(path) == metrics(finished)
    assert "the run has taken its 24 steps already" in capsys.readouterr().err


def test_other_settings_than_the_runs_are_named(finished, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    environment = json.loads((path / "environment.json").read_text())
    assert environment["settings"] | {"XLA_FLAGS": ""} == {
        "jax_enable_x64": False,
        "jax_default_prng_impl": "threefry2x32",
        "jax_threefry_partitionable": True,
        "jax_default_matmul_precision": None,
        "XLA_FLAGS": "",
    }
    environment["settings"] |= {"jax_enable_x64": True, "XLA_FLAGS": "--others"}
    (path / "environment.json").write_text(json.dumps(environment))
    config, flags = dataclasses.replace(SMALL, keep_checkpoints=9), os.environ.get("XLA_FLAGS", "")
    train.train_and_evaluate(config, path, lines=False, resume=True)
    started = "the run started with other settings, so that its results may differ: "
    changed = f"jax_enable_x64 False (was True), XLA_FLAGS {flags!r} (was '--others')"
    assert capsys.readouterr().err.splitlines()[0] == started + changed
    (path / "environment.json").write_text("{}")  # As that of an older run.
    train.train_and_evaluate(config, path, lines=False, resume=True)
    assert started not in capsys.readouterr().err


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    config = dataclasses.replace(SMALL, keep_checkpoints=1, steps=48, eval_every=4, checkpoint_every=4)
    train.train_and_evaluate(config, tmp_path / "run", lines=False)
    errors = {e["step"]: e["center_error"] for e in read_metrics(tmp_path / "run", "evaluation")}
    kept = {int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert 48 in kept
    assert len(kept) <= 2
    assert min(errors[step] for step in kept) == min(errors.values())


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(Config)]), JSON, max_size=4)


def examples(few, many):
    """How many inputs to try, whose folder is made anew for each."""
    return settings(
        max_examples=many if faults.SOAK else few,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@examples(50, 3000)
@given(text=JSON.map(json.dumps) | FIELDS.map(lambda f: json.dumps(json.loads(SMALL.to_json()) | f)) | st.text())
def test_whatever_a_configuration_holds_is_one_sentence(text, tmp_path, record_property):
    """Of a configuration that no run of this preset has written."""
    path = tmp_path / "run"
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(text, errors="replace")
    with pytest.raises(UsageError) as error:
        RunFolder(path, PRESETS["mnist1d"], resume=True)
    assert len(str(error.value).splitlines()) == 1
    record_property("hostile inputs: configurations", 1)


@pytest.fixture(scope="module")
def newest(finished, tmp_path_factory):
    """A folder of checkpoints, a function that reads what that of step 24 holds, and what it held."""
    folder = tmp_path_factory.mktemp("damaged") / "checkpoints"
    shutil.copytree(finished / "checkpoints", folder)
    placement, _, model, optimizer = train.prepare(SMALL)
    checkpoints, shapes = Checkpoints(folder, placement, 9), state_shapes(model, optimizer, placement)

    def read():
        """The bytes, or None where they can't be read and that is said in a line."""
        try:
            state = checkpoints.restore(24, shapes)
        except UsageError as error:
            return None if len(str(error).splitlines()) == 1 else str(error)
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]

    return folder / "24", read, read()


TOLD = st.dictionaries(st.sampled_from(["progress", "arrays"]), JSON, max_size=2)
PROGRESS = st.dictionaries(st.sampled_from([field.name for field in dataclasses.fields(Progress)]), JSON, max_size=2)


@examples(20, 1500)
@given(told=TOLD, progress=PROGRESS, text=st.none() | st.text())
def test_whatever_is_told_of_a_checkpoint_is_one_sentence_or_its_state(told, progress, text, newest, record_property):
    folder, read, state = newest
    file = folder / "progress" / "metadata"
    before = file.read_text()
    about = json.loads(before)
    about = about | {"progress": about["progress"] | progress} | told
    file.write_text(json.dumps(about) if text is None else text, errors="replace")
    try:
        assert read() in (None, state)
    finally:
        file.write_text(before)
    record_property("hostile inputs: what is told of a checkpoint", 1)


@pytest.mark.parametrize("earlier", [[[1, 0, 8]], [[25, 2, 8]], [[1, 2]], [[1, 2, "8"]], [3], None, "missing"])
def test_earlier_workers_are_those_of_steps_that_the_run_has_taken(earlier, newest):
    """A checkpoint that tells of none is of before there was such a field, and can be read."""
    folder, read, state = newest
    file = folder / "progress" / "metadata"
    before = file.read_text()
    about = json.loads(before)
    assert about["progress"].pop("earlier") == []
    if earlier != "missing":
        about["progress"]["earlier"] = earlier
    file.write_text(json.dumps(about))
    try:
        assert read() == (state if earlier == "missing" else None)
    finally:
        file.write_text(before)


@examples(10, 1000)
@given(data=st.data())
def test_whatever_becomes_of_a_file_is_one_sentence_or_the_state(data, newest, record_property):
    folder, read, state = newest
    file = data.draw(st.sampled_from(sorted(faults.files(folder))))
    before = file.read_bytes()
    kind = data.draw(st.sampled_from(["bit", "cut", "gone", "other"]))
    if kind == "bit":
        faults.flip_a_bit(file, data.draw(st.floats(0, 1, exclude_max=True)))
    elif kind == "cut":
        faults.cut(file, data.draw(st.floats(0, 1, exclude_max=True)))
    elif kind == "gone":
        file.unlink()
    else:
        file.write_bytes(data.draw(st.binary(max_size=200)))
    try:
        assert read() in (None, state)
    finally:
        file.write_bytes(before)
    record_property("hostile inputs: damaged files of a checkpoint", 1)
