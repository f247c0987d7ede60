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
# exchange sends (by formula, in the compiled program and as measured), and what periods and groups do to the test error
# in a small experiment.

# %%
try:
    from lsgd_jax import leader_pull
except ModuleNotFoundError:
    raise SystemExit("Install the package first: run `pip install .` in the repository's folder.") from None

import dataclasses
import json
import os
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from IPython.display import Markdown
from jax.sharding import AxisType, PartitionSpec

from lsgd_jax.costs import ledger
from lsgd_jax.costs.collectives import collectives
from lsgd_jax.data import BatchIndices, load
from lsgd_jax.exchange import sending
from lsgd_jax.models import MODELS
from lsgd_jax.presets import PRESETS
from lsgd_jax.train.compile_ahead import parameter_shapes

# The CPU acts as four devices, for the compiled programs below. It has to be said before JAX is used.
jax.config.update("jax_num_cpu_devices", 4)
small = "LSGD_SMALL" in os.environ  # So that the tests are quick; all that is said of the results is of full size.

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


def note_leaders(params, state):
    _, local, of_all = state
    local_leaders.append(local.leader.position[0, :, 0])
    global_leaders.append(of_all.leader.position[0, 0, 0])


train(2, 4, pulls, steps=160, after_step=note_leaders)
exchanges = np.arange(3, 160, 4)
figure, ax = plt.subplots(figsize=(11, 3))
for group, color in enumerate(["tab:blue", "tab:orange"]):
    leads = 4 * group + np.array(local_leaders)[exchanges, group]
    ax.plot(exchanges + 1, leads, ".", color=color, markersize=8, label=f"leads group {group}")
of_all = exchanges[3::4]
ax.plot(of_all + 1, np.array(global_leaders)[of_all], "k*", markersize=11, label="leads all")
ax.axhline(3.5, color="0.8", linewidth=0.8)
ax.set(xlabel="step", ylabel="worker", yticks=range(8))
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
size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
print(f"{preset.groups} groups of {preset.workers} workers, {size:,} bytes of parameters\n")
print(ledger.table(preset, shapes))

# %% [markdown]
# LSGD exchanges among 4 workers every 4 steps and among all 8 every 16; the other methods exchange among all 8 every 4
# steps. By default, a leader costs what an average costs, because it is sent by a masked all-reduce. So groups do not
# save bytes as such: LSGD's total is slightly higher. They save what crosses between groups, which is sent every 16 steps
# instead of every 4.
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


def sent_by_a_worker(each):
    if each.senders is None:
        return each.sent * each.times
    # Some links of a chain of four workers, for one of the four who may lead.
    return each.bytes * each.senders / 4 * each.times / 4


ways = {
    "all_reduce": {"broadcast": "all_reduce"},
    "ring": {"broadcast": "ring"},
    "chain": {"broadcast": "chain"},
    "hierarchical": {"broadcast": "hierarchical"},
    "all_reduce, bfloat16": {"broadcast": "all_reduce", "wire": "bfloat16"},
    "all_reduce, int8": {"broadcast": "all_reduce", "wire": "int8"},
    "all_reduce, delay 1": {"broadcast": "all_reduce", "delay": 1},
}
rows = ["| way | collectives in the program | sent by a worker / x | by the ledger |", "|---|---|---|---|"]
for way, options in list(ways.items())[: 4 if small else None]:
    found = compiled(**options)
    assert all(each.conditional for each in found)  # Nothing is sent between exchanges.
    kinds = Counter()
    for each in found:
        kinds[each.kind] += each.times
    sent = sum(map(sent_by_a_worker, found)) / x[0, 0].nbytes
    config = dataclasses.replace(preset, groups=1, workers=4, **options)
    if way == "hierarchical":
        config = dataclasses.replace(config, groups=2, workers=2, period=4, global_period=4)
    by_formula = ledger.exchanges(config, jax.ShapeDtypeStruct(x[0, 0].shape, x.dtype))[-1].bytes_sent / x[0, 0].nbytes
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    rows.append(f"| {way} | {told} | {sent:.4f} | {by_formula:.4f} |")
Markdown("\n".join(rows))

# %% [markdown]
# - The two all-reduces of a scalar are the election.
# - A masked all-reduce costs 2 (n - 1) / n of |x|, which is 1.5 with four workers: the cost of an average.
# - A ring passes 32 chunks from worker to worker, also over links where they are not needed. A chain omits those links,
#   and is compiled for every possible leader.
# - The hierarchical broadcast sends as much as the all-reduce here, but only its permutes cross between the groups: (32 +
#   2 - 2) / (32 * 2) of |x|, a half.
# - bfloat16 halves the bytes. int8 is a quarter, and one scale per block of 256 numbers. A delay changes when a leader is
#   used, not what is sent.
#
# ## Measured bytes and times
#
# The committed measurements for 8 workers with one link of 200 Mbit/s each and 10 MB of parameters: bytes from the
# kernel's counters, and time relative to an average.

