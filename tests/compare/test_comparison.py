"""Comparisons of a few steps on the smoke preset."""

import contextlib
import csv
import dataclasses
import json
import os
import shutil

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lsgd_jax import compare, files
from lsgd_jax.compare import cells, results
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.figures import comparison
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.tuning import check_grid, grid
from tests import programs
from tests.compare.runs import write_run, written_untrained
from tests.reliability import faults

pytestmark = pytest.mark.usefixtures("png_only")

FAST = dataclasses.replace(PRESETS["digits"], groups=1, workers=2, steps=12, eval_every=3)


METHODS_COMPARED = ("lsgd", "data_parallel", "independent")


def run(out, methods=("lsgd", "independent"), seeds=(0, 1), *, config=FAST, tune=False):
    return compare.compare(config, list(methods), list(seeds), out, tune=tune, target=0.5)


@pytest.fixture
def counted(monkeypatch):
    """The folders that are really trained into."""
    trained, train = [], cells.train_and_evaluate

    def counting(config, path, **options):
        trained.append(path)
        return train(config, path, **options)

    monkeypatch.setattr(cells, "train_and_evaluate", counting)
    return trained


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a comparison of three methods, and its summary."""
    path = tmp_path_factory.mktemp("compared") / "out"
    with programs.shared():
        return path, run(path, METHODS_COMPARED)


@pytest.mark.usefixtures("shared_programs")
def test_the_second_time_nothing_is_trained(compared, tmp_path, counted, capsys):
    path = tmp_path / "out"
    shutil.copytree(compared[0], path)
    assert run(path, METHODS_COMPARED) == compared[1]
    # Those with equal bytes are counted from the start.
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [f"[{i}/8]" for i in range(1, 9)]
    assert len(counted) == 0
    run(path, methods=("lsgd", "local_sgd"))
    assert len(counted) == 2


@pytest.mark.usefixtures("shared_programs")
def test_what_was_stopped_midway_is_trained_again_and_the_rest_is_kept(tmp_path, monkeypatch):
    train = cells.train_and_evaluate

    def stopped(config, path, **options):
        train(config, path, **options)
        if config.seed == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(cells, "train_and_evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, methods=("lsgd",))
    kept = (tmp_path / "lsgd" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns
    assert not (tmp_path / "lsgd" / "seed-1").exists()
    monkeypatch.setattr(cells, "train_and_evaluate", train)
    run(tmp_path, methods=("lsgd",))
    assert (tmp_path / "lsgd" / "seed-0" / "metrics.jsonl").stat().st_mtime_ns == kept
    assert sorted(path.name for path in (tmp_path / "lsgd").iterdir()) == ["seed-0", "seed-1"]


@pytest.mark.usefixtures("shared_programs")
def test_a_cell_that_is_not_whole_is_trained_again(tmp_path, monkeypatch):
    """As a crash of the machine can leave it. Here what is trained is copied."""
    out, one = tmp_path / "out", {"methods": ("independent",), "seeds": (0,)}
    summary = run(out, **one)
    cell, good = out / "independent" / "seed-0", tmp_path / "good"
    shutil.copytree(cell, good)
    monkeypatch.setattr(cells, "train_and_evaluate", lambda config, path, **_: shutil.copytree(good, path))
    metrics = (good / "metrics.jsonl").read_bytes()
    for name, content in [
        ("metrics.jsonl", b""),
        ("metrics.jsonl", metrics[: len(metrics) // 2]),
        ("metrics.jsonl", b'{"event": "evaluation", "step": 12}\n'),
        ("metrics.jsonl", metrics.replace(b'"center_error": ', b'"center_error": 1e400, "other": ')),
        ("metrics.jsonl", b"[" * 100_000 + b"\n"),
        ("config.json", b""),
    ]:
        (cell / name).write_bytes(content)
        assert run(out, **one) == summary
        assert (cell / "metrics.jsonl").read_bytes() == metrics
        assert (cell.with_name("seed-0.old") / name).read_bytes() == content


@pytest.mark.usefixtures("shared_programs")
def test_a_cell_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, sync_tree = [], files.sync_tree

    def noted(folder):
        synced.append((folder.name, folder.with_suffix("").exists()))
        sync_tree(folder)

    monkeypatch.setattr(files, "sync_tree", noted)
    run(tmp_path, methods=("independent",), seeds=(0,))
    assert synced == [("seed-0.unfinished", False)]


def test_a_comparison_has_its_folder_alone(tmp_path, counted):
    with (
        files.lock(tmp_path, "name another"),
        pytest.raises(UsageError, match=f"is being written by process {os.getpid()} on .*, or name another out folder"),
    ):
        run(tmp_path)
    assert counted == []


def test_a_disk_that_is_full_at_the_first_file_leaves_a_folder_to_begin_in(tmp_path, monkeypatch):
    with monkeypatch.context() as full:
        faults.fill_disk(full, "comparison-config.json")
        with (
            pytest.raises(UsageError, match=r"comparison-config.json can't be written \(No space left on device\)"),
            cells.claimed(tmp_path, FAST, {}, tune=False),
        ):
            pass
    with cells.claimed(tmp_path, FAST, {}, tune=False):
        assert not files.is_empty(tmp_path)


def test_the_summary_is_what_the_runs_say(compared):
    path, summary = compared
    for method, of in summary["methods"].items():
        finals = [read_metrics(path / method / f"seed-{s}", "evaluation")[-1]["center_error"] for s in (0, 1)]
        assert of["final_error"]["values"] == finals
        np.testing.assert_allclose(of["final_error"]["mean"], np.mean(finals))
        difference = np.array(finals) - summary["methods"]["lsgd"]["final_error"]["values"]
        assert of["difference_to_first"]["values"] == difference.tolist()
        # The t-interval of two values is 12.706 standard errors.
        np.testing.assert_allclose(of["final_error"]["half_width"], 12.7062 * abs(finals[0] - finals[1]) / 2, rtol=1e-4)
    # What sends more, every step, is trained for as many steps as send the same, and its schedule ends there.
    assert summary["methods"]["lsgd"]["final_error_at_equal_bytes"] == summary["methods"]["lsgd"]["final_error"]
    whole, matched = (
        read_metrics(path / folder, "evaluation")[-1]
        for folder in ("lsgd/seed-1", "data_parallel/matched-bytes-seed-1")
    )
    assert matched["step"] == 3
    assert 0.99 * whole["bytes_sent"] < matched["bytes_sent"] <= whole["bytes_sent"]  # Elections send scalars, too.
    at_equal = summary["methods"]["data_parallel"]["final_error_at_equal_bytes"]["values"]
    assert at_equal[1] == matched["center_error"]

    with (path / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["lsgd", "data_parallel", "independent"]
    assert (path / "comparison.md").read_text().count("\n") == 7
    assert json.loads((path / "comparison.json").read_text()) == summary
    assert comparison.draw(path, ["lsgd", "independent"], [0, 1]).read_bytes().startswith(b"\x89PNG")


def test_an_option_is_for_all_methods_that_have_it_and_stands_in_the_table(tmp_path, monkeypatch):
    written_untrained(monkeypatch, lambda config: 0.5)
    methods, options = ("lsgd", "easgd", "local_sgd"), {"pull": 0.2, "wire": "bfloat16"}
    compare.compare(FAST, list(methods), [0], str(tmp_path), tune=False, target=0.5, options=options)
    with (tmp_path / "comparison.csv").open() as file:
        told = {row["method"]: row["hyperparameters"] for row in csv.DictReader(file)}
    assert told == {
        "lsgd": "learning_rate 0.1, period 4, pull 0.2, window 10, wire bfloat16",
        "easgd": "learning_rate 0.1, period 4, pull 0.2, center_pull 0.4",
        "local_sgd": "learning_rate 0.1, period 4, wire bfloat16",
    }
    assert {method: Config.load(tmp_path / method / "seed-0").pull for method in methods} == {
        "lsgd": 0.2,
        "easgd": 0.2,
        "local_sgd": None,
    }


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ("lsgd", {"period": 4, "pull": 0.1, "global_pull": 0.1, "global_period": 16, "window": 10}),
        ("easgd", {"period": 4, "pull": 0.9**8 / 8, "center_pull": 0.9**8}),
        ("diloco", {"period": 4, "outer_learning_rate": 0.7, "outer_momentum": 0.9}),
        ("mgrawa", {"period": 4, "pull": 0.5, "prox": 0.01}),
        ("data_parallel", {}),
        ("independent", {"window": 10}),
    ],
)
def test_hyperparameters_are_those_that_a_method_trains_with(method, told):
    assert compare.hyperparameters(PRESETS["digits"].replace(method=method)) == {"learning_rate": 0.1} | told


def test_what_is_compared_is_checked_before_anything_is_written(tmp_path):
    tuned = dataclasses.replace(FAST, tune_learning_rates=(0.1,), tune_periods=(4, 8))
    for message, arguments in {
        "each method can be named once": {"methods": ("lsgd", "lsgd")},
        "there is no method 'adam'": {"methods": ("adam",)},
        "asynchronous is for train": {"config": dataclasses.replace(FAST, asynchronous="posted"), "methods": ("lsgd",)},
    }.items():
        with pytest.raises(UsageError, match=message):
            run(tmp_path / "a", **arguments)
    for name, value in {"learning_rate": 0.2, "period": 8}.items():
        with pytest.raises(UsageError, match=f"tuning chooses the {name} of lsgd itself"):
            compare.compare(tuned, ["lsgd"], [0], tmp_path / "a", tune=True, target=0.5, options={name: value})
    with pytest.raises(UsageError, match="tuning chooses the pull of lsgd itself"):
        compare.compare(FAST, ["lsgd"], [0], tmp_path / "a", tune=True, target=0.5, options={"pull": 0.77})
    with pytest.raises(UsageError, match="seeds must be others than those of tuning, got 1000001"):
        run(tmp_path / "a", seeds=(0, 1_000_001), tune=True)
    with pytest.raises(UsageError, match="NUL"):
        run(str(tmp_path / "a\0b"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_tuned_with_every_method(name):
    for method in METHODS:
        config = PRESETS[name].replace(method=method)
        check_grid(config, {})
        assert all(config.replace(**values) for values in grid(config))


def test_all_methods_start_at_the_same_point_and_see_the_same_data(tmp_path):
    """Before the first exchange all that exchange every period have done the same."""
    config = dataclasses.replace(FAST, period=6, steps=6)
    run(tmp_path, methods=("easgd", "local_sgd", "independent"), seeds=(0,), config=config)
    losses = [
        read_metrics(tmp_path / method / "seed-0", "evaluation")[0]["train_losses"]
        for method in ("easgd", "local_sgd", "independent")
    ]
    np.testing.assert_allclose(losses[1:], losses[:1] * 2, rtol=1e-5)


def test_tuning_never_sees_the_test_data_and_trains_the_same_for_either_evaluated_model(tmp_path):
    config = FAST.replace(tune_learning_rates=(0.05, 0.1), tune_periods=(1,))
    summary = run(tmp_path, methods=("lsgd",), seeds=(0,), config=config, tune=True)
    *tried, tail = summary["methods"]["lsgd"]["tried"]
    for i, trial in enumerate(tried):
        config = Config.load(tmp_path / "lsgd" / f"tune-{i}-seed-1000000")
        assert config.validation == 0.2
        assert {"learning_rate": config.learning_rate, "period": config.period} == trial["values"]
    best = min([*tried, tail], key=lambda trial: trial["validation_error"])["values"]
    chosen = Config.load(tmp_path / "lsgd" / "seed-0")
    assert (chosen.validation, chosen.learning_rate) == (0, best["learning_rate"])
    assert chosen.evaluated_model == best.get("evaluated_model")
    [tail] = (tmp_path / "lsgd").glob("tune-*-tail_mean-seed-1000000")
    cells_of_both = (tail.with_name(tail.name.replace("-tail_mean", "")), tail)
    own, of_tail = (read_metrics(cell, "evaluation") for cell in cells_of_both)
    assert [entry["train_losses"] for entry in own] == [entry["train_losses"] for entry in of_tail]
    # The tail is of the last two exchanges.
    assert [a["center_loss"] == b["center_loss"] for a, b in zip(own, of_tail, strict=True)] == [True] * 3 + [False]


def test_the_median_step_to_the_target_counts_seeds_that_never_get_there(tmp_path):
    errors = enumerate(([0.4, 0.1], [0.9, 0.1], [0.9, 0.9]))
    runs = [write_run(tmp_path / str(seed), FAST, values) for seed, values in errors]
    summary = results.summary_of(FAST, runs, runs, 0.5)
    assert (summary["steps_to_target"], summary["megabytes_to_target"], summary["seeds_at_target"]) == (20, 2, 2)
    assert results.summary_of(FAST, runs, runs, 0.2)["steps_to_target"] == 20
    assert results.summary_of(FAST, runs[2:], runs, 0.5)["steps_to_target"] is None


def test_what_does_not_fit_is_said_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="lower one of them"):
        run(tmp_path / "a", config=dataclasses.replace(FAST, batch_size=5000))
    with pytest.raises(UsageError, match="data_parallel: learning_rates must be equal"):
        run(tmp_path / "a", ("lsgd", "data_parallel"), config=dataclasses.replace(FAST, learning_rates="linear"))
    assert not (tmp_path / "a").exists()


def test_rates_are_divided_among_workers_whose_steps_add_up():
    config = dataclasses.replace(FAST, workers=4, learning_rate=0.1)
    alone, summed = (
        [values["learning_rate"] for values in grid(dataclasses.replace(config, method=method))]
        for method in ("local_sgd", "downpour")
    )
    np.testing.assert_allclose(np.array(alone) / 4, summed)


@pytest.mark.usefixtures("shared_programs")
def test_a_folder_with_another_comparison_or_other_files_is_left_alone(tmp_path):
    run(tmp_path / "a", methods=("independent",), seeds=(0,))
    with pytest.raises(UsageError, match="another configuration"):
        run(tmp_path / "a", config=dataclasses.replace(FAST, steps=16))
    with pytest.raises(UsageError, match="another configuration"):
        run(tmp_path / "a", methods=("independent",), seeds=(0,), config=dataclasses.replace(FAST, learning_rate=0.2))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine").touch()
    with pytest.raises(UsageError, match="not empty and holds no comparison"):
        run(tmp_path / "b")


def test_options_are_tuned_together():
    tried = grid(FAST.replace(method="diloco"))
    assert {(of["outer_learning_rate"], of["outer_momentum"]) for of in tried} == {(1, 0.3), (1, 0.5), (1, 0.9)}
    pulls = [FAST.replace(method="easgd", **values).options for values in grid(FAST.replace(method="easgd"))]
    strengths = {(round(of["pull"], 3), round(of["center_pull"], 3)) for of in pulls}
    assert strengths == {(0.215, 0.43), (0.45, 0.9), (0.5, 0.9)}


def test_programs_are_compiled_once_for_all_seeds(tmp_path, monkeypatch):
    """And kept no longer than the comparison; the bits are those of a run that compiles for itself."""
    cells.train_and_evaluate(FAST.replace(seed=1, checkpoint_every=0), tmp_path / "alone", lines=False)
    with monkeypatch.context() as patched:
        patched.setattr(cells.tempfile, "TemporaryDirectory", lambda prefix: contextlib.nullcontext(tmp_path / prefix))
        before = jax.config.jax_compilation_cache_dir
        jax.config.update("jax_compilation_cache_dir", None)
        try:
            kept = []
            for seeds in ((0,), (0, 1)):
                run(tmp_path / "out", methods=("lsgd",), seeds=seeds)
                kept.append(sorted(path.name for path in (tmp_path / "compiled-").glob("*-cache")))
            assert jax.config.jax_compilation_cache_dir is None
        finally:
            jax.config.update("jax_compilation_cache_dir", before)
            compilation_cache.reset_cache()
    assert kept[0]
    assert kept[0] == kept[1]
    for name in ("center_error", "train_losses"):
        values = [
            [entry[name] for entry in read_metrics(path, "evaluation")]
            for path in (tmp_path / "alone", tmp_path / "out" / "lsgd" / "seed-1")
        ]
        assert values[0] == values[1]
