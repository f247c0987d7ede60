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
# # Workers at their own speed
#
# What becomes of LSGD when some workers are slower than others? It depends on when an exchange is due, and on who waits.
# Everything here happens in virtual time, which is counted and not measured, so that it is the same on every machine.
# `lsgd simulate` does the same from the command line, and `lsgd train --asynchronous` in real time.

# %%
try:
    from lsgd_jax.simulate import SCHEDULES, SECOND, Cluster, event_log, throughput, totals
except ModuleNotFoundError:
    raise SystemExit("Install the package first: run `pip install .` in the repository's folder.") from None

import dataclasses
import os

import jax
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

from lsgd_jax.figures.simulation import draw_headlines, draw_staleness, draw_timeline, table, with_own_rate
from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate.training import Network, train_on
from lsgd_jax.train.compile_ahead import parameter_shapes

# %matplotlib inline
small = "LSGD_SMALL" in os.environ  # So that the tests are quick; all that is said of the pictures is of full size.

# %% [markdown]
# ## Three ways to exchange
#
# | | an exchange is due | who waits |
# |---|---|---|
# | in step | for each worker after `period` steps of its own | all, for the slowest, every time |
# | joined | when the steps of all n workers together reach the next multiple of n times `period`, whoever took them | all, until each has finished the step that it is at |
# | posted | as for joined | nobody: each worker puts its score and parameters on a board, and is drawn to the best that lies there |
#
# Joined is the paper's Algorithm 1. Four workers, the first of them at a quarter of the others' speed, a step of the others 0.1
# seconds, period 4:

# %%
config = dataclasses.replace(PRESETS["digits"], groups=1, workers=4, steps=24)
ways = ("lsgd", "lsgd-joined", "lsgd-posted")
params = parameter_shapes(config)


def logs_of(names, config, cluster):
    return {name: event_log(SCHEDULES[name], with_own_rate(config, name), cluster, params) for name in names}


logs = logs_of(ways, config, Cluster(slow=((0, 4.0),)))
draw_timeline(logs, {})

# %% [markdown]
# In step, three workers wait most of the time: for four steps of the slow one. Joined, they wait for one of its steps at most, and it
# takes part in every exchange with fewer steps than they. Posted, nobody waits: an exchange (red) comes to each worker at the end of a step
# of its own. Here is what the event logs say of the first exchanges:

# %%
for name, log in logs.items():
    first = next(event for event in log.events if event.kind == "exchange")
    waits = ", ".join(
        f"{worker} since {begun / SECOND:.1f}" for worker, begun in zip(first.workers, first.begun, strict=True)
    )
    print(f"{name:12} first exchange at {first.time / SECOND:.1f} s; workers that wait: {waits}")

# %% [markdown]
# ## A straggler at a tenth of the speed
#
# Eight workers train on scikit-learn's digits, the first at a tenth of the others' speed, until they have taken 96 steps each
# on average. EASGD, in which each worker meets the centre on its own clock, and data-parallel SGD stand beside.

# %%
workers, steps, target = 8, 16 if small else 96, 0.05
config = dataclasses.replace(PRESETS["digits"], groups=1, workers=workers, steps=steps, eval_every=4)
names = (*ways, "easgd", "data_parallel")
network = Network(config)


def train(cluster):
    logs = logs_of(names, config, cluster)
    return logs, {
        name: train_on(log, SCHEDULES[name], with_own_rate(config, name), network) for name, log in logs.items()
    }


logs, histories = train(Cluster(slow=((0, 10.0),)))
draw_timeline({name: logs[name] for name in ways}, histories)

# %% [markdown]
# Stars tell who led. Posted, every worker has exchanges of its own, and each its leader. The slow worker, who has learned least, hardly
# ever leads.

# %%
sums = {name: totals(log) for name, log in logs.items()}
columns = ("virtual_seconds", "efficiency", "waiting", "mean_staleness", "largest_staleness")
Markdown(table({name: {column: of.summary()[column] for column in columns} for name, of in sums.items()}))

# %% [markdown]
# Efficiency is the share of the workers' time in which they compute. Staleness is how many steps a worker's partners have taken, on
# average, since its last exchange: in step it is the period. Joined, it is little more. Posted, most exchanges are as fresh, but the
# slow worker, who has one after each of its steps, meets posts that are ten steps further on.

# %%
draw_staleness({name: sums[name] for name in ways})

# %% [markdown]
# What does it cost in error? On the left against virtual time, on the right against steps.

# %%
draw_headlines(histories, config.task.headline, target)

# %% [markdown]
# Against steps LSGD's three curves lie together: on this easy problem staleness does no harm that could be seen. Against time they part by
# how long workers wait. Here is when each gets to 5 % test error, with and without the straggler:

# %%
_, even = train(Cluster())


def reached(course):
    seconds = course.seconds_to(target)
    return "not reached" if seconds is None else f"{seconds:.1f}"


rows = ["| method | all alike | one at a tenth |", "|---|---|---|"]
rows += [f"| {name} | {reached(even[name])} | {reached(histories[name])} |" for name in names]
Markdown("virtual seconds to 5 % test error, one seed\n\n" + "\n".join(rows))

# %% [markdown]
# In step, everybody is as slow as the straggler. Joined, LSGD takes about twice as long as without it, and posted about as long: seven of
# eight workers go on as if it were not there. One seed of an easy problem says no more; in the
# [committed results](../benchmarks/asynchronous/results/stragglers.md) steps vary at random, too.
#
# ## Very many workers
#
# Without training, costs alone can be told for up to 100,000 workers. The question is which share of their time the workers
# compute. It is a model with assumptions, not a measurement: here machines with 8 GPUs each, a group a machine, 2.4 Tbit/s a GPU
# within a machine and 12.5 Gbit/s a GPU between machines, steps of 0.5 s that vary by a tenth, 100 million parameters, and a
# server for every 8 workers.

# %%
sizes = (8, 64) if small else (8, 64, 512, 4096)
model = jax.ShapeDtypeStruct((100_000_000,), np.float32)


def share_computing(name, size, per_server):
    config = dataclasses.replace(PRESETS["digits"], groups=size // 8, workers=8, steps=64, period=4)
    if SCHEDULES[name].method != "lsgd":
        config = dataclasses.replace(config, period=16)  # As often as LSGD's workers exchange with all others.
    cluster = Cluster(
        step_seconds=0.5,
        variation="lognormal",
        sigma=0.1,
        local_bandwidth=2.4e12,
        global_bandwidth=1.25e10,
        servers=max(size // per_server, 1),
    )
    return throughput(SCHEDULES[name], with_own_rate(config, name), cluster, model).efficiency


figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
for ax, per_server in zip(axes, (8, 64), strict=True):
    for name in names:
        ax.semilogx(sizes, [100 * share_computing(name, size, per_server) for size in sizes], ".-", label=name)
    ax.set(title=f"a server for every {per_server} workers", xlabel="workers", ylim=(0, 102))
axes[0].set_ylabel("share of time computing (%)")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# Within one machine all compute most of the time. From more than one on, the slow links count, and the shares hardly depend on the number of
# workers any more: the exchanges of LSGD in step and joined are collectives, whose bytes a worker stay what they are. What machines with a
# board or a centre serve depends on how many of them there are; with few, workers queue for them. Posted LSGD suffers most: each worker
# asks the board every 4 steps, behind the slow links. The committed results for other assumptions are in
# [benchmarks/asynchronous/results](../benchmarks/asynchronous/results).
