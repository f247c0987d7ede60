# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: Leader SGD on your own loss
#
# Several workers train the same model, each with its own steps. Every few steps all are pulled towards the leader, the
# worker whose recent training loss is lowest. Here the workers are the first axis of the arrays, mapped by `jax.vmap`:
# no devices are needed. The same step runs under `jax.shard_map` on real ones.

# %%
try:
    import lsgd_jax
except ModuleNotFoundError:
    raise SystemExit("Install the package first: run `pip install .` in the repository's folder.") from None

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from lsgd_jax.data import BatchIndices, load

# %% [markdown]
# ## A loss
#
# Anything that JAX can differentiate will do. Here is a small network on scikit-learn's handwritten digits, its
# parameters a plain dictionary.

# %%
data = load("digits")


def init_params(key):
    keys = jax.random.split(key)
    return {
        "w1": jax.random.normal(keys[0], (64, 32)) / 8,
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(keys[1], (32, 10)) / 6,
        "b2": jnp.zeros(10),
    }


def logits_of(params, x):
    hidden = jax.nn.relu(x.reshape(len(x), -1) @ params["w1"] + params["b1"])
    return hidden @ params["w2"] + params["b2"]


def loss_fn(params, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y).mean()


# %% [markdown]
# ## Five lines to LSGD
#
# `leader_pull` is the last link of an optax chain. It needs to be told the loss, by which the leader is elected.

# %%
tx = optax.chain(
    optax.sgd(0.1, momentum=0.9, nesterov=True),
    lsgd_jax.leader_pull(0.1, period=4, axis_name="worker"),
)


def step(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params, value=loss)
    return optax.apply_updates(params, updates), state, loss


step = jax.jit(jax.vmap(step, axis_name="worker"))

# %% [markdown]
# ## Training
#
# All workers start at the same point, and every epoch is dealt out to them in disjoint shards. The last link's state
# tells who leads.

# %%
workers, steps = 4, 200
params = jax.tree.map(lambda x: jnp.broadcast_to(x, (workers, *x.shape)), init_params(jax.random.key(0)))
state = jax.vmap(tx.init)(params)
batches = BatchIndices(examples=len(data.train_y), workers=workers, batch_size=16, sampling="shards", seed=0)

losses, leaders = [], []
for t in range(steps):
    examples = batches(t)
    params, state, loss = step(params, state, data.train_x[examples], data.train_y[examples])
    losses.append(loss)
    leaders.append(state[-1].leader.position[0])

center = jax.tree.map(lambda x: x.mean(0), params)
error = np.mean(np.argmax(logits_of(center, data.test_x), -1) != data.test_y)
print(f"test error of the center, the mean of the workers: {error:.1%}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
left.semilogy(np.array(losses), linewidth=0.8)
left.set(xlabel="step", ylabel="training loss", title="every worker's loss")
right.plot(np.array(leaders), ".", markersize=3)
right.set(xlabel="step", ylabel="the leader's rank", title="who led (-1: nobody yet)", yticks=range(-1, workers))
plt.show()

# %% [markdown]
# ## What else there is
#
# - A second link, `leader_pull(0.1, period=16, axis_name=("group", "worker"))`, adds a leader of all groups: map twice,
#   `jax.vmap(jax.vmap(step, axis_name="worker"), axis_name="group")`.
# - A pull may be a schedule of the step, or an array with one entry a worker.
# - `lsgd_jax.lsgd(0.1, axis_name="worker")` is the chain above with the paper's settings.
# - `lsgd train --help` and `lsgd compare --help` run whole experiments.
