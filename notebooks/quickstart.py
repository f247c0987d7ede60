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
# # Quickstart: LSGD on your own loss
#
# In leader stochastic gradient descent, several *workers* train the same model, each with SGD steps of its own. Every few
# steps all workers are *pulled* towards the *leader*, the worker whose recent training loss is lowest. In this notebook
# the workers are the first axis of the arrays, mapped by `jax.vmap`, so one CPU is enough. The same step runs on several
# devices under `jax.shard_map`.
#
# **You will learn**
#
# - how to add `leader_pull` to an optax chain,
# - how to write a worker's step and map it over all workers,
# - which model to evaluate, and how to see who leads.
#
# **Run time:** about ten seconds on two CPU cores.

# %%
# Install lsgd_jax if it is missing: from a clone of the repository, because it is not on a package index.
import importlib.util
import subprocess
import sys

SOURCE = ".."  # Path of the clone, or its git+https://... address. In the clone's notebooks/ folder, this is it.
if importlib.util.find_spec("lsgd_jax") is None and subprocess.call([sys.executable, "-m", "pip", "install", SOURCE]):
    raise SystemExit("Set SOURCE to a clone of the repository, and run this cell again.")

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from lsgd_jax import leader_pull
from lsgd_jax.data import BatchIndices, load

# %% [markdown]
# ## Loss
#
# Any loss that JAX can differentiate works. This one is a small network on scikit-learn's handwritten digits, with a
# plain dictionary as its parameters.

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
# ## Training step
#
# Put `leader_pull` last in an optax chain, and pass it the worker's loss as `value`: the leader is elected by it.

# %%
tx = optax.chain(
    optax.sgd(0.1, momentum=0.9, nesterov=True),
    leader_pull(0.1, period=4, axis_name="worker"),
)


def step(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params, value=loss)
    return optax.apply_updates(params, updates), state, loss


step = jax.jit(jax.vmap(step, axis_name="worker"))

# %% [markdown]
# ## Training loop
#
# All workers start from the same parameters, and every epoch is split among them into disjoint shards. The state of
# `leader_pull` holds the current leader. The model that LSGD reports is the mean of the workers.

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
    leaders.append(state[-1].leader.position[0])  # All workers know the same leader.

mean_params = jax.tree.map(lambda x: x.mean(0), params)
error = np.mean(np.argmax(logits_of(mean_params, data.test_x), -1) != data.test_y)
print(f"test error of the mean of the workers: {error:.1%}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
left.semilogy(np.array(losses), linewidth=0.8, label=[f"worker {i}" for i in range(workers)])
left.set(xlabel="local steps", ylabel="training loss", title="training loss of each worker")
left.legend(fontsize=8)
right.plot(np.array(leaders), ".", markersize=3)
right.set(
    xlabel="local steps", ylabel="leader", title="index of the leader (-1: no election yet)", yticks=range(-1, workers)
)
plt.show()

# %% [markdown]
# ## Next steps
#
# - For groups of workers, append a second pull, `leader_pull(0.1, period=16, axis_name=("group", "worker"))`, towards the
#   global leader, and map twice: `jax.vmap(jax.vmap(step, axis_name="worker"), axis_name="group")`.
# - A pull can be an optax schedule, or an array with one entry per worker.
# - `lsgd_jax.lsgd(0.1, axis_name="worker")` is this chain with the paper's settings.
# - `lsgd train --help` and `lsgd compare --help` describe whole experiments from the command line.

# %% [markdown]
# ## Try this
#
# - Set the pull to `0.0`: the workers are then independent. Look at the test error of their mean, which is a model only if
#   the workers are close together.
# - Set `period=50`: the leader changes at most four times. Do the workers' losses differ more in between?
# - Set `sampling="partitions"`: each worker sees the same quarter of the data in every epoch. Does the same worker lead all
#   the time?
# - Replace `tx` by `lsgd_jax.methods.METHODS["local_sgd"].build(optax.sgd(0.1, momentum=0.9, nesterov=True),
#   axis_name="worker", period=4)`, and drop the line with `leaders`: local SGD has none. Compare the test error.
