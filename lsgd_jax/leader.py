r"""Leader stochastic gradient descent (LSGD): the algorithm, to be read beside the paper.

Teng, Gao, Chalus, Choromanska, Goldfarb, Weller, "Leader Stochastic Gradient Descent for Distributed Training of Deep
Learning Models: Extension", https://arxiv.org/abs/1905.10395.

Each of the l workers in each of n groups holds parameters x, which minimize jointly (eq. 1)

    sum over workers of  E f(x)  +  lambda/2 ||x - x~^j||^2  +  lambda_G/2 ||x - x~||^2,

x~^j the best worker of the group j (the local leader), x~ the best of all (the global leader). The stochastic gradient
of that sum, with the leaders held fixed, is the update (eq. 2)

    x  <-  x - eta g(x) - lambda (x - x~^j) - lambda_G (x - x~).

Algorithm 1 takes it apart. A worker steps on its own, and every tau steps it is pulled towards its local leader, every
tau_G steps then towards the global one: an optimizer and two links, each over its own axes.

    optax.chain(
        optax.sgd(eta),  # x <- x - eta g(x)
        leader_pull(0.1, axis_name="worker", period=4),  # lambda, tau
        leader_pull(0.1, axis_name=("group", "worker"), period=16),  # lambda_G, tau_G
    )

`lsgd_jax.leader_sgd` builds that chain. What the paper does not have is in `lsgd_jax.variants`.
"""

from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array

from lsgd_jax.exchange import NOBODY, AxisName, Sending, elect, exact, worker_index
from lsgd_jax.exchange.election import all_finite
from lsgd_jax.exchange.trees import distance, scalar_like
from lsgd_jax.link import AT_ONCE, Attractor, Exchange, LinkState, Pull, PullAt, Target, parts
from lsgd_jax.scores import CommonLoss, LeaderState, scored
from lsgd_jax.streaming import WHOLE, Streaming, streamed


def leader_pull(
    pull: Pull,
    *,
    axis_name: AxisName,
    period: int = 1,
    window: int = 10,
    pull_at: PullAt = "after_step",
    sending: Sending = exact(),  # noqa: B008
    exchange: Exchange = AT_ONCE,
    streaming: Streaming = WHOLE,
    model_axis_name: AxisName | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Pull every worker towards the leader, the worker whose recent training loss is lowest: one level of Algorithm 1.

    The last link of an optax chain: the links before it make the worker's own step, :math:`x' = x + u`. On the updates
    number `period`, 2 `period`, ... the workers on `axis_name` exchange. The one with the lowest score leads, its
    parameters :math:`\tilde x` are broadcast, and every worker moves to

    .. math:: x' - pull \, (x' - \tilde x).

    - The score is the mean of the last `window` losses passed as `value`, or of all as long as there are fewer.
    - A worker can lead if its score and all its outgoing parameters are finite; ties go to the lowest position. If no
      worker can, nobody is pulled.
    - A leader is not moved by its own pull, to the bit. A pull of 1 is a consensus up to rounding.
    - A worker may be spread over further mesh axes, as a sharded model is. Where these are `Auto` axes, as for GSPMD,
      or `Explicit` ones, nothing changes; `sending` says how arrays lie over `Auto` axes. Where they are manual as
      well, `model_axis_name` names them.
    - Only parameters are exchanged: momentum and other optimizer state stay the worker's own.

    Args:
      pull: strength in [0, 1]: a number, a schedule of the step, or an array with the shape of the worker axes. In the
        objective form of eq. 1 it is the learning rate times lambda. To change it during a run,
        `optax.inject_hyperparams(leader_pull, static_args=("period", "window"))`.
      axis_name: the axis, or the axes, over which workers elect one leader: those of a group, or of all.
      period: updates between exchanges, tau.
      window: losses in a score (10 in the paper for CIFAR-10, 64 for ImageNet).
      pull_at: "after_step" pulls at the point after the worker's step, as Algorithm 1 does; "before_step" takes
        eq. 2 literally, at :math:`x`.
      sending: how the leader is sent: `exact`, `bfloat16` or `int8` of `lsgd_jax.exchange`.
      exchange: how the pull is made: `AT_ONCE`, or one of `lsgd_jax.variants`.
      streaming: in how many fragments the leader is sent, and when these are applied.
      model_axis_name: the manual axis, or the axes, over which a worker itself is spread: finiteness and distances are
        those of all its parts. The loss must be the same on them.

    Returns:
      A gradient transformation, as `link` makes it. `update(updates, state, params, value=loss)` needs the params and
      the worker's scalar training loss that came with the gradients.

    Raises:
      ValueError: for an option out of range here, and at `update` for missing params or value.
      NameError: at `update`, if an axis is not bound there.

    Example:
      Four workers on f(x) = x^2, the one at 1 in the lead.

      >>> import jax, jax.numpy as jnp, optax
      >>> tx = optax.chain(optax.sgd(0.25), leader_pull(0.5, axis_name="worker"))
      >>> def step(x, state):
      ...     value, grad = jax.value_and_grad(lambda x: x**2)(x)
      ...     updates, state = tx.update(grad, state, x, value=value)
      ...     return optax.apply_updates(x, updates), state
      >>> x = jnp.array([4.0, 1.0, -2.0, 2.0])
      >>> x, (_, state) = jax.vmap(step, axis_name="worker")(x, jax.vmap(tx.init)(x))
      >>> print(x, state.leader.position)
      [ 1.25  0.5  -0.25  0.75] [1 1 1 1]
    """
    leader = leader_of(axis_name, sending, model_axis_name)
    # "if tau divides t", and then "x <- x - lambda (x - x~)".
    moving = streamed(leader, pull, streaming, axis_name=axis_name, period=period, pull_at=pull_at, exchange=exchange)
    return scored(moving, window)


def leader_of(axis_name: AxisName, sending: Sending, model_axis_name: AxisName | None = None) -> Attractor:
    """The attractor of Algorithm 1: the best of the workers on these axes."""

    def init(params: optax.Params) -> LeaderState:
        nobody, gap = scalar_like(params, NOBODY, jnp.int32), scalar_like(params, 0, float)
        return LeaderState(nobody, scalar_like(params, False, bool), gap, sending.init(params))

    def choose(
        x: optax.Params,
        state: LeaderState,
        *,
        score: Array,
        able: Array | bool = True,
        before: LinkState | None = None,
        common_loss: CommonLoss | None = None,
        **signals: Any,
    ) -> LeaderState:
        score = score if common_loss is None else common_loss(x)
        # "x~ = argmin E f(x)", among those who are able to lead; of a streamed leader the rest, if it still is.
        led = True if before is None else parts(LeaderState, before)[0].leads
        position = elect(score, axis_name, eligible=all_finite(x, model_axis_name) & able & led)
        return state._replace(position=position, leads=position == worker_index(axis_name))

    def locate(x: optax.Params, state: LeaderState) -> tuple[Target, LeaderState]:
        leader_x, sent = sending.send(x, state.position, axis_name, state.sent)
        somebody = state.position != NOBODY
        gap = distance(x, leader_x, model_axis_name).astype(state.distance.dtype)
        follows = somebody & (state.position != worker_index(axis_name))
        return Target(leader_x, somebody, follows), state._replace(distance=jnp.where(somebody, gap, 0), sent=sent)

    return Attractor(init, locate, choose)
