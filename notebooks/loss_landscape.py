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
# # The loss between workers, leaders and their mean
#
# LSGD pulls workers to leaders and reports the mean of all workers, which is called center in this notebook. What does
# the loss look like in between? The notebook shows the plane through a worker, its local leader and the global leader,
# the line from the global leader to the center, and the curvature of the loss at each point, next to those of independent
# workers, which never exchange.
#
# **You will learn**
#
# - how to plot the loss on the plane through three networks, and on the line between two,
# - how to estimate the curvature of the loss from Hessian-vector products,
# - why the mean of LSGD's workers is a good model, and that of independent workers is not.
#
# **Run time:** about a minute on two CPU cores.

# %%
# Install what is missing: matfree, and lsgd_jax from a clone of the repository, because it is not on a package index.
import importlib.util
import subprocess
import sys

SOURCE = ".."  # Path of the clone, or its git+https://... address. In the clone's notebooks/ folder, this is it.
missing = [of for name, of in (("matfree", "matfree"), ("lsgd_jax", SOURCE)) if importlib.util.find_spec(name) is None]
if missing and subprocess.call([sys.executable, "-m", "pip", "install", *missing]):
    raise SystemExit("Set SOURCE to a clone of the repository, and run this cell again.")

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from IPython.display import Markdown
from jax.flatten_util import ravel_pytree
from matfree import decomp, eig, stochtrace

from lsgd_jax.data import BatchIndices, load
from lsgd_jax.methods import METHODS
from lsgd_jax.models import MODELS

small = "LSGD_SMALL" in os.environ  # Small sizes, for tests: the text is about the full size.

# %% [markdown]
# ## Training
#
# Two groups of four workers train a dense network on MNIST-1D for 2,000 steps at a constant learning rate: once with LSGD
# and once independently, from the same initialization and with the same batches. A worker's parameters are one vector
# here, because planes are easier to plot through vectors.

# %%
groups, workers, steps = 2, 4, 36 if small else 2000
data = load("mnist1d")
build, _ = MODELS["mlp"]
graphdef, params = nnx.split(build(data.train_x.shape[1:], data.classes, rngs=nnx.Rngs(0)), nnx.Param)
start, unravel = ravel_pytree(params)


def logits_of(vector, x):
    return nnx.merge(graphdef, unravel(vector))(x)


def loss_fn(vector, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(logits_of(vector, x), y).mean()


def train(name):
    """Train by a method; returns the parameters and the score of each worker, [group, worker, ...]."""
    method = METHODS[name]
    options = {"axis_name": ("group", "worker")}
    if name == "lsgd":
        options = {"axis_name": "worker", "group_axis_name": "group", "period": 4, "global_period": 16}
    tx = method.build(optax.sgd(0.1, momentum=0.9, nesterov=True), **options)

    def step(vector, state, x, y):
        loss, grad = jax.value_and_grad(loss_fn)(vector, x, y)
        updates, state = tx.update(grad, state, vector, value=loss)
        return optax.apply_updates(vector, updates), state

    step = jax.jit(jax.vmap(jax.vmap(step, axis_name="worker"), axis_name="group"))
    now = jax.tree.map(lambda x: jnp.broadcast_to(x, (groups, workers, *x.shape)), (start, tx.init(start)))
    batches = BatchIndices(
        examples=len(data.train_y), workers=groups * workers, batch_size=32, sampling="shards", seed=0
    )
    # Stop one step before an exchange, where workers are furthest apart.
    for t in range(steps - 1):
        examples = batches(t).reshape(groups, workers, -1)
        now = step(*now, data.train_x[examples], data.train_y[examples])
    return np.asarray(now[0]), np.asarray(optax.tree.get_all_with_path(now[1], "score")[-1][1])


trained = {name: train(name) for name in ("lsgd", "independent")}

# %% [markdown]
# The points: the global leader is the worker with the lowest score, the local leader is the leader of the other group,
# and the worker is the one with the highest score in that other group. The independent workers get the same names,
# although nobody followed them.

# %%
train_loss = jax.jit(lambda vector: loss_fn(vector, data.train_x, data.train_y))
test_loss = jax.jit(lambda vector: loss_fn(vector, data.test_x, data.test_y))
test_error = jax.jit(lambda vector: jnp.mean(jnp.argmax(logits_of(vector, data.test_x), -1) != data.test_y))

points = {}
for name, (vectors, scores) in trained.items():
    leading, other = np.argsort(scores.min(1))
    points[name] = {
        "worker": vectors[other, scores[other].argmax()],
        "local leader": vectors[other, scores[other].argmin()],
        "global leader": vectors[leading, scores[leading].argmin()],
        "center": vectors.mean((0, 1)),
    }

rows = ["| | point | training loss | test loss | test error | distance to the center |", "|---|---|---|---|---|---|"]
for name, of in points.items():
    for point, vector in of.items():
        away = np.linalg.norm(vector - of["center"])
        losses = f"{train_loss(vector):.3f} | {test_loss(vector):.3f} | {test_error(vector):.1%}"
        rows.append(f"| {name} | {point} | {losses} | {away:.2f} |")
Markdown("\n".join(rows))

# %% [markdown]
# LSGD's center has a lower loss than its worker and leaders, on the training data and on the test data. The independent
# workers are several times further from their center, which is no better than guessing.
#
# ## A plane through three points
#
# Three points span a plane. An orthonormal basis, by Gram-Schmidt from the global leader, preserves distances and angles.
# The center is not in the plane: the plot shows its projection. Contours are of the logarithm of the training loss.


# %%
def plane_through(of):
    """Return the origin of the plane, an orthonormal basis [2, n], and the coordinates of all points."""
    origin = of["global leader"]
    basis, _ = np.linalg.qr(np.stack([of["local leader"] - origin, of["worker"] - origin], axis=1))
    return origin, basis.T, {point: (vector - origin) @ basis for point, vector in of.items()}


@jax.jit
def losses_on(origin, basis, coordinates):
    return jax.lax.map(lambda at: loss_fn(origin + at @ basis, data.train_x, data.train_y), coordinates)


side = 9 if small else 41
marks = {"worker": "o", "local leader": "s", "global leader": "*", "center": "X"}
figure, axes = plt.subplots(1, 2, figsize=(13, 5.2))
for ax, (name, of) in zip(axes, points.items(), strict=True):
    origin, basis, places = plane_through(of)
    corners = np.stack(list(places.values()))
    middle, reach = (corners.max(0) + corners.min(0)) / 2, 0.9 * np.ptp(corners, axis=0).max()
    xs, ys = (np.linspace(m - reach, m + reach, side) for m in middle)
    grid = np.stack(np.meshgrid(xs, ys), -1).reshape(-1, 2)
    heights = np.log10(losses_on(origin, basis, grid)).reshape(side, side)
    drawn = ax.contourf(xs, ys, heights, levels=24, cmap="viridis")
    ax.contour(xs, ys, heights, levels=24, colors="white", linewidths=0.3)
    figure.colorbar(drawn, ax=ax, label="log10(training loss)")
    for point, place in places.items():
        label = f"{point}, projected" if point == "center" else point
        ax.plot(*place, marks[point], color="white", markeredgecolor="black", markersize=12, label=label)
    ax.set(title=name, aspect="equal")
axes[0].legend(fontsize=8)
plt.show()

# %%
for name, of in points.items():
    origin, basis, places = plane_through(of)
    off = np.linalg.norm(of["center"] - origin - places["center"] @ basis)
    on_plane = float(train_loss(origin + places["center"] @ basis))
    print(
        f"{name:12} the center is {off:.2f} off the plane: loss {train_loss(of['center']):.3f}, at its projection {on_plane:.3f}"
    )

# %% [markdown]
# LSGD's workers are on the walls of one basin, where the noise of their steps keeps them, and the center is near its
# bottom. The center is also off the plane, where the loss is even lower. The independent workers are in basins of their
# own, and between them, at the center, there is a hill.
#
# ## The line from the leader to the center

# %%
shares = np.linspace(-0.5, 1.5, 21 if small else 81)
figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True)
for ax, (name, of) in zip(axes, points.items(), strict=True):
    line = [of["global leader"] + share * (of["center"] - of["global leader"]) for share in shares]
    ax.semilogy(shares, [train_loss(vector) for vector in line], label="training")
    ax.semilogy(shares, [test_loss(vector) for vector in line], label="test")
    ax.set(title=name, xticks=[0, 1], xticklabels=["global leader", "center"])
    ax.grid(axis="x", alpha=0.5)
    ax.set_yticks([0.1, 0.3, 1, 3, 10], [0.1, 0.3, 1, 3, 10])
    ax.minorticks_off()
