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
# # The paper's figures
#
# This notebook computes the analytic figures of [Teng et al., 2019](https://arxiv.org/abs/1905.10395) at small sizes, and
# discusses what each of them shows and does not show. `lsgd figure analytic` produces them at full size.
#
# With exact instead of stochastic gradients, EASGD becomes EAGD and LSGD becomes LGD. Both pulls are computed at x, as in
# the paper's eq. 2. Independent workers, which never exchange, are not in the paper's figures; they are the control.
#
# **You will learn**
#
# - how a pull to a leader differs from a pull to a mean: in a bowl, among rings of minima, in matrix completion,
# - what each figure leaves out when it has no control,
# - how the paper's claims are tested, one by one,
# - how to run the paper's networks.
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

from lsgd_jax.paper import bounds, descent, matrix_completion, networks, nonconvex
from lsgd_jax.paper.objectives import bowl, double_well, sinc_rings
from lsgd_jax.presets import PRESETS

small = "LSGD_SMALL" in os.environ  # Small sizes, for tests: the text is about the full size.

# %% [markdown]
# ## Trajectories
#
# Four workers in a convex bowl, $x^2 + y^2$, from the paper's starting points (circles) to their ends (crosses).


# %%
def plot_paths(axes, descents, heights, levels):
    side = np.linspace(-24, 24, 300)
    grid = jnp.array(np.stack(np.meshgrid(side, side), -1))
    for ax, (name, (paths, _)) in zip(axes, descents.items(), strict=True):
        ax.contour(side, side, jax.vmap(jax.vmap(heights))(grid), levels=levels, colors="0.85", linewidths=0.7)
        for worker, (path, color) in enumerate(zip(np.asarray(paths), descent.WORKER_COLORS, strict=False)):
            ax.plot(*path.T, linewidth=1.2, color=color, label=f"worker {worker}")
            ax.plot(*path[0], "o", color=color, markerfacecolor="white", markersize=6)
            ax.plot(*path[-1], "x", color="black", markersize=6)
        ax.set(title=name, aspect="equal", xticks=[-20, 0, 20], yticks=[-20, 0, 20])


def in_bowl(starts):
    methods = descent.methods(eta=0.02, pull=0.1)
    return {name: descent.descend(method, bowl, starts, 100) for name, method in methods.items()}


starts = jnp.array(descent.STARTS)
descents = in_bowl(starts)
figure, axes = plt.subplots(1, 3, figsize=(12, 4))
plot_paths(axes, descents, bowl, levels=10)
plt.show()


def formatted(values, form):
    return ", ".join(format(float(value), form) for value in values)


for name, (_, values) in descents.items():
    print(f"{name:12} values after 50 iterations: {formatted(values[:, 50], '.3f')}")
print("all starts mirrored to one side of the minimum, best worker:")
for name, (_, values) in in_bowl(jnp.abs(starts)).items():
    print(f"{name:12} after 50 iterations: {values[:, 50].min():.3f}")

# %% [markdown]
# **It shows** that EAGD's paths bend towards the mean of the workers, and LGD's towards the leader. At first, that is the
# worker at (-6, -4); then another one has been pulled past it, to the other side of the minimum, and the two take turns:
# hence the kinks in the fourth worker's path. LGD is far ahead of the others. **It does not show** that a leader makes
# workers faster in bowls. The starting points surround the minimum, so a pull towards the leader is a pull inwards. If
# all start on one side, nothing pulls the leader, and it is as fast as if it were alone.
#
# ## A heavily non-convex function
#
# $\sin(\pi r) / (\pi r)$, with r the distance from the origin. Its minima are rings; the lowest is the innermost, at r =
# 1.43, with the value -0.2172.

# %%
descents = {
    name: descent.descend(method, sinc_rings, starts, nonconvex.ITERATIONS)
    for name, method in descent.methods(nonconvex.ETA, nonconvex.PULL).items()
}
figure, axes = plt.subplots(2, 3, figsize=(12, 7), height_ratios=(2, 1))
plot_paths(axes[0], descents, sinc_rings, levels=[0.0])
for ax, (_, values) in zip(axes[1], descents.values(), strict=True):
    for value, color in zip(values, descent.WORKER_COLORS, strict=False):
        ax.plot(value, linewidth=1.2, color=color)
    ax.axhline(nonconvex.GLOBAL_MINIMUM, color="0.6", linewidth=0.8, linestyle=":")
    ax.set(xlabel="iteration", ylim=(-0.24, 0.15))
axes[1, 0].set_ylabel("f(x) (dotted: global minimum)")
plt.show()
for name, (_, values) in descents.items():
    print(f"{name:12} ends at {formatted(values[:, -1], '.4f')}")

# %% [markdown]
# The rings in the figure are where the function is 0. All LGD workers end in the global minimum, and all EAGD workers in
# the next ring. Independent workers hardly move, because the gradient is small where they start. But these are only four
# starting points. From many random ones:

# %%
runs = 50 if small else 2000
for box in nonconvex.BOXES[: 1 if small else None]:
    reached = nonconvex.random_starts(box, runs)
    shares = ", ".join(f"{name} {share:.1%}" for name, share in reached.items())
    print(f"{runs} runs from [-{box}, {box}]^2, workers in the global minimum: {shares}")

