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

# %%
try:
    from lsgd_jax.paper import descent, matrix_completion, networks, nonconvex
except ModuleNotFoundError:
    raise SystemExit("Install the package first: run `pip install .` in the repository's folder.") from None

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown

from lsgd_jax.paper.objectives import bowl, sinc_rings
from lsgd_jax.presets import PRESETS

small = "LSGD_SMALL" in os.environ  # So that the tests are quick; all that is said of the pictures is of full size.

# %% [markdown]
# ## Trajectories
#
# Four workers in a convex bowl, $x^2 + y^2$, from the paper's starting points (circles) to their ends (crosses).


# %%
def draw_paths(axes, descents, heights, levels):
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
draw_paths(axes, descents, bowl, levels=10)
plt.show()


def listed(values, form):
    return ", ".join(format(float(value), form) for value in values)


for name, (_, values) in descents.items():
    print(f"{name:12} values after 50 iterations: {listed(values[:, 50], '.3f')}")
print("with all starts mirrored to one side of the minimum, the best of the four")
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
draw_paths(axes[0], descents, sinc_rings, levels=[0.0])
for ax, (_, values) in zip(axes[1], descents.values(), strict=True):
    ax.plot(values.T, linewidth=1.2)
    ax.axhline(nonconvex.GLOBAL_MINIMUM, color="0.6", linewidth=0.8, linestyle=":")
    ax.set(xlabel="iteration", ylim=(-0.24, 0.15))
axes[1, 0].set_ylabel("objective (dotted: the minimum)")
plt.show()
for name, (_, values) in descents.items():
    print(f"{name:12} ends at {listed(values[:, -1], '.4f')}")

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
# `lsgd figure theory` tests what the paper proves or claims, each claim by an experiment. These are the committed
# verdicts; [the full table](../benchmarks/paper/results/theory.md) has the numbers, and [the
# discussion](../benchmarks/paper/README.md#verdicts-on-the-papers-claims) says how to read it.

# %%
results = next(p for p in (Path("benchmarks/paper/results"), Path("../benchmarks/paper/results")) if p.exists())
rows = [line.strip("| ").split(" | ") for line in (results / "theory.md").read_text().splitlines()]
Markdown("\n".join(f"| {row[0]} | {row[1]} | {row[-1]} |" for row in rows))

# %% [markdown]
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
# What has been run is the network of Figure 4 at a quarter of its width, on 5,000 images of MNIST with 3 seeds:

# %%
summary = json.loads((results / "cnn7-mnist5k-4" / "comparison.json").read_text())
for name, of in summary["methods"].items():
    error = of["final_error"]
    print(
        f"{name:14} final test error: median {error['median']:.2%}, mean {error['mean']:.2%} ± {error['half_width']:.2%}"
    )

# %% [markdown]
# LSGD, EASGD and data-parallel SGD tie in test error. DOWNPOUR diverges at the learning rate that its tuning chose.
