"""The choice of the evaluated model by a tuned comparison, from runs that nobody has trained."""

import json

import pytest

from lsgd_jax import compare
from lsgd_jax.compare import comparison
from lsgd_jax.compare.table import notes, rows_of
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.methods import METHODS
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.progress import ComparisonProgress
from lsgd_jax.tuning import grid
from tests.compare.runs import written_untrained

BASE = PRESETS["digits"].replace(groups=1, workers=2, steps=10, eval_every=10)
SEEDS = comparison.TUNING_SEEDS
OF_TAIL = {
    "lsgd": (-0.15, 0.05),
    "local_sgd": (-0.05, 0.15),
    "mgrawa": (0.0, 0.0),
    "data_parallel": (float("nan"), -0.1),
}
"""By how much the tail mean is worse than the method's own model, with even and with odd seeds."""


def error(config):
    """The final error of a run, lowest at the learning rate of the preset."""
    of_tail = OF_TAIL[config.method][config.seed % 2] if config.evaluated_model == "tail_mean" else 0.0
    found = 0.2 + abs(config.learning_rate - BASE.learning_rate) + of_tail
    return found if found == found else None


@pytest.fixture
def written(monkeypatch):
    """The names and configurations of the runs that are written in place of training them."""
    return written_untrained(monkeypatch, error)


def tuned(out, methods, seeds=(0, 1), config=BASE, **options):
    return compare.compare(config, list(methods), list(seeds), out, tune=True, target=0.5, options=options)


def model_of(summary):
    return {method: of["hyper-parameters"].get("evaluated_model") for method, of in summary["methods"].items()}


def test_every_method_has_a_grid_of_the_same_size():
    assert {len(grid(BASE.replace(method=method))) for method in METHODS} == {9}


def test_the_better_one_on_held_out_data_is_the_evaluated_model(tmp_path, written, monkeypatch):
    """In the mean of both tuning seeds; in a tie, and where the other is not finite, it is the method's own."""
    expected = []
    monkeypatch.setattr(ComparisonProgress, "expect", lambda self, *sizes: expected.append(sizes))
    summary = tuned(tmp_path, [*OF_TAIL, "independent"], corrupt_workers=1)
    assert model_of(summary) == dict.fromkeys([*OF_TAIL, "independent"]) | {"lsgd": "tail_mean"}
    tried = {method: of["tried"] for method, of in summary["methods"].items()}
    assert {method: len(of) for method, of in tried.items()} == dict.fromkeys(OF_TAIL, 10) | {"independent": 9}
    # The fourth is the first one with the learning rate of the preset.
    best, tail = tried["lsgd"][3], tried["lsgd"][9]
    assert tail["values"] == best["values"] | {"evaluated_model": "tail_mean"}
    assert tail["validation_error"] == pytest.approx(best["validation_error"] - 0.05) == pytest.approx(0.15)
    assert tried["data_parallel"][9]["validation_error"] is None

    configs = dict(written)
    for i, trial in enumerate(tried["lsgd"][:9]):
        config = configs[f"lsgd/tune-{i}-seed-1000001"]
        assert trial["values"] == {"learning_rate": config.learning_rate, "pull": config.pull}
    for seed in SEEDS:
        own = configs[f"lsgd/tune-3-seed-{seed}"]
        assert configs[f"lsgd/tune-3-tail_mean-seed-{seed}"] == own.replace(evaluated_model="tail_mean")
        assert (own.validation, own.seed) == (0.2, seed)
    assert configs["lsgd/seed-1"] == own.replace(evaluated_model="tail_mean", validation=0.0, seed=1)
    assert configs["local_sgd/seed-1"].evaluated_model is None
    assert {config.corrupt_workers for config in configs.values()} == {1}
    # What the progress bar counts on is what there was.
    assert set(expected) == {(len(written), sum(config.steps for _, config in written))}

    assert notes(summary).endswith(
        "Tuning tried at most 10 cells per method with 2 other seeds on held-out training data. It chose the tail mean"
        " as the evaluated model of lsgd."
    )
    told = [row[1] for row in rows_of(summary)[1:3]]
    assert told[0] == "learning_rate 0.1, period 4, pull 0.1, window 10, evaluated_model tail_mean, tail_share 0.1"
    assert told[1] == "learning_rate 0.1, period 4"
    assert json.loads((tmp_path / "comparison.json").read_text()) == summary


def test_a_given_evaluated_model_is_that_of_all_and_no_other_is_tried(tmp_path, written):
    summary = tuned(tmp_path, ("lsgd", "local_sgd"), seeds=(0,), evaluated_model="tail_mean", tail_share=0.5)
    assert model_of(summary) == {"lsgd": "tail_mean", "local_sgd": "tail_mean"}
    assert {len(of["tried"]) for of in summary["methods"].values()} == {9}
    assert {(config.evaluated_model, config.tail_share) for _, config in written} == {("tail_mean", 0.5)}
    assert "It chose" not in notes(summary)
    with pytest.raises(UsageError, match=r"^independent: evaluated_model must be leader for independent, got mean"):
        tuned(tmp_path / "other", ("lsgd", "independent"), evaluated_model="mean")


def test_a_comparison_of_before_there_was_a_choice_is_completed(tmp_path, written, monkeypatch, capsys):
    methods, one = ("lsgd", "local_sgd"), {"config": BASE.replace(tune_learning_rates=(0.1,))}
    with monkeypatch.context() as earlier:
        earlier.setattr(comparison, "other_models", lambda config: [])
        assert model_of(tuned(tmp_path, methods, **one)) == dict.fromkeys(methods)
    written.clear()
    assert model_of(tuned(tmp_path, methods, **one)) == dict.fromkeys(methods) | {"lsgd": "tail_mean"}
    of_tails = [f"{method}/tune-0-tail_mean-seed-{seed}" for method in methods for seed in SEEDS]
    assert sorted(name for name, _ in written) == sorted([*of_tails, "lsgd/seed-0", "lsgd/seed-1"])
    assert Config.load(tmp_path / "lsgd" / "seed-0.old").evaluated_model is None
    assert (
        "lsgd/seed-0 is trained again; the old run is now seed-0.old: tuning now chooses another evaluated model."
        in capsys.readouterr().out
    )
    written.clear()
    tuned(tmp_path, methods, **one)
    assert written == []

    path = tmp_path / "lsgd" / "seed-0" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"learning_rate": 0.7}))
    with pytest.raises(UsageError, match="seed-0 holds a run with another configuration"):
        tuned(tmp_path, methods, **one)
