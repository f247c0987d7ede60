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
# # Quorum averaging: between LSGD and DiLoCo
#
# LSGD follows one worker, local SGD averages all of them. Quorum averaging is in between: it averages the workers whose
# recent training losses are near the lowest, the *quorum*, and moves a *center* towards that average. A worker whose data
# or hardware is broken is left out, without anybody having to know which one it is.
#
# **You will learn**
#
# - the rule, and the three numbers that make LSGD, local SGD and DiLoCo special cases of it,
# - how to check these special cases yourself,
# - how these methods train when the labels of one worker are random,
# - how to see who was in the quorum at each exchange.
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
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

from lsgd_jax.figures.palette import look
from lsgd_jax.figures.run import draw_members
from lsgd_jax.methods import METHODS
from lsgd_jax.paper.objectives import quadratic
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import train_and_evaluate

jax.config.update("jax_num_cpu_devices", 8)  # Simulate a CPU device per worker.
small = "LSGD_SMALL" in os.environ  # Small sizes, for tests: the text is about the full size.

# %% [markdown]
# ## The rule
#
# Every `period` steps, each worker $i$ has parameters $x^i$ and a score $s^i$, the mean of its last training losses. Let
# $s_{\min}$ be the lowest score and $s_{\mathrm{med}}$ the median (of an even number, the upper one). The quorum and its
# average are
#
# $$
# Q = \{i : s^i \le s_{\min} + \kappa \, (s_{\mathrm{med}} - s_{\min})\}, \qquad A = \frac{1}{|Q|} \sum_{i \in Q} x^i .
# $$
#
# So the distance of the median from the best worker is the unit in which $\kappa$ measures who is too far off. Half of the
# workers may be arbitrarily bad without moving that unit. Then an *outer step* with learning rate $\eta$ and Nesterov
# momentum $\mu$ moves the center $c$ towards the average, and each worker is pulled towards the center:
#
# $$
# v \leftarrow \mu v + (A - c), \qquad c \leftarrow c + \eta \, (A - c + \mu v), \qquad
# x^i \leftarrow x^i - \mathit{pull} \, (x^i - c) .
# $$


