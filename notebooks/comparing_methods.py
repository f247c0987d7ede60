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
# ## One loop for all methods
#
# The problem is a noisy quadratic with eigenvalues from 0.5 to 5, with eight workers and plain SGD. The figure shows how
# far above the minimum each method's evaluated model is after every step.

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
# With a constant learning rate, each method ends on a noise floor of its own. A single worker, the best of the
# independent ones, has the highest. Averaging over eight workers lowers the floor about sixfold, whether it averages
# gradients, parameters or pulled workers: on a problem with one minimum and exact losses to elect by, a leader is as good
# a target as a mean. EASGD's center also averages over time: it is slow at first and then the lowest. DiLoCo's outer
# momentum amplifies the noise. MGRAWA and LGRAWA coincide here, because the parameters are one array.

# %% [markdown]
# ## On a network, with tuning and several seeds
#
# `lsgd compare` does this, and plots test error against steps, bytes and wall-clock time. These are the committed results
# of
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
