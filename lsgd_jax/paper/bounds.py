r"""The paper's bounds as functions, with the conditions under which they hold.

The objective f is m-strongly convex with an M-Lipschitz gradient and minimum f*; :math:`\kappa = M / m`. Gradients are
unbiased with variance :math:`\sigma^2`, and z is the leader. The pull is that of the objective (eq. 1): a step of size
eta pulls by eta lambda,

.. math:: x_+ = x - \eta (g(x) + \lambda (x - z)).

`lsgd figure theory` measures all of them.

Teng, Gao, Chalus, Choromanska, Goldfarb, Weller, "Leader Stochastic Gradient Descent for Distributed Training of Deep
Learning Models: Extension", https://arxiv.org/abs/1905.10395.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

Objective = Callable[[Float[Array, " d"]], Float[Array, ""]]


def leader_objective(
    f: Objective, lam: float, *, through_leader: bool = False
) -> Callable[[Float[Array, "workers d"]], Float[Array, ""]]:
    r"""Objective of LSGD with one group (eq. 1), :math:`\sum_i f(x^i) + \frac\lambda2 \|x^i - \tilde x\|^2`.

    Where the best worker is unique, it is :math:`\tilde x` in a neighborhood, and its own pull is zero. With the
    leader held fixed, as in the update (eq. 2), the leader's gradient is that of f alone, so
    :math:`\nabla f(\tilde x) = 0` at a stationary point (the paper's theorem on stationary points). The derivative
    through :math:`\tilde x` lacks this property: the followers' pulls act back on the leader.

    Args:
      f: objective of one worker.
      lam: pull coefficient lambda.
      through_leader: whether to differentiate through the leader as well.

    Returns:
      A function of all workers' parameters, worker axis first.

    Example:
      >>> workers = jnp.array([[1.0], [3.0]])
      >>> jax.grad(leader_objective(lambda x: x @ x, lam=0.5))(workers).tolist()
      [[2.0], [7.0]]
      >>> jax.grad(leader_objective(lambda x: x @ x, lam=0.5, through_leader=True))(workers).tolist()
      [[1.0], [7.0]]
    """

    def objective(x: Float[Array, "workers d"]) -> Float[Array, ""]:
        values = jax.vmap(f)(x)
        leader = x[jnp.argmin(values)]
        if not through_leader:
            leader = jax.lax.stop_gradient(leader)
        return jnp.sum(values) + lam / 2 * jnp.sum((x - leader[None]) ** 2)

    return objective


def elastic_objective(f: Objective, lam: float) -> Callable[[Float[Array, "workers d"]], Float[Array, ""]]:
    r"""Objective of elastic averaging, :math:`\sum_i f(x^i) + \frac\lambda2 \|x^i - c\|^2`, at the optimal center c.

    The optimal center is the workers' mean, so this function and the objective of workers and center have the same
    stationary points. There, no worker's gradient has to vanish: `elastic_counterexample` shows it for
    :math:`f(x) = (x^2 - 1)^2` and two workers.

    Args:
      f: objective of one worker.
      lam: pull coefficient lambda.

    Returns:
      A function of all workers' parameters, worker axis first.

    Example:
      >>> jax.grad(elastic_objective(lambda x: x @ x, lam=0.5))(jnp.array([[1.0], [3.0]])).tolist()
      [[1.5], [6.5]]
    """

    def objective(x: Float[Array, "workers d"]) -> Float[Array, ""]:
        return jnp.sum(jax.vmap(f)(x)) + lam / 2 * jnp.sum((x - x.mean(0, keepdims=True)) ** 2)

    return objective


def elastic_counterexample(lam: float) -> float:
    r"""Position of two workers at which elastic averaging is stationary although no gradient vanishes.

    For :math:`f(x) = (x^2 - 1)^2`, two workers at :math:`\pm a` and the center 0 are stationary if
    :math:`4 a (a^2 - 1) + \lambda a = 0`, that is :math:`a^2 = 1 - \lambda / 4`; there
    :math:`f'(\pm a) = \mp \lambda a`. The point is a minimum of the objective for lambda < 8/3.

    Args:
      lam: pull coefficient lambda, in (0, 4).

    Returns:
      The position a.

    Raises:
      ValueError: if lambda is out of range.

    Example:
      >>> round(elastic_counterexample(1.0), 4)
      0.866
    """
    if not 0 < lam < 4:
        raise ValueError(f"lam must lie in (0, 4), got {lam}.")
    return (1 - lam / 4) ** 0.5


def bound_applies(
    eta: ArrayLike, lam: ArrayLike, *, strong_convexity: float, smoothness: float
) -> Bool[np.ndarray, "..."]:
    r"""Return whether the bounds apply to a step: :math:`\eta \le 1/(2M)` and :math:`\eta \lambda \le 1/(2\kappa)`.

    With :math:`\|a + b\|^2 \le 2 \|a\|^2 + 2 \|b\|^2`, M-smoothness gives

    .. math:: E f(x_+) \le f(x) - \eta (1 - \eta M) \|\nabla f(x)\|^2 - \eta \lambda \nabla f(x)^T (x - z)
              + \eta^2 M \lambda^2 \|x - z\|^2 + \tfrac12 \eta^2 M \sigma^2 .

    Strong convexity gives :math:`\nabla f(x)^T (x - z) \ge f(x) - f(z) + \frac m2 \|x - z\|^2` and
    :math:`\|\nabla f(x)\|^2 \ge 2 m (f(x) - f^*)`. The first condition leaves at least half of the gradient's term,
    which makes `one_step_bound`'s :math:`m \eta`; the second lets :math:`\eta \lambda \frac m2 \|x - z\|^2` outweigh
    :math:`\eta^2 M \lambda^2 \|x - z\|^2`.

    Args:
      eta: step size, >= 0.
      lam: pull coefficient lambda, >= 0.
      strong_convexity: strong-convexity constant m.
      smoothness: Lipschitz constant M of the gradient.

    Raises:
      ValueError: unless 0 < m <= M.

    Example:
      >>> bool(bound_applies(0.05, 1.0, strong_convexity=1.0, smoothness=10.0))
      True
    """
    _check(strong_convexity, smoothness)
    eta, lam = np.asarray(eta), np.asarray(lam)
    rounding = 1 + 1e-12  # The conditions include equality.
    return (2 * smoothness * eta <= rounding) & (2 * smoothness / strong_convexity * eta * lam <= rounding)


def one_step_bound(
    gap: ArrayLike,
    leader_gap: ArrayLike,
    eta: ArrayLike,
    lam: ArrayLike,
    *,
    strong_convexity: float,
    smoothness: float,
    noise: float,
) -> Float[np.ndarray, "..."]:
    r"""Upper bound on the expected gap after one step (the paper's lemma on one step), where `bound_applies`.

    .. math:: E f(x_+) - f^* \le (1 - m \eta) (f(x) - f^*) - \eta \lambda (f(x) - f(z)) + \tfrac12 \eta^2 M \sigma^2

    Args:
      gap: worker's gap f(x) - f*.
      leader_gap: leader's gap f(z) - f*.
      eta: step size.
      lam: pull coefficient lambda.
      strong_convexity: strong-convexity constant m.
      smoothness: Lipschitz constant M of the gradient.
      noise: standard deviation sigma of the gradient noise.

    Raises:
      ValueError: unless 0 < m <= M and the noise is nonnegative.

    Example:
      >>> constants = {"strong_convexity": 1.0, "smoothness": 10.0, "noise": 1.0}
      >>> print(f"{one_step_bound(2.0, 1.0, eta=0.05, lam=1.0, **constants):.4f}")
      1.8625
    """
    _check(strong_convexity, smoothness, noise=noise)
    gap, leader_gap, eta, lam = (np.asarray(each) for each in (gap, leader_gap, eta, lam))
    return (1 - strong_convexity * eta) * gap - eta * lam * (gap - leader_gap) + eta**2 * smoothness / 2 * noise**2


def decreasing_step(
    k: ArrayLike, *, strong_convexity: float, smoothness: float, scale: float = 2.0
) -> Float[np.ndarray, "..."]:
    r"""Step sizes :math:`\eta_k = \frac{s}{m (k + 2 \kappa s)}` for steps k = 0, 1, ..., starting at 1/(2M).

    Args:
      k: step number.
      strong_convexity: strong-convexity constant m.
      smoothness: Lipschitz constant M of the gradient.
      scale: scale s; `decreasing_steps_bound` needs s > 1.

    Raises:
      ValueError: unless 0 < m <= M and s > 0.

    Example:
      >>> decreasing_step(np.array([0, 40]), strong_convexity=1.0, smoothness=10.0).tolist()
      [0.05, 0.025]
    """
    _check(strong_convexity, smoothness)
    if scale <= 0:
        raise ValueError(f"scale must be positive, got {scale}.")
    return scale / (strong_convexity * (np.asarray(k) + 2 * smoothness / strong_convexity * scale))


def decreasing_steps_bound(
    k: ArrayLike,
    gap: float,
    *,
    strong_convexity: float,
    smoothness: float,
    noise: float,
    scale: float = 2.0,
    lam: float = 0.0,
    workers: int = 1,
    loss_noise: float = 0.0,
) -> Float[np.ndarray, "..."]:
    r"""Upper bound O(1/k) on the expected gap after k steps of `decreasing_step` (the paper's convergence theorems).

    Since the leader is no worse than the worker, `one_step_bound` gives
    :math:`a_{k+1} \le (1 - m \eta_k) a_k + B \eta_k^2` for the expected gap :math:`a_k`, with
    :math:`B = \frac12 M \sigma^2`. With s > 1, by induction,

    .. math:: a_k \le \frac{1}{k + 2 \kappa s} \max\left(\frac{s^2 B}{m^2 (s - 1)}, \; 2 \kappa s \, a_0\right) .

    A leader elected on noisy losses adds at most :math:`4 \eta_k \lambda_k \sqrt p \sigma_f` to a step (see
    `limit_bound`). With :math:`\lambda_k = 2 M \lambda_0 \eta_k`, proportional to eta_k, this term is also of order
    :math:`\eta_k^2`, and the same bound holds with :math:`8 M \lambda_0 \sqrt p \sigma_f` added to B.

    Args:
      k: number of completed steps.
      gap: initial gap f(x_0) - f*.
      strong_convexity: strong-convexity constant m.
      smoothness: Lipschitz constant M of the gradient.
      noise: standard deviation sigma of the gradient noise.
      scale: scale s > 1 of the step sizes.
      lam: lambda, or lambda_0 for noisy losses; at most m, so that `bound_applies` to every step.
      workers: number of workers p.
      loss_noise: standard deviation sigma_f of the loss noise.

    Raises:
      ValueError: if a number is out of range.

    Example:
      >>> constants = {"strong_convexity": 1.0, "smoothness": 10.0, "noise": 1.0}
      >>> decreasing_steps_bound(np.array([0, 40]), gap=1.0, **constants).tolist()
      [1.0, 0.5]
    """
    _check(strong_convexity, smoothness, noise=noise, loss_noise=loss_noise)
    if scale <= 1 or not 0 <= lam <= strong_convexity:
        raise ValueError(f"the rate needs scale > 1 and lam in [0, {strong_convexity}], got {scale} and {lam}.")
    delay = 2 * smoothness / strong_convexity * scale
    per_step = smoothness * noise**2 / 2 + 8 * smoothness * lam * workers**0.5 * loss_noise
    return max(scale**2 * per_step / (strong_convexity**2 * (scale - 1)), delay * gap) / (np.asarray(k) + delay)


def limit_bound(
    eta: float,
    lam: float,
    *,
    strong_convexity: float,
    smoothness: float,
    noise: float,
    workers: int = 1,
    loss_noise: float = 0.0,
) -> float:
    r"""Upper bound on the limiting gap with constant steps (the paper's theorem on a stochastic leader).

    It holds where `bound_applies`.

    .. math:: \limsup_k E f(x_k) - f^* \le \tfrac12 \eta \kappa \sigma^2 + \frac4m \lambda \sqrt p \, \sigma_f

    The leader is elected on unbiased estimates of the losses with variance :math:`\sigma_f^2`. The
    largest error of the p estimates has mean at most :math:`\sqrt p \sigma_f`, so E f(z) exceeds f(x) by at most that.
    The limit of
    :math:`a \leftarrow (1 - m \eta) a + \eta \lambda \sqrt p \sigma_f + \frac12 \eta^2 M \sigma^2` is the bound, even
    with 1 in place of the paper's 4.

    Args:
      eta: step size.
      lam: pull coefficient lambda.
      strong_convexity: strong-convexity constant m.
      smoothness: Lipschitz constant M of the gradient.
      noise: standard deviation sigma of the gradient noise.
      workers: number of workers p.
      loss_noise: standard deviation sigma_f of the loss noise.

    Raises:
      ValueError: if a number is out of range, or the bound does not apply to such a step.

    Example:
      >>> constants = {"strong_convexity": 1.0, "smoothness": 10.0, "noise": 1.0}
      >>> print(f"{limit_bound(0.05, 1.0, workers=4, loss_noise=0.1, **constants):.3f}")
      1.050
    """
    _check(strong_convexity, smoothness, noise=noise, loss_noise=loss_noise)
    if not bound_applies(eta, lam, strong_convexity=strong_convexity, smoothness=smoothness):
        raise ValueError(f"the bound needs eta <= 1/(2M) and eta lam <= m/(2M), got eta {eta} and lam {lam}.")
    from_leader = 4 / strong_convexity * lam * workers**0.5 * loss_noise
    return eta * smoothness / strong_convexity * noise**2 / 2 + from_leader


def _check(strong_convexity: float, smoothness: float, **noises: float) -> None:
    if not 0 < strong_convexity <= smoothness:
        raise ValueError(
            f"the bounds need 0 < strong_convexity <= smoothness, got {strong_convexity} and {smoothness}."
        )
    for name, noise in noises.items():
        if noise < 0:
            raise ValueError(f"{name} must be at least 0, got {noise}.")
