"""docs/libraries.md: what it says of other libraries, and of wrappers of optax, is so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from lsgd_jax import leader_sgd
from lsgd_jax.costs.collectives import collectives
from lsgd_jax.variants import Delayed, Revival, Stale, links
from tests.test_docs import ROOT, sections

PAGE = ROOT / "docs" / "libraries.md"
OPTIMIZER_STATES = {
    "Flax NNX": lambda page: nnx.as_pure(page["optimizer"].opt_state),
    "Flax Linen and TrainState": lambda page: page["state"].opt_state,
    "Batch norm": lambda page: page["state"].opt_state,
    "Equinox": lambda page: page["state"],
    "Haiku": lambda page: page["state"],
    "LoRA and frozen parameters": lambda page: page["state"],
    "`shard_map` with L-BFGS or `reduce_on_plateau`": lambda page: page["state"],
}
SHARD_MAP = list(OPTIMIZER_STATES)[-1]
BY_WORKER = PartitionSpec("worker")


def after(section):
    """The page's names and values at a section's end."""
    return sections(PAGE)[section]


def one_of(tree, worker=0):
    return jax.tree.map(lambda a: a[worker], tree)


@pytest.mark.parametrize("section", OPTIMIZER_STATES)
def test_workers_learn_and_the_one_with_the_lowest_losses_leads(section):
    page = after(section)
    losses = jnp.stack(page["losses"])
    assert (losses[-1] < 0.5 * losses[0]).all()
    (link,) = links(OPTIMIZER_STATES[section](page))
    assert len(losses) % 4 == 0  # The last step exchanged.
    assert link.leader.position.tolist() == [losses[-10:].mean(0).argmin()] * 4
    assert link.exchanges.tolist() == [len(losses) // 4] * 4


def test_the_mean_of_nnx_modules_is_a_module():
    page = after("Flax NNX")
    error = jnp.mean((page["mean"](page["x"].reshape(-1, 3))[:, 0] - page["y"].reshape(-1)) ** 2)
    assert error < 0.2 * page["losses"][0].mean()


def test_nnx_optimizer_revives_a_worker():
    page = after("Flax NNX")
    model, optimizer = page["create"]()
    failed = []
    for t in range(4):
        page["step"](model, optimizer, page["x"].at[1].set(jnp.nan) if t == 1 else page["x"], page["y"])
        _, revival, link = nnx.as_pure(optimizer.opt_state)
        assert isinstance(revival, Revival)
        failed.append(revival.failed.tolist())
    assert failed == [[False] * 4, *[[False, True, False, False]] * 2, [False] * 4]
    assert revival.revived.tolist() == [False, True, False, False]
    for x in jax.tree.leaves(nnx.state(model, nnx.Param)):
        np.testing.assert_allclose(x[1], x[link.leader.position[0]], atol=1e-6)


def test_batch_statistics_are_the_workers_own_and_the_means_its_own():
    page = after("Batch norm")
    (stats,) = page["state"].batch_stats.values()
    assert len(np.unique(np.asarray(stats["mean"]), axis=0)) == 4
    dense = page["mean"]["layers_0"]
    activations = page["examples"] @ dense["kernel"] + dense["bias"][None]
    (seen,) = page["seen"]["batch_stats"].values()
    np.testing.assert_allclose(seen["mean"], activations.mean(0), atol=1e-5)
    np.testing.assert_allclose(seen["var"], activations.var(0), rtol=1e-4)
    assert page["error"] < 0.2 * page["losses"][0].mean()


@pytest.fixture(scope="module")
def lora():
    """What the section makes: the whole state of one worker and of all."""
    page = after("LoRA and frozen parameters")
    return page, one_of(page["params"])


def waiting(tx, params):
    """The arrays that a delayed pull stores, as shapes."""
    (link,) = links(jax.eval_shape(tx.init, params))
    assert isinstance(link.link.attractor, Delayed)
    return jax.tree.leaves(link.link.attractor.x)


def test_frozen_weights_are_unchanged(lora):
    page, params = lora
    jax.tree.map(np.testing.assert_array_equal, params["base"], page["base"])
    assert jnp.abs(params["lora"]["b"]).max() > 0.01


def test_bytes_of_adapters_are_as_the_page_says(lora):
    page, params = lora
    sent, stored = [], []
    for tx in (leader_sgd(optax.adam(0.01), axis_name="worker", delay=1), page["tx"]):

        def update(*stacked, tx=tx):
            params, state, value = one_of(stacked)
            return jax.tree.map(lambda a: a[None], tx.update(params, state, params, value=value))

        arguments = page["params"], jax.vmap(tx.init)(page["params"]), jnp.zeros(4)
        text = jax.jit(over_devices(update, check_vma=True)).lower(*arguments).compile().as_text()
        sent.append(sum(each.sent for each in collectives(text)))
        stored.append(sum(x.size * x.dtype.itemsize for x in waiting(tx, params)))
    text = PAGE.read_text()
    assert f"| {sent[0]:.0f} bytes | {sent[1]:.0f} bytes |" in text
    assert f"| {stored[0]} bytes | {stored[1]} bytes |" in text


def updated(tx, params, losses, *, count, gradient):
    """Parameters [worker, ...] after updates whose gradients are always a factor times the start."""

    @functools.partial(jax.vmap, axis_name="worker")
    def step(params, state, grads, loss):
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    step, state, grads = jax.jit(step), jax.vmap(tx.init)(params), jax.tree.map(lambda a: gradient * a, params)
    for _ in range(count):
        params, state = step(params, state, grads, losses)
    return params


def test_a_partition_around_is_the_same_as_inside(lora):
    page, _ = lora
    inside, around = (
        updated(page[name], page["params"], jnp.arange(4.0), count=8, gradient=1.0) for name in ("tx", "around")
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), inside, around)
    jax.tree.map(np.testing.assert_array_equal, around["base"], page["params"]["base"])


def test_wrappers_hide_what_is_frozen_unless_they_are_within_the_partition(lora):
    page, params = lora

    def partition(adam):
        return optax.partition({"train": adam, "frozen": optax.set_to_zero()}, page["labels"])

    def stored(optimizer):
        return len(waiting(leader_sgd(optimizer, axis_name="worker", delay=1), params))

    for wrapper in (lambda tx: optax.MultiSteps(tx, 2), lambda tx: optax.apply_if_finite(tx, 5)):
        assert stored(partition(wrapper(optax.adam(0.01)))) == 2
        assert stored(wrapper(partition(optax.adam(0.01)))) == 4
    assert stored(partition(optax.lbfgs())) == 4


def test_what_is_masked_from_the_pull_stays_with_the_worker(lora):
    page, _ = lora
    start = jax.tree.map(lambda a: a + jnp.arange(4.0).reshape(4, 1, 1), page["params"])  # The workers are 1 apart.
    trained = updated(page["personal"], start, jnp.arange(4.0), count=4, gradient=0.0)
    jax.tree.map(np.testing.assert_array_equal, trained["lora"], start["lora"])
    apart = trained["base"]["in"] - trained["base"]["in"][:1]
    np.testing.assert_allclose(apart, np.broadcast_to(0.9 * np.arange(4.0).reshape(4, 1, 1), apart.shape), atol=1e-5)


@pytest.mark.parametrize("place", ["inside", "around"])
def test_a_revival_resets_accumulated_gradients_only_inside(place):
    if place == "inside":
        tx = leader_sgd(optax.MultiSteps(optax.sgd(0.1), 2), axis_name="worker", period=4, revive="from_leader")
    else:
        tx = optax.MultiSteps(leader_sgd(optax.sgd(0.1), axis_name="worker", period=2, revive="from_leader"), 2)
    update = jax.jit(jax.vmap(lambda g, s, x: tx.update(g, s, x, value=x), axis_name="worker"))
    x = jnp.arange(4.0)
    state = jax.vmap(tx.init)(x)
    for t in range(6):
        updates, state = update(x.at[1].set(jnp.nan) if t == 0 else x, state, x)
        x = optax.apply_updates(x, updates)
    accumulated = (state[0] if place == "inside" else state).acc_grads
    assert jnp.isfinite(accumulated).tolist() == [True, place == "inside", True, True]
    assert jnp.isfinite(x).all()


def test_accumulation_inside_counts_calls():
    page = after("Gradient accumulation and skipped steps")
    tx, x = page["accumulated"], jnp.arange(4.0)
    update = jax.jit(jax.vmap(lambda s, x: tx.update(x, s, x, value=x), axis_name="worker"))
    state = jax.vmap(tx.init)(x)
    for _ in range(8):
        state = update(state, x)[1]
    assert state[0].gradient_step.tolist() == [4] * 4
    assert state[1].exchanges.tolist() == [1] * 4


def test_a_step_that_is_not_finite_is_skipped_inside():
    page = after("Gradient accumulation and skipped steps")
    tx, x = page["finite"], jnp.arange(4.0)
    update = jax.jit(jax.vmap(lambda g, s, x: tx.update(g, s, x, value=x), axis_name="worker"))
    updates, state = update(x.at[1].set(jnp.nan), jax.vmap(tx.init)(x), x)
    assert updates[1] == 0
    assert state[1].link.step.tolist() == [1] * 4


def test_an_injected_pull_and_learning_rate_are_used():
    page = after("Changing the learning rate or the pull during a run")
    tx, params, state = page["tx"], page["params"], page["state"]
    losses = jnp.array([2.0, 1.0, 0.0, 3.0])
    update = jax.jit(jax.vmap(lambda x, s, loss: tx.update(x, s, x, value=loss), axis_name="worker"))
    arrived = optax.apply_updates(params, update(params, state, losses)[0])["w"]
    np.testing.assert_allclose(arrived, np.broadcast_to(params["w"][2], arrived.shape), atol=1e-6)


def test_what_is_static_is_not_injected_and_a_stale_pull_that_is_stores_the_leader():
    page = after("Changing the learning rate or the pull during a run")
    options = {"axis_name": "worker", "period": 1}
    params = one_of(page["params"])
    state = jax.eval_shape(page["injected"].init, params)
    assert set(state.hyperparams) == {"learning_rate", "pull", "momentum", "weight_decay"}
    assert not isinstance(links(state)[0].link.attractor, Stale)
    less_static = optax.inject_hyperparams(page["lsgd"], static_args=page["static"][:3])(0.1, **options)
    assert links(jax.eval_shape(less_static.init, params))[0].link.attractor.point["w"].shape == (3,)


def over_devices(function, *, check_vma, in_specs=BY_WORKER, out_specs=BY_WORKER):
    mesh = jax.make_mesh((4,), ("worker",), axis_types=(AxisType.Auto,))
    return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=check_vma)


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.contrib.reduce_on_plateau()], ids=["lbfgs", "plateau"])
def test_optax_alone_fails_in_shard_map_with_the_checks(optimizer):
    """If this fails, optax has mended it, and the page needs to say so."""

    def step(*stacked):
        x, state = one_of(stacked)
        extra = {"value": x @ x, "grad": 2 * x, "value_fn": lambda x: x @ x}
        updates, state = optax.with_extra_args_support(optimizer).update(2 * x, state, x, **extra)
        return jax.tree.map(lambda a: a[None], (optax.apply_updates(x, updates), state))

    x = jnp.ones((4, 3))
    state = jax.vmap(optimizer.init)(x)
    jax.eval_shape(over_devices(step, check_vma=False), x, state)
    with pytest.raises(TypeError, match="types"):
        jax.eval_shape(over_devices(step, check_vma=True), x, state)


def test_collectives_over_a_vmapped_axis_need_the_checks_off():
    mapped = jax.vmap(lambda x: lax.psum(x, "own"), axis_name="own")
    jax.eval_shape(over_devices(mapped, check_vma=False), jnp.ones(8))
    with pytest.raises(AssertionError):
        jax.eval_shape(over_devices(mapped, check_vma=True), jnp.ones(8))


def test_what_the_checks_do():
    specs = {"in_specs": (PartitionSpec(), BY_WORKER)}
    x = jnp.arange(4.0)
    gradients = [
        over_devices(lambda w, x: jax.grad(lambda w: (w * x).sum())(w)[None], check_vma=checked, **specs)(1.0, x)
        for checked in (True, False)
    ]
    np.testing.assert_array_equal(gradients, [[6.0] * 4, x])
    replicated = functools.partial(over_devices, lambda x: x, out_specs=PartitionSpec())
    jax.eval_shape(replicated(check_vma=False), x)
    with pytest.raises(ValueError, match="replicat"):
        jax.eval_shape(replicated(check_vma=True), x)


def test_what_a_line_search_has_stored_is_of_the_point_before_the_pull():
    page = after(SHARD_MAP)
    follower = (int(page["state"][1].leader.position[0]) + 1) % 4
    params, state, x, y = one_of((page["params"], page["state"], page["x"], page["y"]), follower)

    def loss_of(params):
        return jnp.mean((jnp.tanh(x @ params["w"]) * 3 - y) ** 2)

    stored, _ = optax.value_and_grad_from_state(loss_of)(params, state=state[0])
    assert abs(stored - loss_of(params)) > 1e-4
