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
# # Your own model, optimizer and data
#
# This notebook trains a Flax NNX network with dropout and batch normalization on your own arrays, with AdamW, a
# learning-rate schedule, and workers in groups. One function defines what a worker does in one step. `jax.vmap` maps it
# over arrays on one device, and `jax.shard_map` over devices.
#
# **You will learn**
#
# - how to train an NNX module with batch statistics and dropout as the model of each worker,
# - how to add local and global pulls, with schedules, to any optax optimizer,
# - how to run the same step on one device and on several,
# - how to change the pull during a run without recompiling.
#
# **Run time:** about a minute on two CPU cores.

# %%
# Install lsgd_jax if it is missing: from a clone of the repository, because it is not on a package index.
import importlib.util
import subprocess
import sys

SOURCE = ".."  # Path of the clone, or its git+https://... address. In the clone's notebooks/ folder, this is it.
if importlib.util.find_spec("lsgd_jax") is None and subprocess.call([sys.executable, "-m", "pip", "install", SOURCE]):
    raise SystemExit("Set SOURCE to a clone of the repository, and run this cell again.")

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lsgd_jax import leader_pull
from lsgd_jax.data import BatchIndices

groups, workers = 2, 4
# Simulate a CPU device per worker. This must come before JAX initializes its devices.
jax.config.update("jax_num_cpu_devices", groups * workers)
small = "LSGD_SMALL" in os.environ  # Small sizes, for tests: the text is about the full size.

# %% [markdown]
# ## Data
#
# Any arrays work. These are three noisy spirals in the plane.


# %%
def spirals(count, seed):
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=count)
    radius = rng.uniform(0.1, 1, count)
    angle = 2 * np.pi * (y / 3 + radius)
    x = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1) + 0.08 * rng.normal(size=(count, 2))
    return x.astype(np.float32), y


train_x, train_y = spirals(3000, seed=0)
test_x, test_y = spirals(2000, seed=1)

# %% [markdown]
# ## Model
#
# This is an ordinary NNX module. Split it once into the graph definition, which never changes, the parameters, and the
# rest, here the running statistics of batch normalization. From here on, parameters and rest are plain pytrees.


# %%
class Network(nnx.Module):
    def __init__(self, units, *, rngs):
        # No biases: batch normalization has its own.
        self.dense = nnx.List([nnx.Linear(size, units, use_bias=False, rngs=rngs) for size in (2, units)])
        self.norms = nnx.List([nnx.BatchNorm(units, momentum=0.9, rngs=rngs) for _ in self.dense])
        self.dropout = nnx.Dropout(0.1)
        self.out = nnx.Linear(units, 3, rngs=rngs)

    def __call__(self, x, *, rngs=None):
        for dense, norm in zip(self.dense, self.norms, strict=True):
            x = self.dropout(jax.nn.gelu(norm(dense(x))), rngs=rngs)
        return self.out(x)


model = Network(32, rngs=nnx.Rngs(0))
model.train()
graphdef, params, rest = nnx.split(model, nnx.Param, ...)
model.eval()
testing_graphdef = nnx.graphdef(model)

print(
    "parameters:",
    sum(x.size for x in jax.tree.leaves(params)),
    "numbers; the rest:",
    len(jax.tree.leaves(rest)),
    "arrays",
)

# %% [markdown]
# ## Optimizer
#
# `leader_pull` follows any optax optimizer. Like learning rates, pulls can be schedules. This pull grows, so that the
# workers are independent at first and together at the end. Local leaders are elected every 4 steps, the global leader
# every 16.

