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
# # Asynchronous training and stragglers
#
# What happens to LSGD if some workers are slower than others? It depends on when an exchange is due, and on who waits.
# This notebook simulates it in virtual time, which is counted and not measured, so the results are the same on every
# machine. `lsgd simulate` does the same on the command line, and `lsgd train --asynchronous` trains asynchronously in
# real time.
#
# **You will learn**
#
# - how synchronous, joined and posted exchanges differ, and who waits for whom,
# - how to simulate a straggler and read timelines and staleness,
# - what waiting costs in time to a test error,
# - how to model throughput with thousands of workers.
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
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

from lsgd_jax.figures.simulation import draw_headlines, draw_staleness, draw_timeline, table, with_own_rate
from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate import SCHEDULES, SECOND, Cluster, event_log, throughput, totals
from lsgd_jax.simulate.training import Network, train_on
from lsgd_jax.train.compile_ahead import parameter_shapes

# %matplotlib inline
small = "LSGD_SMALL" in os.environ  # Small sizes, for tests: the text is about the full size.

# %% [markdown]
# ## Three ways to exchange
#
# | | an exchange is due | who waits |
# |---|---|---|
# | synchronous | after `period` steps of each worker | all, for the slowest, every time |
# | joined | when the steps of all n workers together reach the next multiple of n times `period`, whoever took them | all, until each has finished its current step |
# | posted | as for joined | nobody: each worker posts its score and parameters to a board, and is pulled towards the best post |
#
# Joined is the paper's Algorithm 1. In the example, the first of four workers has a quarter of the speed of the others,
# whose steps take 0.1 seconds. The period is 4:

# %%
config = PRESETS["digits"].replace(groups=1, workers=4, steps=24)
ways = ("lsgd", "lsgd-posted") if small else ("lsgd", "lsgd-joined", "lsgd-posted")
params = parameter_shapes(config)


def logs_of(names, config, cluster):
    return {name: event_log(SCHEDULES[name], with_own_rate(config, name), cluster, params) for name in names}


logs = logs_of(ways, config, Cluster(slow=((0, 4.0),)))
draw_timeline(logs, {})

# %% [markdown]
# - **Synchronous** (`lsgd`): three workers wait most of the time, for four steps of the slow one.
# - **Joined**: they wait for at most one of its steps, and it takes part in every exchange with fewer steps than the
#   others.
# - **Posted**: nobody waits. Each worker exchanges (red) at the end of a step of its own.
#
# The event logs of the first exchanges say the same:

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
# Eight workers train on scikit-learn's digits, the first at a tenth of the others' speed, until they have taken 96 steps
# each on average. For comparison: EASGD, in which each worker meets the center on its own clock, and data-parallel SGD.

# %%
workers, steps, target = 8, 16 if small else 96, 0.05
config = PRESETS["digits"].replace(groups=1, workers=workers, steps=steps, eval_every=4)
names = (*ways, "easgd") if small else (*ways, "easgd", "data_parallel")
network = Network(config)


def train(cluster):
    logs = logs_of(names, config, cluster)
    return logs, {
        name: train_on(log, SCHEDULES[name], with_own_rate(config, name), network) for name, log in logs.items()
    }


logs, histories = train(Cluster(slow=((0, 10.0),)))
draw_timeline({name: logs[name] for name in ways}, histories)

# %% [markdown]
# Stars mark the leaders. With posted exchanges, every worker has exchanges of its own, each with a leader. The slow
# worker, which has learned the least, hardly ever leads.

# %%
sums = {name: totals(log) for name, log in logs.items()}
columns = ("virtual_seconds", "efficiency", "waiting", "mean_staleness", "largest_staleness")
Markdown(table({name: {column: of.summary()[column] for column in columns} for name, of in sums.items()}))

# %% [markdown]
# Efficiency is the share of the workers' time that they spend computing. Staleness is the number of steps that the other
# workers have taken, on average, since a worker's last exchange. With synchronous exchanges it equals the period, and
# with joined ones it is slightly more. Most posted exchanges are as fresh, but the slow worker, which exchanges after
# each of its steps, sees posts that are ten steps ahead.

# %%
draw_staleness({name: sums[name] for name in ways})

# %% [markdown]
# What does this cost in test error? The figure shows it against virtual time (left) and steps (right).

# %%
draw_headlines(histories, config.task.headline, target)

# %% [markdown]
# Against steps, LSGD's three curves coincide: on this easy problem, staleness does no visible harm. Against time they
# differ by how long the workers wait. The table has the time to 5 % test error, with and without the straggler:

# %%
_, even = train(Cluster())


def reached(history):
    seconds = history.seconds_to(target)
    return "not reached" if seconds is None else f"{seconds:.1f}"


rows = ["| method | equal speeds | one worker at a tenth |", "|---|---|---|"]
rows += [f"| {name} | {reached(even[name])} | {reached(histories[name])} |" for name in names]
Markdown("Virtual seconds to 5 % test error, one seed:\n\n" + "\n".join(rows))

# %% [markdown]
# Synchronous training is as slow as the straggler. Joined LSGD takes about twice as long as without it. Posted LSGD takes
# about as long as without it: seven of eight workers continue as if it were not there. One seed of an easy problem shows
# no more than that; in the [committed results](../benchmarks/asynchronous/results/stragglers.md), step times also vary at
# random.
#
# ## Scaling to thousands of workers
#
# Without training, the simulator models costs for up to 100,000 workers. The question is what share of their time the
# workers compute. This is a model with assumptions, not a measurement: machines with 8 GPUs, one group per machine, 2.4
# Tbit/s per GPU within a machine and 12.5 Gbit/s per GPU between machines, steps of 0.5 s that vary by a tenth, 100
# million parameters, and one server per 8 workers.

# %%
sizes = (8, 64) if small else (8, 64, 512, 4096)
model = jax.ShapeDtypeStruct((100_000_000,), np.float32)


def share_computing(name, size, per_server):
    config = PRESETS["digits"].replace(groups=size // 8, workers=8, steps=64, period=4)
    if SCHEDULES[name].method != "lsgd":
        config = config.replace(period=16)  # LSGD exchanges with all workers every 16 steps.
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
    ax.set(title=f"one server per {per_server} workers", xlabel="workers", ylim=(0, 102))
axes[0].set_ylabel("efficiency: share of time computing (%)")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# Within one machine, all methods compute most of the time. With more machines the slow links dominate, and the shares
# hardly depend on the number of workers any more: synchronous and joined LSGD use collectives, whose bytes per worker
# stay constant. The throughput of a board or a center depends on the number of servers; if there are few, workers queue
# for them. Posted LSGD suffers most, because each worker reads the board every 4 steps, over the slow links. The
# committed results for other assumptions are in [benchmarks/asynchronous/results](../benchmarks/asynchronous/results).

# %% [markdown]
# ## Try this
#
# - Make the straggler harmless: set its factor in `Cluster(slow=((0, 10.0),))` to `2.0`. Is joined LSGD still behind posted?
# - Slow down half of the workers, `slow=tuple((i, 4.0) for i in range(4))`: who leads then, and how stale are the posts?
# - Let step times vary at random, `Cluster(variation="lognormal", sigma=0.5)`: how long do synchronous workers wait though
#   none of them is slow on average?
# - In the model of throughput, set `global_bandwidth=1e11`: from how many workers on do servers matter?
