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
# # Your own task, from one file to a comparison and a report
#
# A task is your data, your network and what you measure, in one class. `lsgd train`, `compare`, `report` and all other
# commands take it from its file. [The documentation](../docs/own_task.md) has the details.
#
# **You will learn**
#
# - how to write a task: data, network and measures, with an option of your own,
# - how to train it, and load the trained network in Python,
# - how to compare methods on it, and get a report in HTML.
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
import shlex
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

from lsgd_jax.trained import load_trained

small = "LSGD_SMALL" in os.environ  # Small sizes, for tests: the text is about the full size.
os.environ.pop("FORCE_COLOR", None)  # Set by Jupyter; without it, commands print plain lines and no progress bar.
os.chdir(tempfile.mkdtemp())  # For the file of the task and the runs.
sys.path.insert(0, os.getcwd())

# %% [markdown]
# ## The task
#
# A pendulum starts at some angle with some velocity: where is it after one second? The training examples are simulated.
# `measures` returns two numbers for each example: `loss`, which the workers minimize, and the error in degrees, by which
# runs are compared because `headline` names it. The field `units` becomes the option `--units`.

# %%
# %%writefile pendulum.py
import dataclasses

import jax
import numpy as np
from flax import nnx

from lsgd_jax.config import Config
from lsgd_jax.task import Data, Headline, Task


def after(seconds, angle, velocity):
    """Angle after some seconds, by steps of a millisecond."""
    for _ in range(int(1000 * seconds)):
        velocity = velocity - 0.001 * 9.81 * np.sin(angle)
        angle = angle + 0.001 * velocity
    return angle


@dataclasses.dataclass(frozen=True)
class Pendulum(Task):
    """Predict where a pendulum is after one second, by a network with two hidden layers."""

    headline = Headline("degrees", "test error in degrees")
    units: int = 32
    """Units of each hidden layer."""

    def data(self, data_dir=None):
        start = np.random.default_rng(0).uniform(-2, 2, (2000, 2)).astype(np.float32)
        angle = after(1.0, *start.T)
        return Data((start[:1600], angle[:1600]), (start[1600:], angle[1600:]))

    def network(self, rngs):
        first, second = (nnx.Linear(inputs, self.units, rngs=rngs) for inputs in (2, self.units))
        return nnx.Sequential(first, jax.nn.tanh, second, jax.nn.tanh, nnx.Linear(self.units, 1, rngs=rngs))

    def measures(self, network, examples):
        start, angle = examples
        error = network(start)[:, 0] - angle
        return {"loss": error**2, "degrees": abs(error) * 180 / np.pi}


preset = Config(
    task=Pendulum(),
    local_optimizer="adamw",
    learning_rate=0.01,
    learning_rate_schedule="cosine",
    steps=800,
    eval_every=80,
    batch_size=16,
    groups=1,
    workers=4,
    period=8,
)

# %% [markdown]
# ## Train it
#
# These are commands for a terminal; the function runs one and prints what it prints. The preset is named by its file.


# %%
def lsgd(command):
    words = [sys.executable, "-m", "lsgd_jax", *shlex.split(command)]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout)
    done.check_returncode()


length = "--steps 16 --eval-every 16" if small else ""
lsgd(f"train ./pendulum.py:preset --run-dir runs/pendulum --units 48 {length}")

# %%
Image("runs/pendulum/curves.png", width=900)

# %% [markdown]
# The networks come back as Flax modules. `center` is the mean of the workers, the model that LSGD reports.

# %%
import pendulum

trained = load_trained("runs/pendulum")
angle = np.linspace(-2, 2, 100)
for velocity, color in ((0, "tab:blue"), (1.5, "tab:orange")):
    start = np.stack([angle, np.full_like(angle, velocity)], 1)
    plt.plot(
        angle, pendulum.after(1.0, *start.T), color=color, alpha=0.3, linewidth=5, label=f"initial velocity {velocity}"
    )
    plt.plot(angle, trained.center(start)[:, 0], color=color, linewidth=1)
plt.xlabel("initial angle (rad)")
plt.ylabel("angle after one second (rad)")
plt.legend(title="wide: simulation, thin: network", fontsize=8)
plt.show()

# %% [markdown]
# The network is off at the corner of angles and velocities, where examples are on one side only.
#
# ## Compare methods on it
#
# All methods start from the same network and see the same batches. With `--tune` each would first choose its learning rate
# and its own options on held-out training data.

# %%
methods, seeds = ("lsgd,easgd", "0") if small else ("lsgd,easgd,local_sgd", "0..1")
lsgd(f"compare ./pendulum.py:preset --methods {methods} --seeds {seeds} --out runs/comparison {length}")

# %%
Image("runs/comparison/comparison.png", width=900)

# %% [markdown]
# The intervals overlap: two seeds tell no difference between the methods on this task.
#
# ## A report
#
# One HTML file with the configuration, curves, leaders and bytes of one run or several, to open in a browser.

# %%
lsgd("report runs/pendulum runs/comparison/easgd/seed-0 --out report.html")
print(f"report.html has {Path('report.html').stat().st_size / 1e3:.0f} kB")

# %% [markdown]
# ## Try this
#
# - Pass `--units 8` or `--units 128` to `lsgd train`, with another `--run-dir`: how does the test error depend on the size?
# - Sample starts from `uniform(-3, 3)` in `data`: a pendulum near the top is hard to predict. Look at where the network is
#   off in the plot.
# - Set `period=64` in the preset: look at how far the workers are from their leader, in the report.
# - Add `--tune` to `lsgd compare` (it takes some minutes): does a method win when each has its own learning rate?