# %%
steps = 64 if small else 400
learning_rate = optax.warmup_cosine_decay_schedule(0.0, 0.02, warmup_steps=steps // 10, decay_steps=steps)
growing = optax.linear_schedule(0.02, 0.3, transition_steps=steps)

tx = optax.chain(
    optax.adamw(learning_rate, weight_decay=1e-3),
    leader_pull(growing, axis_name="worker", period=4),
    leader_pull(growing, axis_name=("group", "worker"), period=16),
)

# %% [markdown]
# ## One worker's step
#
# The step has no worker axis. The key is the worker's own, for dropout. The statistics that the network updates are
# returned as the new rest; LSGD pulls only the parameters.


# %%
def step_with(tx):
    def step(params, rest, state, key, x, y):
        def loss_of(params):
            network = nnx.merge(graphdef, params, rest, copy=True)
            logits = network(x, rngs=nnx.Rngs(dropout=key))
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
            return loss, nnx.split(network, nnx.Param, ...)[2]

        (loss, new_rest), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), new_rest, state, loss

    return step


# %% [markdown]
# ## All workers, on one device and on many
#
# With `jax.vmap`, the workers are the first two axes of every array, [group, worker, ...], on one device. With
# `jax.shard_map`, every worker has a device of its own, and the same names are the axes of a mesh.

# %%
vmapped = jax.jit(jax.vmap(jax.vmap(step_with(tx), axis_name="worker"), axis_name="group"))

mesh = jax.make_mesh((groups, workers), ("group", "worker"), axis_types=(AxisType.Auto, AxisType.Auto))
spec = PartitionSpec("group", "worker")


def on_own_device(*stacked):
    own = jax.tree.map(lambda x: x[0, 0], stacked)  # Each device holds one worker: both worker axes have size 1.
    return jax.tree.map(lambda x: x[None, None], step_with(tx)(*own))


sharded = jax.jit(jax.shard_map(on_own_device, mesh=mesh, in_specs=spec, out_specs=spec))

# %% [markdown]
# ## Training loop
#
# `BatchIndices` splits every epoch among the workers into disjoint shards, as a pure function of the seed and the step.
# All workers start from the same parameters, and each has a key of its own.

# %%
batches = BatchIndices(examples=len(train_y), workers=groups * workers, batch_size=32, sampling="shards", seed=0)


def start(tx):
    one = (params, rest, tx.init(params))
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (groups, workers, *x.shape)), one)


def train(step, now, first, end, after_step=None):
    for t in range(first, end):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), t), (groups, workers))
        examples = batches(t).reshape(groups, workers, -1)
        *now, loss = jax.block_until_ready(step(*now, keys, train_x[examples], train_y[examples]))
        if after_step is not None:
            after_step(now, loss)
    return now


by_vmap = train(vmapped, start(tx), 0, 32)
# Shard the start over the devices; otherwise the step is compiled twice, for one device and for eight.
by_shard_map = train(sharded, jax.device_put(start(tx), NamedSharding(mesh, spec)), 0, 32)

difference = max(
    float(jnp.max(jnp.abs(a - b))) for a, b in zip(*map(jax.tree.leaves, (by_vmap[0], by_shard_map[0])), strict=True)
)
print("devices that hold a part of each array:", len(jax.tree.leaves(by_shard_map[0])[0].sharding.device_set))
print(
    f"after 32 steps, with two global exchanges, parameters differ by less than {10 ** np.ceil(np.log10(difference)):g}"
)

# %% [markdown]
# Both give the same results up to rounding: a matrix product for eight workers at once sums in a different order than
# eight single products.
#
# ## Training and evaluation
#
# The evaluated model is the mean of all workers.

# %%
distances = []
now = train(vmapped, by_vmap, 32, steps, lambda now, loss: distances.append(now[2][-1].leader.distance.mean()))


def logits_of(params, rest, x):
    return nnx.merge(testing_graphdef, params, rest)(x)


def error(params, rest):
    return np.mean(np.argmax(logits_of(params, rest, test_x), -1) != test_y)


center, center_rest = (jax.tree.map(lambda x: x.mean((0, 1)), tree) for tree in now[:2])
leader = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[now[2][-1].leader.position[0, 0]], now[:2])
print(f"test error of the center, with the mean of the workers' statistics: {error(center, center_rest):.1%}")
print(f"test error of the last global leader: {error(*leader):.1%}")