# %% [markdown]
# **It shows** that one good worker is enough for LGD: the leader pulls the others after it, and on their way they explore
# what lies in between. So LGD's share is above EAGD's in every square, most of all if the starting points are far out.
# **It does not show** that LGD finds the global minimum from anywhere: in the largest square, most of its workers don't.
#
# ## Matrix completion
#
# $F(X) = \frac14 \|M - X X^T\|^2$ with $M = X_* X_*^T$ of low rank and eight workers. The solution is unique only up to a
# rotation of X. The paper has dimension 1000 and ranks up to 100; here the dimension is 200, with the learning rate
# scaled accordingly.

# %%
dimension = 50 if small else 200
eta = matrix_completion.ETA * matrix_completion.DIMENSION / dimension
curves = matrix_completion.solve(dimension, eta, ranks=(1, 10))
figure, axes = plt.subplots(1, 2, figsize=(12, 4))
for ax, (rank, by_method) in zip(axes, curves.items(), strict=True):
    for name, values in by_method.items():
        color = descent.COLORS[name]
        ax.semilogy(
            values.min(0), ":" if name == "independent" else "-", color=color, linewidth=2.5, label=f"{name}: best"
        )
        ax.semilogy(np.median(values, 0), "--", color=color, linewidth=1, label=f"{name}: median")
    ax.set(title=f"rank {rank}", xlabel="iteration")
axes[0].set_ylabel("F(X)")
axes[1].legend(fontsize=8)
plt.show()

# %% [markdown]
# **It shows** that EAGD stalls on a plateau, while LGD's best worker converges to what single precision allows. That is
# what the paper plots. **It does not show** that the pull helps: the best LGD worker is the leader, which is not pulled,
# and the best of eight independent workers (dotted) is on its curve. At rank 10, LGD's median worker stalls like EAGD's,
# because it is pulled towards a solution that is a rotation of its own, while the median independent worker converges. At
# rank 1 the solution is unique up to sign, and about half of the workers share the leader's sign.
#
# ## Verdicts on the paper's claims
#
# `lsgd figure theory` tests what the paper proves or claims, each claim by an experiment. Here is one of them at its smallest:
# two workers descend into the two minima of $(x^2 - 1)^2$, at 1 and -1, and are pulled to each other, or one to the other. Where
# do they come to rest?

# %%
pull_strength = 0.3
for name, method in descent.methods(eta=0.02, pull=0.02 * pull_strength).items():
    x = descent.descend(method, double_well, jnp.array([[1.5], [-0.7]]), 2000).x[:, -1]
    slopes = jax.vmap(jax.grad(double_well))(x)
    print(f"{name:12} ends at x = {formatted(x[:, 0], '.4f')}, where f'(x) = {formatted(slopes[:, 0], '.4f')}")
print(f"closed form for elastic averaging: x = ±{bounds.elastic_counterexample(pull_strength):.4f}")

# %% [markdown]
# **It shows** that elastic averaging can rest where no worker is at a stationary point: each is held on the wall of its minimum
# by the pull to the other. LGD's leader is not pulled, so LSGD can rest only where its best worker is at a stationary point.
# **It does not show** that a leader helps its followers: this one is held further from its minimum than EAGD's workers are from
# theirs, and independent workers, the control, both arrive.
#
# The [table of all verdicts](../benchmarks/paper/results/theory.md) has the paper's other claims, and [the
# discussion](../benchmarks/paper/README.md#verdicts-on-the-papers-claims) says how to read it.
#
# ## Figures 4 to 8
#
# These are networks on CIFAR-10 and ImageNet. Nobody has run them at full scale with this library yet. The presets:

# %%
for name, layout in networks.FIGURES.items():
    fits = [preset for preset, of in PRESETS.items() if str(of.task) == f"{layout.model}-{layout.dataset}"]
    print(
        f"{name}: {layout.model} on {layout.dataset}, {' and '.join(map(str, layout.workers))} workers, presets {', '.join(fits)}"
    )

# %% [markdown]
# To run one, take a preset's name, here that of Figure 4 with 4 workers:
#
#     lsgd data prepare cifar10        # once; TensorFlow is not needed
#     lsgd compare cnn7-cifar10-4 --methods lsgd,easgd,downpour,data_parallel --seeds 0..2 --tune
#     lsgd figure F4                   # from all runs under runs/; lists the missing cells
#
# What has been run is [the network of Figure 4](../benchmarks/paper/README.md#cnn7-on-5000-images-of-mnist) at a quarter of
# its width, on 5,000 images of MNIST with 3 seeds: LSGD, EASGD and data-parallel SGD tie in test error, and DOWNPOUR
# diverges with one seed at the learning rate that its tuning chose.

# %% [markdown]
# ## Try this
#
# - Set `starts = jnp.abs(starts)` for the figure of the bowl: all workers are on one side of the minimum. Is LGD still ahead?
# - Set the pull in `in_bowl` to `0.5`: how soon do the workers follow the leader on its own path?
# - Descend on the rings from `2 * starts`: from further out, does LGD still end in the global minimum?
# - Set `ranks=(2, 20)` in the matrix completion: at which rank do LGD's followers start to stall?
# - Set `pull_strength = 2.0` for the two minima: does the follower still rest near its own?
