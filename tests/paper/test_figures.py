import csv
import json

import jax
import jax.numpy as jnp
import numpy as np

from lsgd_jax.paper import analytic, matrix_completion, nonconvex
from lsgd_jax.paper.descent import STARTS, descend, methods
from lsgd_jax.paper.objectives import bowl, sinc_rings
from tests import oracle


def test_leader_gradient_descent_is_eq_2_of_the_oracle():
    with jax.enable_x64(True):
        got = descend(methods(0.02, 0.1)["LGD"], bowl, jnp.array(STARTS), 20)
    expected = oracle.lsgd(
        np.array([STARTS]),
        lambda x, *_: 2 * x,
        lambda x, *_: np.sum(x**2),
        steps=20,
        eta=0.02,
        pull=lambda *_: 0.1,
        period=1,
        pull_at_x=True,
    )
    np.testing.assert_allclose(got.x[:, 1:].swapaxes(0, 1), expected.x[:, 0], rtol=1e-12)


def test_nonconvex_ends_where_the_paper_says():
    final = {
        name: np.asarray(descend(method, sinc_rings, jnp.array(STARTS), 100).values[:, -1])
        for name, method in methods(0.1, 0.1).items()
    }
    assert (final["LGD"] < -0.217).all()
    assert ((final["EAGD"] > -0.10) & (final["EAGD"] < -0.08)).all()
    assert (final["independent"] > -0.08).all()


def test_random_starts_reach_the_global_ring_four_times_as_often_by_the_leader():
    reached = nonconvex.random_starts(20)
    assert reached["LGD"] >= 4 * reached["EAGD"] > 0


def test_matrix_completion_best_worker_descends_and_elastic_averaging_stalls():
    """At a twentieth of the dimension, with the step size scaled to it."""
    best = {name: values.min(0) for name, values in matrix_completion.solve(50, eta=5e-4 * 20, ranks=(1,))[1].items()}
    assert best["LGD"][-1] < 1e-6
    assert best["EAGD"][-1] > 1e-4


def test_a_figure_writes_its_picture_curves_and_numbers(tmp_path):
    found = analytic()["trajectories"](tmp_path)
    assert "LGD" in found
    assert (tmp_path / "trajectories.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((tmp_path / "trajectories.json").read_text())
    with (tmp_path / "trajectories.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 4 * (summary["iterations"] + 1)
    assert {row["method"] for row in rows} == {"EAGD", "LGD", "independent"}
