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
# # Groups of workers and communication cost
#
# Workers in groups have one local leader per group, and one global leader. This notebook shows who leads, what an
# exchange sends (by formula and in the compiled program), and what periods and groups do to the test error in a small
# experiment.
#
# **You will learn**
#
# - how to train with local and global leaders, and plot who leads,
# - how many bytes each method sends, before anything is run,
# - how broadcasts and wire formats change that, as seen in the compiled program,
# - what rare exchanges and small groups cost in test error.
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
from collections import Counter

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from IPython.display import Markdown
from jax.sharding import AxisType, PartitionSpec

from lsgd_jax import leader_pull
from lsgd_jax.costs import ledger
from lsgd_jax.costs.collectives import collectives
from lsgd_jax.data import BatchIndices, load
from lsgd_jax.exchange import sending
from lsgd_jax.figures.run import draw_members
from lsgd_jax.models import MODELS
from lsgd_jax.presets import PRESETS
from lsgd_jax.train.compile_ahead import parameter_shapes

# Simulate four CPU devices, for the compiled programs below. This must come before JAX initializes its devices.
jax.config.update("jax_num_cpu_devices", 4)
small = "LSGD_SMALL" in os.environ  # Small sizes, for tests: the text is about the full size.

# %% [markdown]
# ## Local and global leaders
#
# With groups, the workers are on two axes, with one `leader_pull` per level. Every `period` steps each group elects its
# local leader, and every `global_period` steps all workers elect the global leader, after the local pull. The example has
# 2 groups of 4 workers and a small dense network on MNIST-1D. As in the quickstart, `jax.vmap` maps one worker's step
# over the worker axes.

# %%
data = load("mnist1d")
build, _ = MODELS["mlp"]
graphdef, params = nnx.split(build(data.train_x.shape[1:], data.classes, rngs=nnx.Rngs(0)), nnx.Param)


def logits_of(params, x):
    return nnx.merge(graphdef, params)(x)


def train(groups, workers, pulls, steps, seeds=1, after_step=lambda params, state: None):
    """Parameters and state after SGD with `leader_pull`, for several orders of the data [seed, group, worker, ...]."""
    tx = optax.chain(optax.sgd(0.1, momentum=0.9, nesterov=True), *pulls)

    def step(params, state, x, y):
        def loss_fn(params):
            return optax.softmax_cross_entropy_with_integer_labels(logits_of(params, x), y).mean()

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    step = jax.jit(jax.vmap(jax.vmap(jax.vmap(step, axis_name="worker"), axis_name="group")))
    shape = (seeds, groups, workers)
    now = jax.tree.map(lambda x: jnp.broadcast_to(x, (*shape, *x.shape)), (params, tx.init(params)))
    orders = [
        BatchIndices(examples=len(data.train_x), workers=groups * workers, batch_size=32, sampling="shards", seed=seed)
        for seed in range(seeds)
    ]
    for t in range(steps):
        examples = np.stack([order(t) for order in orders]).reshape(*shape, -1)
        now = step(*now, data.train_x[examples], data.train_y[examples])
        after_step(*now)
    return now


pulls = [leader_pull(0.1, axis_name="worker", period=4), leader_pull(0.1, axis_name=("group", "worker"), period=16)]
local_leaders, global_leaders = [], []


def record_leaders(params, state):
    _, local_state, global_state = state
    local_leaders.append(local_state.leader.position[0, :, 0])  # [group], each within its group.
    global_leaders.append(global_state.leader.position[0, 0, 0])


train(2, 4, pulls, steps=160, after_step=record_leaders)
exchanges = np.arange(4, 161, 4)
local_indices = np.array(local_leaders)[exchanges - 1] + 4 * np.arange(2)  # Among all workers, [exchange, group].
figure, ax = plt.subplots(figsize=(11, 3))
draw_members(ax, exchanges, (local_indices[..., None] == np.arange(8)).any(1))
ax.plot(exchanges[3::4], np.array(global_leaders)[exchanges[3::4] - 1], "k*", markersize=11, label="global leader")
ax.axhline(3.5, color="0.8", linewidth=0.8)
ax.set_title("filled: local leader of workers 0 to 3, and of workers 4 to 7")
ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# The global leader always leads its own group, too, because both are elected by the same scores. So both of its pulls are
# zero. The leader changes often: scores are means of the last 10 training losses, and all workers learn about equally
# well.
#
# ## Bytes by formula
#
# `lsgd_jax.costs.ledger` computes what each worker sends before you run anything. `lsgd info --bytes mnist1d` prints the
# same table.