# %%
side = np.linspace(-1.3, 1.3, 200)
plane = np.stack(np.meshgrid(side, side), -1).reshape(-1, 2).astype(np.float32)
classes = np.argmax(logits_of(center, center_rest, plane), -1).reshape(200, 200)
plt.figure(figsize=(4.5, 4.5))
plt.contourf(
    side, side, classes, levels=[-0.5, 0.5, 1.5, 2.5], colors=["tab:blue", "tab:orange", "tab:green"], alpha=0.3
)
for label, color in enumerate(["tab:blue", "tab:orange", "tab:green"]):
    plt.plot(*train_x[train_y == label][:250].T, ".", color=color, markersize=3)
plt.gca().set(aspect="equal", title="predictions of the center, and training examples", xticks=[], yticks=[])
plt.show()

# %% [markdown]
# ## Adapting the pull during a run
#
# A schedule knows only the step. To set the pull by hand during a run without recompiling, wrap `leader_pull` in
# `optax.inject_hyperparams`, with all other options static; the pull is then an array in the state. In this example it
# follows the workers' distance to their leader: stronger if they are further than 1 away from it, weaker if they are
# closer.

# %%
static = ("axis_name", "period", "window")
by_hand = optax.chain(
    optax.adamw(learning_rate, weight_decay=1e-3),
    optax.inject_hyperparams(leader_pull, static_args=static)(0.1, axis_name=("group", "worker"), period=4),
)
vmapped_by_hand = jax.jit(jax.vmap(jax.vmap(step_with(by_hand), axis_name="worker"), axis_name="group"))
pulls, distances_by_hand = [], []


def set_pull(now, loss):
    state = now[2][-1]
    pull, distance = state.hyperparams["pull"], state.inner_state.leader.distance.mean()
    state.hyperparams["pull"] = jnp.clip(pull * jnp.where(distance > 1.0, 1.03, 0.97), 0.005, 0.5)
    pulls.append(pull[0, 0])
    distances_by_hand.append(distance)


now = train(vmapped_by_hand, start(by_hand), 0, steps, set_pull)
center, center_rest = (jax.tree.map(lambda x: x.mean((0, 1)), tree) for tree in now[:2])
print(f"test error of the center: {error(center, center_rest):.1%}")

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5))
left.plot(np.arange(32, steps), np.array(distances), label="schedule, two groups")
left.plot(np.array(distances_by_hand), label="set by hand, one group")
left.axhline(1.0, color="0.6", linewidth=0.8, linestyle=":")
left.set(xlabel="local steps", ylabel="mean distance to the global leader")
left.legend(fontsize=8)
right.plot(np.arange(steps), [growing(t) for t in range(steps)], label="schedule")
right.plot(np.array(pulls), label="set by hand")
right.set(xlabel="local steps", ylabel="pull", ylim=(0, 0.4))
right.legend(fontsize=8, loc="upper left")
plt.show()

# %% [markdown]
# The distances are those to the leader at the last exchange, before the pull. Set by hand, the pull rises while the
# workers drift apart and falls when they are close. At the end, the learning rate is so low that they stay together
# almost without it.

# %% [markdown]
# ## Try this
#
# - Set `growing = optax.constant_schedule(0.3)`, or `0.02`. Look at the distance to the leader in the last figure, and at
#   the test errors of the center and the leader.
# - Set `groups, workers = 1, 8` or `4, 2`: the same eight workers with other local leaders. Does the test error depend on it?
# - Replace `optax.adamw(learning_rate, weight_decay=1e-3)` by `optax.sgd(0.3, momentum=0.9)` in both chains. Look at the
#   distances: are they still near 1 when the pull is set by hand?
# - Set the distance that `set_pull` aims at from `1.0` to `0.2`, and look at how strong the pull gets.
# - Average only the parameters: evaluate the center with one worker's statistics,
#   `error(center, jax.tree.map(lambda x: x[0, 0], now[1]))`, in place of the mean of all.
