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
# LSGD and the methods it is compared with have one shape: `build(optimizer, axis_name=..., ...)` makes a gradient
# transformation, and `center(params, state, axis_name)` says which model the method reports. So one loop trains them all.

# %%
try:
    from lsgd_jax.methods import METHODS
except ModuleNotFoundError:
    raise SystemExit("Install the package first: run `pip install .` in the repository's folder.") from None

import inspect
import json
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from lsgd_jax.paper.objectives import quadratic

for name, method in METHODS.items():
    options = list(inspect.signature(method.build).parameters)[2:]
    print(f"{name:14} exchanges by {method.exchanges:7} options: {', '.join(options) or 'none'}")

# %% [markdown]
# ## One loop for all
#
# A noisy quadratic with eigenvalues from 0.5 to 5, eight workers, plain SGD: how far above the minimum the model is that
# each method reports, after every step.

# %%
problem = quadratic(jax.random.key(0), 20, strong_convexity=0.5, smoothness=5.0, noise=1.0)
workers, steps, eta = 8, 300, 0.05


def train(name, key):
    options = {"period": 4} if METHODS[name].exchanges == "period" else {}
    # DOWNPOUR adds the workers' steps up, so that together they go as far as the others only if each goes an eighth.
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
for name in METHODS:
    values = jax.jit(jax.vmap(lambda key, name=name: train(name, key)))(jax.random.split(jax.random.key(1), 20))
    plt.semilogy(np.median(values, axis=0), label=name, linewidth=1)
plt.xlabel("local steps")
plt.ylabel("f(center), median of 20 runs")
plt.legend(ncols=3, fontsize=8)
plt.show()

# %% [markdown]
# Constant learning rates leave each method on a floor of its own. A single worker, the best of the independent ones, stays
# highest. What is averaged over eight workers lies about six times lower, whether gradients, parameters or pulled
# workers are averaged; on a problem with one minimum and exact losses to elect by, a leader is as good a point to be
# drawn to as a mean. EASGD's centre averages over time, too: it is late and then lowest. DiLoCo's outer momentum amplifies
# the noise. The parameters here are one array, so that the two GRAWAs are the same method.

# %% [markdown]
# ## On a network, with tuning and several seeds
#
# `lsgd compare` does that, and draws test error against steps, bytes and wall-clock. These are the committed results of
#
#     lsgd compare mnist1d --groups 1 --workers 4 --steps 2000 --eval-every 50 --tune --seeds 0..4

# %%
folder = next(p for p in (Path("benchmarks/paper/results"), Path("../benchmarks/paper/results")) if p.exists())
summary = json.loads((folder / "mnist1d-4" / "comparison.json").read_text())
for name, of in summary["methods"].items():
    error = of["final_error"]
    print(
        f"{name:14} final test error: median {error['median']:.2%}, mean {error['mean']:.2%} ± {error['half_width']:.2%}"
    )