# %%
preset = PRESETS["mnist1d"]
shapes = parameter_shapes(preset)


def size_of(params):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))


print(f"{preset.groups} groups of {preset.workers} workers, {size_of(shapes):,} bytes of parameters\n")
print(ledger.table(preset, shapes))

# %% [markdown]
# LSGD and `quorum` exchange among 4 workers every 4 steps and among all 8 every 16; the other methods exchange among all 8
# every 4 steps. By default, a leader costs what an average costs, because it is sent by a masked all-reduce. So groups do
# not save bytes as such: LSGD's total is slightly higher than that of local SGD. They save what crosses between groups, which
# is sent every 16 steps instead of every 4.
#
# ## Bytes in the compiled program
#
# A formula can be wrong. `lsgd_jax.costs.collectives` extracts the collectives from the text of a compiled program. The
# example is one exchange among 2 groups of 2 workers, each on a device of its own, with 100,000 parameters |x|, for every
# broadcast and wire format.

# %%
mesh = jax.make_mesh((2, 2), ("group", "worker"), axis_types=(AxisType.Auto, AxisType.Auto))
spec = PartitionSpec("group", "worker")
x = jnp.ones((2, 2, 100_000))


def compiled(broadcast, wire=None):
    pulls = leader_pull(0.1, axis_name=("group", "worker"), period=4, sending=sending(wire, broadcast))

    def step(x, state, loss):
        x, state, loss = jax.tree.map(lambda a: a[0, 0], (x, state, loss))
        updates, state = pulls.update(jnp.zeros_like(x), state, x, value=loss)
        return jax.tree.map(lambda a: a[None, None], (x + updates, state))

    mapped = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec)
    state = jax.tree.map(lambda a: jnp.broadcast_to(a, (2, 2, *a.shape)), pulls.init(x[0, 0]))
    return collectives(jax.jit(mapped).lower(x, state, jnp.ones((2, 2))).compile().as_text())


def sent_per_worker(collective):
    if collective.senders is None:
        return collective.sent * collective.times
    # Of a chain of four workers only some links are used, for one of the four possible leaders.
    return collective.bytes * collective.senders / 4 * collective.times / 4


variants = {
    "all_reduce": {"broadcast": "all_reduce"},
    "ring": {"broadcast": "ring"},
    "chain": {"broadcast": "chain"},
    "hierarchical": {"broadcast": "hierarchical"},
    "all_reduce, bfloat16": {"broadcast": "all_reduce", "wire": "bfloat16"},
    "all_reduce, int8": {"broadcast": "all_reduce", "wire": "int8"},
}
rows = ["| exchange | collectives in the program | sent per worker / x | by formula |", "|---|---|---|---|"]
for name in ("chain", "hierarchical") if small else variants:
    options = variants[name]
    found = compiled(**options)
    assert all(each.conditional for each in found)  # Nothing is sent between exchanges.
    kinds = Counter()
    for each in found:
        kinds[each.kind] += each.times
    sent = sum(map(sent_per_worker, found)) / x[0, 0].nbytes
    config = preset.replace(groups=1, workers=4, **options)
    if name == "hierarchical":
        config = config.replace(groups=2, workers=2, period=4, global_period=4)
    by_formula = ledger.exchanges(config, jax.ShapeDtypeStruct(x[0, 0].shape, x.dtype))[-1].bytes_sent / x[0, 0].nbytes
    listed = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    rows.append(f"| {name} | {listed} | {sent:.4f} | {by_formula:.4f} |")
Markdown("\n".join(rows))