# %%
def in_quorum(scores, kappa):
    """Return whether each worker is in the quorum; scores [..., worker]."""
    lowest = np.min(scores, axis=-1, keepdims=True)
    median = np.sort(scores, axis=-1)[..., scores.shape[-1] // 2, None]
    return scores - lowest <= kappa * (median - lowest)


scores = np.array([0.30, 0.33, 0.34, 0.36, 0.47, 2.30])
print("scores      ", *scores)
for kappa in (0.0, 1.0, 3.0, np.inf):
    print(f"kappa = {kappa:<4} ", *("in  " if member else "-   " for member in in_quorum(scores, kappa)))

# %% [markdown]
# The worker with a score of 2.30 guesses. With $\kappa = 3$, the default, the worker with a score of 0.47 is just in: it is 0.17
# above the best, and the median 0.06.
#
# ## Three numbers, one family
#
# | | $\kappa$ | $\eta$ | $\mu$ |
# |---|---|---|---|
# | LSGD: the quorum is the leader | 0 | 1 | 0 |
# | local SGD: the quorum is everybody | $\infty$ | 1 | 0 |
# | DiLoCo: everybody, with an outer step | $\infty$ | 0.7 | 0.9 |
# | quorum averaging, by default | 3 | 1 | 0.3 |
#
# Without an outer step, $\mu = 0$ and $\eta = 1$, the center is the average itself. The cell trains the first three by their
# own implementations and as a quorum, on a noisy quadratic with four workers, and compares all parameters after 100 steps.

# %%
problem = quadratic(jax.random.key(0), 20, strong_convexity=0.5, smoothness=5.0, noise=1.0)
workers = 4


def trained(tx):
    """Train for 100 steps; returns the parameters of all workers, [worker, ...]."""

    def step(carry, key):
        x, state = carry
        updates, state = tx.update(problem.gradient(x, key), state, x, value=problem.value(x))
        return (optax.apply_updates(x, updates), state), None

    def train(key):
        x = problem.minimizer + 3.0
        return jax.lax.scan(step, (x, tx.init(x)), jax.random.split(key, 100))[0][0]

    return jax.jit(jax.vmap(train, axis_name="worker"))(jax.random.split(jax.random.key(1), workers))


FAMILY = {
    "lsgd": {"kappa": 0.0, "outer_learning_rate": 1.0, "outer_momentum": 0.0, "pull": 0.1},
    "local_sgd": {"kappa": np.inf, "outer_learning_rate": 1.0, "outer_momentum": 0.0},
    "diloco": {"kappa": np.inf, "outer_learning_rate": 0.7, "outer_momentum": 0.9},
}
for name in ("lsgd",) if small else FAMILY:
    own, as_quorum = (
        trained(METHODS[method].build(optax.sgd(0.05), axis_name="worker", period=4, **options))
        for method, options in ((name, {}), ("quorum", FAMILY[name]))
    )
    print(f"{look(name).name:10} largest difference to the quorum: {np.abs(own - as_quorum).max():g}")

# %% [markdown]
# They are the same to the bit, as long as no two workers share the lowest score: LSGD then follows the first of them, and the
# quorum their mean.
#
# ## One worker with random labels
#
# Eight workers train a small convolutional network on MNIST-1D, and the labels of the last one are random
# (`corrupt_workers=1`, with `corruption="labels"`, its default). All methods have the same initialization, data, learning
# rate and period, and otherwise their defaults; nothing is tuned. The control is a quorum of all workers, by an infinite
# $\kappa$: it has the same outer step, and leaves nobody out.

# %%
size = {"workers": 8, "width": 0.5, "steps": 480, "eval_every": 16}
if small:
    size = {"workers": 4, "width": 0.125, "steps": 16, "eval_every": 16}
config = PRESETS["mnist1d"].replace(groups=1, period=8, corrupt_workers=1, checkpoint_every=0, **size)
runs = {"quorum": {"method": "quorum"}}
if not small:
    runs["quorum of all workers"] = {"method": "quorum", "kappa": np.inf}
    runs |= {look(method).name: {"method": method} for method in ("lsgd", "local_sgd", "diloco")}
folder = Path(tempfile.mkdtemp())
for name, options in runs.items():
    error = train_and_evaluate(config.replace(**options), folder / name, lines=False)
    print(f"{name:21} test error {error:.1%}")

# %%
plt.figure(figsize=(9, 4))
for name, options in runs.items():
    evaluations = read_metrics(folder / name, "evaluation")
    errors = [100 * entry["center_error"] for entry in evaluations]
    line = look(options["method"]).line | {"label": name}
    if "kappa" in options:
        line["linestyle"] = ":"
    plt.plot([entry["step"] for entry in evaluations], errors, **line)
plt.xlabel("local steps")
plt.ylabel("test error of the evaluated model (%)")
plt.title(f"{config.workers} workers, one with random labels; one seed")
plt.legend()
plt.show()

# %% [markdown]
# ## Who is in the quorum
#
# A run logs all scores at each exchange. The rule, applied to them, gives the members.

# %%
exchanges = read_metrics(folder / "quorum", "exchange")
steps = np.array([entry["step"] for entry in exchanges])
scores = np.array([np.ravel(entry["scores"]) for entry in exchanges])
members = in_quorum(scores, config.replace(method="quorum").options["kappa"])

figure, (upper, lower) = plt.subplots(2, 1, figsize=(9, 5.5), sharex=True, layout="constrained")
upper.plot(steps, scores[:, :-1], color="0.5", linewidth=0.8, label=["clean workers"] + [None] * (config.workers - 2))
upper.plot(steps, scores[:, -1], color="black", linewidth=1.2, label="worker with random labels")
upper.set(ylabel="score: recent training loss")
upper.legend()
draw_members(lower, steps, members)
lower.set(ylabel="worker (7: random labels)")
plt.show()
print("share of exchanges in the quorum, by worker:", *(f"{share:.0%}" for share in members.mean(0)))

# %% [markdown]
# The worker with random labels is in no quorum, and each of the others in nearly all. At each exchange it restarts from the
# center, which is confident about the true labels, so its loss rises far above that of a guess, $\ln 10 = 2.3$. After the drop
# of the learning rate, at step 336, the gap widens, presumably because it can no longer move far in between.
#
# Until that drop, the quorum has a lower error than its control, which averages the corrupted worker in, as local SGD and DiLoCo
# do. After it, the control catches up: small steps of one worker in eight do little harm to an average. LSGD never follows the
# worker with the highest loss, but its evaluated model is the mean of all workers, the corrupted one included.
#
# **What one seed shows:** the rule leaves this worker out of every exchange, and the error falls faster for it. **What it does
# not show:** which method is best in the end. An error of 8 % of 1,000 test signals has a standard error of 0.9 %, so the final
# errors of the quorum, its control and local SGD do not differ by more than chance. Nothing is tuned, and a period of 8 need not
# suit all methods alike. And random labels are easy to tell by their loss: a worker with a low loss and bad parameters, such as
# one that sees only easy examples, would be let in.

# %% [markdown]
# ## Try this
#
# - Set `"kappa": 1.0` for the quorum: it averages about half of the workers. Look at the error and at who is in.
# - Set `corrupt_workers=0`: do the four methods differ if all workers are clean?
# - Set `corruption="skewed-shard"` in `config`: one worker sees only the lowest labels, and has the lowest loss. Is anybody
#   left out of the quorum now? Quorum averaging is not made for such data.
# - Set `evaluated_model="leader"` for LSGD: its mean of all workers includes the corrupted one, the leader is one clean worker.
# - Compare over several seeds: `lsgd compare mnist1d --groups 1 --methods quorum,lsgd,local_sgd,diloco --corrupt-workers 1
#   --seeds 0..4 --tune`.
