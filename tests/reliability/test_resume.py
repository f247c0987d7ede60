"""A run that was stopped goes on to the bits of one that was not."""

import dataclasses
import io
import json
import os
import random
import shutil
import signal
import threading
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lsgd_jax import train
from lsgd_jax.config import Config
from lsgd_jax.data import InMemory
from lsgd_jax.errors import Interrupted, UsageError
from lsgd_jax.figures.run import draw
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.run_folder import RunFolder, read_metrics
from lsgd_jax.train import checkpoint, setup
from lsgd_jax.train.checkpoint import Checkpoints, Progress
from lsgd_jax.train.step import init_state, state_shapes
from lsgd_jax.variants import links
from tests.mapping import need_devices
from tests.networks import WithOneLayer
from tests.reliability import faults
from tests.reliability.runs import SMALL, arrays, assert_same, metrics

ONE_LAYER = SMALL.replace(task=WithOneLayer("digits"))
CONFIGS = {name: {"method": name, "groups": 1} for name in METHODS if name != "lsgd"}
CONFIGS["downpour"]["learning_rate"] = 0.02
CONFIGS |= {
    "lsgd, streamed": {"fragments": 2, "overlap": 1, "wire": "int8", "stale_pull": 0.1, "global_period": 8},
    "diloco, streamed": {"method": "diloco", "groups": 1, "fragments": 2, "overlap": 1, "mixing": 0.5},
    "lsgd, plain": {"sampling": "independent", "global_period": 8},
    "lsgd, int8 wire, delay and stale pulls": {
        "wire": "int8",
        "delay": 1,
        "stale_pull": 0.1,
        "global_stale_pull": 0.1,
        "global_period": 8,
    },
    "lsgd, one group, adamw, ladder": {
        "groups": 1,
        "workers": 4,
        "local_optimizer": "adamw",
        "learning_rate": 0.01,
        "learning_rate_drops": (0.4,),
        "learning_rates": "ladder",
    },
}