# %% [markdown]
# - The two all-reduces of a scalar are the election.
# - A masked all-reduce costs 2 (n - 1) / n of |x|, which is 1.5 with four workers: the cost of an average.
# - A ring passes 32 chunks from worker to worker, also over links where they are not needed. A chain omits those links,
#   and is compiled for every possible leader.
# - The hierarchical broadcast sends as much as the all-reduce here, but only its permutes cross between the groups: (32 +
#   2 - 2) / (32 * 2) of |x|, a half.
# - bfloat16 halves the bytes. int8 is a quarter, and one scale per block of 256 numbers.
#
# Fewer bytes take less time, though not in proportion, and what that means for training time depends on the link. The
# [communication benchmarks](../benchmarks/communication/README.md) have what has been measured over rate-limited links:
# bytes from the kernel's counters, times per exchange, and each method's time to a test error. The slower the link, the more
# rare exchanges gain over averaging at every step.
#
# ## Cost in test error
#
# Rare exchanges save bytes, and small groups save bytes between groups. Do they cost accuracy? The experiment has eight
# workers in one, two and four groups, with several periods, pulls of 0.1, and a global period of four periods. The center
# is the mean of all eight workers, and the best worker the one with the lowest score.

# %%
steps, seeds = (64, 1) if small else (400, 3)
group_counts, periods = ((2,), (16,)) if small else ((1, 2, 4), (4, 16, 64))


def test_errors(params):
    logits = jax.vmap(logits_of, (0, None))(params, data.test_x)
    return 100 * np.mean(np.argmax(logits, -1) != data.test_y, axis=1)


def errors_of(groups, period):
    """Test errors (%) of the center and of the best worker, one per seed."""
    pulls = [leader_pull(0.1, axis_name=("group", "worker"), period=period if groups == 1 else 4 * period)]
    if groups > 1:
        pulls.insert(0, leader_pull(0.1, axis_name="worker", period=period))
    params, state = train(groups, 8 // groups, pulls, steps, seeds)
    params = jax.tree.map(lambda x: x.reshape(seeds, 8, *x.shape[3:]), params)
    best = state[-1].score.reshape(seeds, 8).argmin(1)
    center = jax.tree.map(lambda x: x.mean(1), params)
    return test_errors(center), test_errors(jax.tree.map(lambda x: x[np.arange(seeds), best], params))


def sent_per_step(groups, period):
    config = preset.replace(groups=groups, workers=8 // groups, period=period)
    return sum(each.bytes_sent / each.period for each in ledger.exchanges(config, params)) / size_of(params)


figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
for groups in group_counts:
    centers, best = zip(*(errors_of(groups, period) for period in periods), strict=True)
    for ax, x in ((left, periods), (right, [sent_per_step(groups, period) for period in periods])):
        [line] = ax.semilogx(x, np.mean(centers, 1), ".-", label=f"{groups} x {8 // groups} workers: center")
        ax.semilogx(x, centers, "o", color=line.get_color(), markersize=3, alpha=0.4)
        ax.semilogx(x, np.mean(best, 1), "--", color=line.get_color(), linewidth=1, label="best worker")
left.set(xlabel="period", ylabel=f"test error (%), mean and {seeds} seeds")
left.set_xticks(periods, periods)
right.set(xlabel="sent per worker per step / x")
right.set_xticks([0.03, 0.1, 0.3], [0.03, 0.1, 0.3])
for ax in (left, right):
    ax.minorticks_off()
left.legend(fontsize=8)
plt.show()

# %% [markdown]
# - **With frequent exchanges, the center is much better than the best worker:** the mean of workers that are close
#   together is a model with less noise. With a period of 64 it is worse: with a pull of 0.1, the workers are then too far
#   apart for their mean to be a good model. [The notebook on the loss landscape](loss_landscape.ipynb) looks into this.
# - **Two groups of four do as well as one of eight.** Four groups of two do so only with a period of 4: the global
#   exchange, which keeps the groups together, is four times as rare.
#
# This is a small, untuned network that is not suited to these data. It shows what to look at, not which period is best.

# %% [markdown]
# ## Try this
#
# - Set the local pull of the first example to `1.0`: all workers of a group restart from its leader. Look at how often the
#   leader changes.
# - Set `period=16` for both pulls there: is the global leader still always one of the local leaders?
# - Look at the bytes of another preset, such as `PRESETS["cnn7-cifar10-4"]`: which method sends the least per step?
# - Add `{"broadcast": "chain", "wire": "int8"}` to `variants`: what is left of |x|?
# - Set both pulls of the last experiment to `0.5`: is the center still worse than the best worker with a period of 64?
