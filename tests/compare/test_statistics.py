"""Intervals and corrected p-values, held to other ways of computing them."""

import itertools

import numpy as np
import pytest
from scipy import stats

from lsgd_jax.compare.statistics import differences_to_first, holm, over_seeds


def closed(p_values):
    """Holm's p-values as the closed test with Bonferroni's: the largest of all sets of hypotheses with this one."""
    numbers = range(len(p_values))
    sets = [each for size in range(1, len(p_values) + 1) for each in itertools.combinations(numbers, size)]
    of_sets = {each: min(1.0, len(each) * min(p_values[i] for i in each)) for each in sets}
    return [max(p for each, p in of_sets.items() if i in each) for i in numbers]


@pytest.mark.parametrize("seed", range(5))
def test_holms_p_values_are_those_of_the_closed_test(seed):
    p_values = np.random.default_rng(seed).uniform(0, 0.3, 5).tolist()
    p_values[1] = p_values[0]
    np.testing.assert_allclose(holm(p_values), closed(p_values), rtol=1e-12)


def test_what_was_not_tested_counts_as_a_comparison():
    assert holm([0.01, float("nan")]) == [0.02, pytest.approx(float("nan"), nan_ok=True)]


def test_differences_are_paired_and_their_intervals_say_how_many_there_are():
    rng = np.random.default_rng(1)
    first = rng.normal(size=8)
    finals = {str(i): first + rng.normal(i / 4, 0.5, size=8) for i in range(5)}
    found = differences_to_first({"first": first, **finals})
    alone = {name: stats.ttest_rel(values, first) for name, values in finals.items()}
    np.testing.assert_allclose(
        [found[name]["p_holm"] for name in finals], closed([test.pvalue for test in alone.values()]), rtol=1e-9
    )
    for name, test in alone.items():
        low, high = test.confidence_interval(1 - 0.05 / 5)
        of = found[name]
        np.testing.assert_allclose(of["mean"] - of["half_width"], low)
        np.testing.assert_allclose(of["mean"] + of["half_width"], high)
        assert of["p_holm"] < 0.05 or low < 0 < high
    assert {of["p_holm"] < 0.05 for name, of in found.items() if name in finals} == {True, False}
    assert (found["first"]["mean"], found["first"]["p_holm"]) == (0, None)


def test_a_failed_seed_leaves_no_mean_and_is_the_worst_in_the_median():
    of = over_seeds(np.array([0.2, np.nan, 0.1]))
    assert of == {"mean": None, "half_width": None, "values": [0.2, None, 0.1], "median": 0.2}
    found = differences_to_first({"a": np.array([0.1, 0.2]), "b": np.array([0.1, np.nan]), "c": np.array([0.3, 0.5])})
    assert found["b"]["values"] == [0.0, None]
    assert (found["b"]["half_width"], found["b"]["p_holm"]) == (None, None)
    assert found["c"]["p_holm"] == pytest.approx(2 * found["c"]["p_value"])


def test_one_seed_has_no_interval():
    found = differences_to_first({"a": np.array([0.1]), "b": np.array([0.2])})
    assert (found["b"]["mean"], found["b"]["half_width"], found["b"]["p_holm"]) == (0.1, None, None)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("scale", [0.001, 1, 100])
def test_seeds_that_agree_by_chance_are_not_taken_for_certain(scale, dtype):
    same = {"a": [0.047, 0.041], "b": [0.061, 0.055], "c": [0.047, 0.041], "d": [0.061, 0.061]}
    same = {method: scale * np.array(values, dtype) for method, values in same.items()}
    found = differences_to_first(same)
    for method in ("a", "b", "c"):
        of = found[method]
        assert (of["half_width"], of["p_value"], of["p_holm"]) == (None, None, None)
    assert found["b"]["mean"] == pytest.approx(0.014 * scale, rel=1e-4)
    assert found["d"]["p_holm"] == pytest.approx(3 * found["d"]["p_value"])
    assert over_seeds(same["d"])["half_width"] is None