@pytest.mark.usefixtures("shared_programs")
@pytest.mark.parametrize("name", CONFIGS)
def test_a_stop_at_any_step_changes_no_bit(name, tmp_path, monkeypatch, record_property):
    config = dataclasses.replace(ONE_LAYER, **CONFIGS[name])
    error = train.train_and_evaluate(config, tmp_path / "whole", lines=False)
    steps = range(4, config.steps, 4)
    for stop in steps if faults.SOAK else [random.Random(name).choice(steps)]:
        path = tmp_path / str(stop)
        with monkeypatch.context() as patched:
            faults.stop_after(patched, stop // 4, signal.SIGTERM)
            with pytest.raises(
                Interrupted, match=f"stopped by SIGTERM after step {stop} of 24; to resume, run the same command"
            ):
                train.train_and_evaluate(config, path, lines=False)
        assert train.train_and_evaluate(config, path, lines=False, resume=True) == error
        assert_same(path, tmp_path / "whole", config.steps)
        record_property(f"stops by a signal, resumed to the bit: {name}", 1)


KILLS = 6 if faults.SOAK else 1
KILLED = [(name, processes) for name in CONFIGS for processes in (1, 2)] if faults.SOAK else [("easgd", 1)]


@pytest.mark.usefixtures("shared_programs")
@pytest.mark.parametrize(("name", "processes"), KILLED)
def test_kills_at_any_point_change_no_bit(name, processes, tmp_path, record_property):
    """While it is imported, restored, compiled, trained or saved; every program of four steps is saved."""
    config = dataclasses.replace(ONE_LAYER, steps=64, eval_every=8, checkpoint_every=4, **CONFIGS[name])
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


def test_a_quorum_of_other_workers_goes_on_from_where_they_are(tmp_path):
    """Before their first exchange, the model that is evaluated is their mean, and not where training began."""
    config = dataclasses.replace(
        SMALL, method="quorum", groups=1, workers=3, steps=12, batch_size=32, learning_rate=0.3
    )
    for changed in ({}, {"workers": 2, "steps": 14}):
        train.train_and_evaluate(dataclasses.replace(config, **changed), tmp_path / "run", lines=False, resume=True)
    losses = {e["step"]: e["center_loss"] for e in metrics(tmp_path / "run") if e["event"] == "evaluation"}
    assert losses[12] < 2.0  # At the start, ln 10 = 2.3 and more.
    assert abs(losses[14] - losses[12]) < 0.1


@pytest.mark.parametrize("options", [{}, {"fragments": 2, "overlap": 1}], ids=str)
def test_workers_of_other_groups_keep_their_counts_of_steps(options, tmp_path):
    """Those of the first level; what they know of leaders is dropped."""
    placement, _, model, optimizer = setup.prepare(SMALL.replace(global_period=8, **options))
    fresh = init_state(model, optimizer, placement)
    state = jax.tree.map(lambda x: x + 7 if x.dtype == np.int32 else x, fresh)
    with Checkpoints(tmp_path, placement, 1) as checkpoints:
        checkpoints.save(state, dataclasses.replace(Progress.at_start(placement), step=7, scores=[[1.0] * 2] * 2))
    resized = checkpoints.restore_resized(7, fresh, [0, 1, 2, 3], optimizer.init)
    first, second = links(resized.optimizer)
    parts_of_first = (*first.link.sending, *first.link.applying) if options else (first.link,)
    for part in (*parts_of_first, first.link):
        np.testing.assert_array_equal(part.step, np.full((2, 2), 7))
        np.testing.assert_array_equal(part.exchanges, np.zeros((2, 2)))
    np.testing.assert_array_equal(first.seen, np.full((2, 2), 7))
    np.testing.assert_array_equal(second.link.step, np.zeros((2, 2)))
    np.testing.assert_array_equal(second.seen, np.zeros((2, 2)))


def best_first(path):
    """The positions of the workers by their scores after step 12."""
    [scores] = [e["scores"] for e in metrics(path) if e["event"] == "exchange" and e["step"] == 12]
    return np.argsort(np.ravel(scores), kind="stable").tolist()


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


def test_a_run_of_two_processes_goes_on_in_one_and_in_four(tmp_path):
    """In one with half of the workers, and in both with twice as many, which then do the same."""
    need_devices(4)
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


@pytest.mark.usefixtures("shared_programs")
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
        (newest / "progress" / "metadata").write_text('{"format": 1, "progress": {"step": "24"}, "arrays": 1}')
    elif damage == "missing":
        shutil.rmtree(newest / "state")
    else:
        faults.cut(path / "metrics.jsonl", 0.9)
    train.train_and_evaluate(LONGER, path, lines=False, resume=True)
    told = capsys.readouterr().err
    assert "the checkpoint of step 24 can't be read, since " in told
    assert "the run resumes from step 16" in told
    assert (path / "unreadable-checkpoint-24").is_dir()
    assert [e["step"] for e in metrics(path) if e["event"] == "evaluation"] == [12, 24, 28]
    assert metrics(path)[: len(metrics(finished))] == metrics(finished)


@pytest.mark.usefixtures("shared_programs")
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


def replace_metrics_by_a_pipe(path):
    shutil.rmtree(path / "checkpoints")
    (path / "metrics.jsonl").rename(path.parent / "metrics.jsonl")
    os.mkfifo(path / "metrics.jsonl")


def save_nowhere(path):
    shutil.rmtree(path / "checkpoints")
    (path / "config.json").write_text(LONGER.replace(checkpoint_every=0).to_json())


@pytest.mark.parametrize(
    ("damage", "changed", "message"),
    [
        (damage_all, {}, "none of the checkpoints in .* can be read; the one of step 24: its arrays can't be read"),
        (link_checkpoints, {}, "checkpoints is a link that would lead the run elsewhere: replace it by a copy"),
        (replace_metrics_by_a_pipe, {}, "metrics.jsonl is neither a file nor a folder: remove it"),
        (lambda path: (path / "config.json").unlink(), {}, "is not a run folder, its config.json can't be read"),
        (lambda path: None, {"learning_rate": 0.2}, "can't be resumed with another learning_rate: 0.2, not 0.1"),
        (save_nowhere, {}, "can't be resumed: its checkpoint_every is 0, and nothing was saved"),
        (lambda path: None, {"steps": 20}, "steps must be at least the 24 that the run has taken, got 20"),
    ],
)
def test_what_cannot_go_on_is_one_sentence_and_stays_as_it_is(damage, changed, message, finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    damage(path)
    with pytest.raises(UsageError, match=message):
        train.train_and_evaluate(dataclasses.replace(LONGER, **changed), path, lines=False, resume=True)
    kept = path.parent if (path.parent / "metrics.jsonl").exists() else path
    assert metrics(kept) == metrics(finished)


@pytest.mark.parametrize(("version", "how"), [(None, "without a format version"), ("7", "in format '7'")])
def test_checkpoints_of_another_version_are_refused_and_left_alone(version, how, finished, tmp_path):
    """Made by hand, as another version of this package has written them; the newest is damaged."""
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    shutil.rmtree(path / "checkpoints")
    for step in (8, 16):
        folder = path / "checkpoints" / str(step)
        (folder / "state").mkdir(parents=True)
        (folder / "progress").mkdir()
        np.savez(folder / "state" / "0.npz", workers=np.arange(4), rows=np.zeros((4, 8), np.uint8))
        progress = {"shape": [2, 2], "processes": 1, "devices": 4, "step": step, "scores": [[1.0, 2.0], [3.0, 4.0]]}
        about = {"progress": progress, "arrays": [[".optimizer[1].leaders[0]", "float32", [2]]], "error": 0.5}
        about |= {} if version is None else {"format": version}
        (folder / "progress" / "metadata").write_text(json.dumps(about))
    faults.cut(folder / "progress" / "metadata", 0.5)
    before = {file: file.read_bytes() for file in faults.files(path)}
    message = (
        rf"^the checkpoint of step 8 in .*run can't be read: it was written by another version of lsgd_jax, {how} where"
        rf" this one reads format {checkpoint.FORMAT}: start anew in another folder, or use that version\.$"
    )
    with pytest.raises(UsageError, match=message):
        train.train_and_evaluate(LONGER, path, lines=False, resume=True)
    assert {file: file.read_bytes() for file in faults.files(path)} == before


def test_a_checkpoint_from_before_workers_of_several_chips_is_read(finished, to_save, tmp_path):
    shutil.copytree(finished / "checkpoints" / "24", tmp_path / "24")
    path = tmp_path / "24" / "progress" / "metadata"
    about = json.loads(path.read_text())
    assert about["progress"].pop("chips") == 1
    path.write_text(json.dumps(about))
    placement, state, progress = to_save
    older = Checkpoints(tmp_path, placement, 9)
    older.check_formats()
    assert older.progress(24) == progress
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    jax.tree.map(np.testing.assert_array_equal, older.restore(24, shapes), state)


@pytest.mark.usefixtures("shared_programs")
def test_metrics_without_a_checkpoint_are_kept_beside(finished, tmp_path, capsys):
    """As a run that was killed before its first one leaves them, twice."""
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    logged = (path / "metrics.jsonl").read_bytes()
    for number in (1, 2):
        shutil.rmtree(path / "checkpoints")
        train.train_and_evaluate(dataclasses.replace(SMALL, keep_checkpoints=9), path, lines=False, resume=True)
        beside = f"metrics-before-{number}.jsonl"
        assert f"yet: the run starts, and its earlier metrics are in {beside} now" in capsys.readouterr().err
        assert metrics(path) == metrics(finished)
        assert len((path / beside).read_bytes().splitlines()) == len(logged.splitlines())
    assert (path / "metrics-before-1.jsonl").read_bytes() == logged


@pytest.mark.parametrize("name", ["config.json", "environment.json", "metrics.jsonl"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_disk_that_is_full_at_the_first_files_leaves_a_folder_to_begin_in(name, resume, tmp_path, monkeypatch):
    with monkeypatch.context() as full:
        faults.fill_disk(full, name)
        with pytest.raises(UsageError, match=rf"{name} can't be written \(No space left on device\)\.$"):
            RunFolder(tmp_path, SMALL, resume=resume)
    with RunFolder(tmp_path, SMALL, resume=resume):
        assert Config.load(tmp_path) == SMALL


def test_a_run_has_its_folder_alone(finished, tmp_path):
    path = tmp_path / "run"
    shutil.copytree(finished, path)
    with RunFolder(path, LONGER, resume=True) as folder:
        for resume in (False, True):
            with pytest.raises(UsageError, match=f"run is being written by process {os.getpid()} on .*: wait until it"):
                train.train_and_evaluate(LONGER, path, lines=False, resume=resume)
        folder.log("exchange", step=28)
    assert metrics(path) == [*metrics(finished), {"event": "exchange", "step": 28}]
    with RunFolder(path, LONGER, resume=True):
        assert read_metrics(path, "evaluation") == read_metrics(finished, "evaluation")


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
        derandomize=not faults.SOAK,
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
    placement, _, model, optimizer = setup.prepare(SMALL)
    checkpoints, shapes = Checkpoints(folder, placement, 9), state_shapes(model, optimizer, placement)

    def read():
        """The bytes, or None where they can't be read and that is said in a line."""
        try:
            state = checkpoints.restore(24, shapes)
        except UsageError as error:
            return None if len(str(error).splitlines()) == 1 else str(error)
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(state)]

    return folder / "24", read, read()


def claimed_array(shape):
    """An array of bytes that ends with its header."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


@pytest.mark.parametrize("how", ["compressed", "header"])
def test_an_array_that_claims_to_be_larger_than_its_file_is_not_read(how, newest, monkeypatch):
    folder, read, _ = newest
    file = folder / "state" / "0.npz"
    before = file.read_bytes()
    shape = (4, 2**22) if how == "compressed" else (4, 5 * 10**9)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("workers.npy", claimed_array((4,)) + bytes(4))
        archive.writestr("rows.npy", claimed_array(shape) + bytes(2**24 if how == "compressed" else 0))
    monkeypatch.setattr(np, "load", lambda *_: pytest.fail("it is read"))
    try:
        assert read() is None
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize(
    "changed",
    [
        {"bytes_before": "x"},
        {"bytes_before": 1e308},
        {"bytes_before": None},
        {"seconds": float("inf")},
        {"error": "0.1"},
        {"metrics_length": 2**63},
        {"failed_since": {"x": 4}},
        {"scores": [["a", "b"]]},
        {"shape": [10**9, 10**9], "scores": []},
        {"processes": None},
    ],
)
def test_a_progress_that_no_run_has_made_is_refused(changed):
    progress = {"shape": [1, 2], "processes": 1, "devices": 1, "step": 4, "scores": [[1.0, float("inf")]]}
    assert Progress.from_json(progress | {"bytes_before": -5.0}).shape == (1, 2)
    with pytest.raises(ValueError):  # noqa: PT011 - what it says may be Python's or NumPy's.
        Progress.from_json(progress | changed)


@pytest.fixture(scope="module")
def to_save(finished):
    """The workers of a run, their state, and its progress, at step 24."""
    placement, _, model, optimizer = setup.prepare(SMALL)
    checkpoints = Checkpoints(finished / "checkpoints", placement, 9)
    return placement, checkpoints.restore(24, state_shapes(model, optimizer, placement)), checkpoints.progress(24)


def save(to_save, folder, *steps, keep=2, errors=None):
    placement, state, progress = to_save
    with Checkpoints(folder, placement, keep) as checkpoints:
        for step in steps:
            checkpoints.save(state, dataclasses.replace(progress, step=step), (errors or {}).get(step))
    return checkpoints.steps()


@pytest.mark.parametrize("name", ["8.new", "state", "progress", "0.npz", "metadata"])
def test_a_full_disk_ends_no_run_but_by_its_sentence(name, to_save, tmp_path, monkeypatch):
    """Wherever it is full: what was saved is kept, nothing waits, and with room all goes on."""
    folder = tmp_path / "checkpoints"
    assert save(to_save, folder, 4) == [4]
    with monkeypatch.context() as full:
        faults.fill_disk(full, name)
        with pytest.raises(
            UsageError, match=r"a checkpoint can't be written to .*No space left .* earlier ones are kept\.$"
        ):
            save(to_save, folder, 8)
        assert all(thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread())
    assert save(to_save, folder, 8) == [8, 4]
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]


def test_the_best_of_before_is_kept_by_a_run_that_goes_on(to_save, tmp_path):
    assert save(to_save, tmp_path, 4, 8, 12, keep=1, errors={4: 0.1, 8: 0.3, 12: 0.2}) == [12, 4]
    assert save(to_save, tmp_path, 16, 20, keep=1, errors={16: 0.4}) == [20, 4]


def test_a_process_that_ends_alone_waits_for_no_other(to_save, tmp_path, monkeypatch):
    """The others may be in the midst of a step, and would never answer."""
    checkpoints = Checkpoints(tmp_path, to_save[0], 2)
    monkeypatch.setattr(checkpoint, "process_count", lambda: 2)
    monkeypatch.setattr(checkpoint, "failing_together", lambda: pytest.fail("it waits"))
    with pytest.raises(UsageError, match="the metrics can't be written"), checkpoints:
        raise UsageError("the metrics can't be written.")


def test_a_checkpoint_that_cannot_be_moved_is_one_sentence(to_save, tmp_path):
    with pytest.raises(UsageError, match=r"the checkpoint of step 8 can't be moved to .*unreadable-checkpoint-8 \(No "):
        Checkpoints(tmp_path / "checkpoints", to_save[0], 2).set_aside(8)


def test_checkpoints_that_cannot_be_read_are_one_sentence(to_save, tmp_path, monkeypatch):
    """As those of another user."""

    def forbidden(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)
    with pytest.raises(UsageError, match=r"the checkpoints in .* can't be read \(Permission denied\)\.$"):
        Checkpoints(tmp_path, to_save[0], 2).steps()


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