axes[0].set_ylabel("loss")
axes[0].legend(fontsize=8)
plt.show()

# %% [markdown]
# From LSGD's leader to its center both losses fall nearly all the way: there is no barrier. From the best independent
# worker, they rise after a small dip.
#
# ## Curvature
#
# The largest eigenvalue of the Hessian of the training loss, by Lanczos iteration, and its trace, by Hutchinson's
# estimator with its standard error. Both need only Hessian-vector products, which JAX computes as derivatives of the
# gradient.

# %%
matvecs, samples = (8, 8) if small else (30, 100)
eigenvalues = eig.eigh_partial(decomp.tridiag_sym(matvecs))
trace = stochtrace.estimator_monte_carlo_mean_and_sem(
    stochtrace.monte_carlo_trace(), stochtrace.sampler_signs(start, num=samples)
)


@jax.jit
def curvature(vector):
    def times_hessian(v):
        return jax.jvp(jax.grad(lambda p: loss_fn(p, data.train_x, data.train_y)), (vector,), (v,))[1]

    first = jax.random.normal(jax.random.key(0), vector.shape)
    return eigenvalues(times_hessian, first)[0][-1], *trace(times_hessian, jax.random.key(1))


rows = ["| | point | largest eigenvalue | trace |", "|---|---|---|---|"]
for name, of in points.items():
    for point, vector in of.items():
        largest, total, error = curvature(vector)
        rows.append(f"| {name} | {point} | {largest:.1f} | {total:.0f} ± {error:.0f} |")
Markdown("\n".join(rows))

# %% [markdown]
# The center of LSGD is flatter than its worker and leaders, by eigenvalue and by trace: it is at the bottom of the basin,
# not on its walls. The center of the independent workers is flat as well, and useless: flatness means something only
# where the loss is low.
#
# All of this is one seed of a small network. It shows why LSGD can report a mean at all: the pulls keep the workers so
# close together that the loss between them is lower than at the workers. [The notebook on groups and
# communication](groups_and_communication.ipynb) shows at its end how rare exchanges undo this.

# %% [markdown]
# ## Try this
#
# - Set the `period` to `64` and the `global_period` to `256`: is the center still lower than the workers, and are the workers
#   still in one basin?
# - Drop the learning rate at the end, by `optax.piecewise_constant_schedule(0.1, {1500: 0.1})` in place of `0.1`: the noise
#   that keeps workers on the walls of the basin is smaller. How much better is the center then?
# - Set `seed=1` in `BatchIndices`: is the picture the same for another order of the data?
# - Plot the test loss on the plane: use `data.test_x` and `data.test_y` in `losses_on`. Is its minimum at the same place?
