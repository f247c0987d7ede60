import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsgd_jax.paper.objectives import bowl, matrix_completion, matrix_completion_problem, quadratic, sinc_rings


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def numeric_gradient(f, x, h=1e-6):
    return np.array([(f(x + h * e) - f(x - h * e)) / (2 * h) for e in np.eye(len(x))])


@pytest.mark.parametrize("objective", [bowl, sinc_rings])
def test_gradients_in_the_plane(objective):
    for x in np.random.default_rng(0).uniform(-10, 10, (5, 2)):
        np.testing.assert_allclose(jax.grad(objective)(x), numeric_gradient(objective, x), atol=1e-7)


@pytest.mark.parametrize(
    ("radius", "level"), [(0.0, 1.0), (1.4303, -0.2172), (2.459, 0.1284), (3.4709, -0.0913), (4.4774, 0.0709)]
)
def test_the_extrema_of_the_rings(radius, level):
    for direction in ([1.0, 0.0], [0.6, -0.8]):
        x = radius * jnp.array(direction)
        np.testing.assert_allclose(sinc_rings(x), level, atol=5e-5)
        np.testing.assert_allclose(jax.grad(sinc_rings)(x), [0, 0], atol=1e-3)


def test_matrix_completion_vanishes_at_a_solution_whatever_its_rotation():
    target, starts = matrix_completion_problem(jax.random.key(0), 20, 3, workers=4)
    assert np.linalg.matrix_rank(target) == 3
    assert starts.shape == (4, 20, 3)
    values, vectors = np.linalg.eigh(target)
    solution = vectors[:, -3:] * np.sqrt(values[-3:])
    rotated = solution @ np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]
    np.testing.assert_allclose(matrix_completion(rotated, target), 0, atol=1e-20)
    gradient = jax.grad(matrix_completion)(starts[0], target)
    np.testing.assert_allclose(gradient, (starts[0] @ starts[0].T - target) @ starts[0], rtol=1e-10)


def test_matrix_completion_starts_do_not_depend_on_the_number_of_workers():
    few, many = (matrix_completion_problem(jax.random.key(1), 5, 2, workers)[1] for workers in (2, 4))
    np.testing.assert_array_equal(few, many[:2])


def test_a_quadratic_has_the_constants_it_states():
    problem = quadratic(jax.random.key(0), 6, strong_convexity=0.5, smoothness=8.0, noise=0.3)
    eigenvalues = np.linalg.eigvalsh(problem.hessian)
    np.testing.assert_allclose(eigenvalues[[0, -1]], [0.5, 8.0])
    assert problem.value(problem.minimizer) == 0
    x = problem.minimizer + 1.0
    np.testing.assert_allclose(jax.grad(problem.value)(x), problem.hessian @ np.ones(6), rtol=1e-10)
    draws = jax.vmap(lambda key: problem.gradient(x, key))(jax.random.split(jax.random.key(1), 20_000))
    np.testing.assert_allclose(draws.mean(0), problem.hessian @ np.ones(6), atol=0.01)
    np.testing.assert_allclose(draws.var(0).sum(), 0.3**2, rtol=0.03)


@pytest.mark.parametrize("wrong", [{"strong_convexity": 0.0}, {"smoothness": 0.5}, {"noise": -1.0}])
def test_a_quadratic_out_of_range(wrong):
    with pytest.raises(ValueError, match="a quadratic needs dimension >= 2"):
        quadratic(jax.random.key(0), 4, **wrong)
