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
# # Comparing methods
#
# LSGD and the methods it is compared with have the same interface: `build(optimizer, axis_name=..., ...)` returns a
# gradient transformation, and `center(params, state, axis_name)` returns the model that the method reports, its
# *evaluated model*. So one training loop works for all of them.
#
# **You will learn**
#
# - which methods there are, and which options each of them has,
# - how to train all of them in one loop,
# - how they differ on a noisy quadratic, and why.
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
import inspect
import os

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from lsgd_jax.figures.palette import look
from lsgd_jax.methods import METHODS
from lsgd_jax.paper.objectives import quadratic

small = "LSGD_SMALL" in os.environ  # Small sizes, for tests: the text is about the full size.
for name, method in METHODS.items():
    options = list(inspect.signature(method.build).parameters)[2:]
    print(f"{name:17} exchanges by {method.exchanges:7} options: {', '.join(options) or 'none'}")

# %% [markdown]
# ## One loop for all methods
#
# The problem is a noisy quadratic with eigenvalues from 0.5 to 5, with eight workers and plain SGD. The figure shows how
# far above the minimum each method's evaluated model is after every step.

# %%
problem = quadratic(jax.random.key(0), 20, strong_convexity=0.5, smoothness=5.0, noise=1.0)
workers, steps, runs, eta = 8, 300, 20, 0.05


def train(name, key):
    options = {"period": 4} if METHODS[name].exchanges == "period" else {}
    # DOWNPOUR adds up the workers' updates: divide the learning rate by the number of workers.
    rate = eta / workers if METHODS[name].adds_up else eta
    tx = METHODS[name].build(optax.sgd(rate), axis_name="worker", **options)

    def worker(key):
        x = problem.minimizer + 3.0

        def step(carry, now):
            x, state = carry
            t, key = now
            grad = problem.gradient(x, key)
            updates, state = tx.update(grad, state, x, value=problem.value(x), step=t)
            x = optax.apply_updates(x, updates)
            return (x, state), problem.value(METHODS[name].center(x, state, "worker"))

        return jax.lax.scan(step, (x, tx.init(x)), (np.arange(steps), jax.random.split(key, steps)))[1]

    return jax.vmap(worker, axis_name="worker")(jax.random.split(key, workers))[0]


plt.figure(figsize=(9, 4.5))
for name in ("lsgd", "downpour", "independent") if small else METHODS:
    values = jax.jit(jax.vmap(lambda key, name=name: train(name, key)))(jax.random.split(jax.random.key(1), runs))
    plt.semilogy(np.median(values, axis=0), linewidth=1, **look(name).line)
plt.xlabel("local steps")
plt.ylabel(f"f(evaluated model), median of {runs} runs")
plt.legend(ncols=3, fontsize=8)
plt.show()

# %% [markdown]
# With a constant learning rate, each method ends on a noise floor of its own. A single worker, the best of the
# independent ones, has the highest. Averaging over eight workers lowers the floor about sixfold, whether it averages
# gradients, parameters or pulled workers: on a problem with one minimum and exact losses to elect by, a leader is as good
# a target as a mean. EASGD's center also averages over time: it is slow at first and then the lowest. DiLoCo's outer
# momentum amplifies the noise. The quorum's, of 0.3, makes it the fastest at first, and costs little on the floor. MGRAWA and
# LGRAWA coincide here, because the parameters are one array.
#
# ## On a network, with tuning and several seeds
#
# `lsgd compare` does this, and plots test error against steps, bytes and wall-clock time:
#
#     lsgd compare mnist1d --groups 1 --methods lsgd,easgd,local_sgd --seeds 0..4 --tune
#
# The [committed results](../benchmarks/paper/README.md#all-methods-on-mnist-1d) have all methods on MNIST-1D, on equal
# tuning budgets. [Your own task](own_task.ipynb) compares methods on data of your own, and [quorum averaging](quorum.ipynb)
# with a worker whose labels are random.

# %% [markdown]
# ## Try this
#
# - Set `noise=0.0`: without noise, which methods still differ, and by what?
# - Set the option `period` to `1` and to `64`: whose floor rises with rarer exchanges?
# - Set `smoothness=50.0` and `eta` to `0.03`: DOWNPOUR and DiLoCo take longer steps than the others. Do they diverge first?
# - Halve `eta` from step 150 on, by `optax.piecewise_constant_schedule(rate, {150: 0.5})` in place of `rate`: by how much
#   does each floor fall?