# %%
folder = next(
    p for p in (Path("benchmarks/communication/results"), Path("../benchmarks/communication/results")) if p.exists()
)
cells = json.loads((folder / "exchanges.json").read_text())["cells"]
[cell] = [c for c in cells if (c["processes"], c["megabits"], c["parameters"]) == (8, 200, 2_500_000)]
taken = {
    way: (np.mean(of["bytes"]) / 1e7, np.median(of["seconds"]) / np.median(cell["ways"]["average"]["seconds"]))
    for way, of in cell["ways"].items()
}
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.5), sharey=True)
for ax, values, title in zip(
    (left, right), zip(*taken.values(), strict=True), ("sent by a worker / x", "time / an average's"), strict=True
):
    ax.bar_label(ax.barh(list(taken), values, color="tab:blue"), fmt="{:.2f}", padding=2, fontsize=8)
    ax.set(title=title, xlim=(0, 1.2 * max(values)))
left.invert_yaxis()
plt.show()

# %% [markdown]
# Fewer bytes take less time, though not in proportion, with one exception: the hierarchical broadcast is slow among so
# few workers on equal links. It is for links between groups that are slower than those within.
#
# What this means for training time depends on the link. The figure shows each method's wall-clock time to 8 % test error,
# relative to data-parallel SGD:

# %%
measured = json.loads((folder / "constrained.json").read_text())


def seconds_to(target, course):
    return next((s for s, e in zip(course["seconds"], course["center_error"], strict=True) if e <= target), np.nan)


figure, ax = plt.subplots(figsize=(9, 4))
names = list(measured["links"]["200"])
for offset, (megabits, histories) in enumerate(measured["links"].items()):
    times = np.array([seconds_to(measured["target"], histories[name]) for name in names])
    ax.barh(
        np.arange(len(names)) + 0.27 * (offset - 1),
        times / times[names.index("data parallel")],
        0.25,
        label=f"{megabits} Mbit/s",
    )
ax.set(yticks=range(len(names)), yticklabels=names, xlabel=f"time to {measured['target']:.0%}, data parallel = 1")
ax.invert_yaxis()
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# The slower the link, the more rare exchanges gain over averaging at every step. Among the methods that exchange rarely,
# local SGD gains more than LSGD at equal bytes (its period 32). The settings are described under [communication
# benchmarks](../benchmarks/communication/README.md#wall-clock-time-over-limited-links).
#
# ## Cost in test error
#
# Rare exchanges save bytes, and small groups save bytes between groups. Do they cost accuracy? The experiment has eight
# workers in one, two and four groups, with several periods, pulls of 0.1, and a global period of four periods. The center
# is the mean of all eight workers, and the best worker the one with the lowest score.

# %%
steps, seeds = (64, 1) if small else (400, 3)
periods = (16,) if small else (4, 16, 64)


def test_errors(params):
    logits = jax.vmap(logits_of, (0, None))(params, data.test_x)
    return 100 * np.mean(np.argmax(logits, -1) != data.test_y, axis=1)


shown = {}
for groups in (1, 2) if small else (1, 2, 4):
    for period in periods:
        everyone = ("group", "worker")
        if groups == 1:
            pulls = [leader_pull(0.1, axis_name=everyone, period=period)]
        else:
            pulls = [
                leader_pull(0.1, axis_name="worker", period=period),
                leader_pull(0.1, axis_name=everyone, period=4 * period),
            ]
        of_workers, state = train(groups, 8 // groups, pulls, steps, seeds)
        flat = jax.tree.map(lambda x: x.reshape(seeds, 8, *x.shape[3:]), of_workers)
        best = state[-1].score.reshape(seeds, 8).argmin(1)
        center, leader = (
            jax.tree.map(lambda x: x.mean(1), flat),
            jax.tree.map(lambda x: x[np.arange(seeds), best], flat),
        )
        config = dataclasses.replace(preset, groups=groups, workers=8 // groups, period=period)
        sent = sum(each.bytes_sent / each.period for each in ledger.exchanges(config, params))
        sent /= sum(x.nbytes for x in jax.tree.leaves(params))
        shown[groups, period] = sent, test_errors(center), test_errors(leader).mean()

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
for groups in dict.fromkeys(groups for groups, _ in shown):
    sent, centers, leaders = zip(*(shown[groups, period] for period in periods), strict=True)
    for ax, at in ((left, periods), (right, sent)):
        [line] = ax.semilogx(at, np.mean(centers, 1), ".-", label=f"{groups} x {8 // groups} workers: center")
        ax.semilogx(at, leaders, "--", color=line.get_color(), linewidth=1, label="and best worker")
        ax.semilogx(at, centers, "o", color=line.get_color(), markersize=3, alpha=0.4)
    left.set(xlabel="period", ylabel=f"test error (%), {seeds} seeds and their mean")
left.set_xticks(periods, periods)
left.minorticks_off()
right.set(xlabel="sent by a worker in a step / x")
right.minorticks_off()
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
