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
# # A language model: LSGD beside local SGD
#
# Four workers train a small transformer on Shakespeare's tragedies, byte by byte, and exchange parameters every 16 steps: by
# LSGD all are pulled towards the leader, the worker with the lowest recent training loss; by local SGD all go on from their
# mean. Both send about as many bytes. One play is held out for testing.
#
# **You will learn**
#
# - how to change a preset and train it from Python,
# - how to read and plot the metrics of a run: perplexity, per-worker losses, leaders,
# - how to sample text from the trained network.
#
# **Run time:** about two minutes on two CPU cores.

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

from lsgd_jax.figures.palette import look
from lsgd_jax.presets import PRESETS
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import train_and_evaluate
from lsgd_jax.trained import load_trained

jax.config.update("jax_num_cpu_devices", 4)  # Simulate a CPU device per worker.
small = "LSGD_SMALL" in os.environ  # Small sizes, for tests: the text is about the full size.

# %% [markdown]
# ## The preset
#
# `tragedies` is AdamW with a warmup, a cosine schedule and clipping. Here its transformer is half as
# wide and half as deep, and trains for three eighths of the steps. The pull is 1 / workers.

# %%
size = {"width": 32, "depth": 2, "steps": 480, "eval_every": 48}
if small:
    size |= {"workers": 2, "width": 16, "depth": 1, "steps": 16, "eval_every": 16}
config = PRESETS["tragedies"].replace(**size)
print(config.task)
for name in ("workers", "period", "pull", "local_optimizer", "learning_rate", "batch_size", "steps"):
    print(f"{name:16} {config.flat[name]}")

# %%
data = config.task.data()
print(f"training windows: {len(data.train)}, test windows: {len(data.test)}, of {config.task.context} bytes each")
print(bytes(data.test[40][:-1]).decode())

# %% [markdown]
# ## Training
#
# The loss is the mean cross-entropy of a byte in nats; exp(loss) is the perplexity: a guess among so many equally likely
# bytes would be as good. A model that knows nothing has 128.

# %%
folder = Path(tempfile.mkdtemp())
methods = ("lsgd", "local_sgd")
for method in methods:
    loss = train_and_evaluate(config.replace(method=method), folder / method, lines=False)
    print(f"{look(method).name:10} test loss {loss:.3f} nats, perplexity {np.exp(loss):.2f}")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8))
for method in methods:
    evaluations = read_metrics(folder / method, "evaluation")
    steps = [entry["step"] for entry in evaluations]
    workers = np.exp([np.ravel(entry["worker_losses"]) for entry in evaluations])
    left.plot(steps, np.exp([entry["center_loss"] for entry in evaluations]), **look(method).line)
    left.fill_between(steps, workers.min(1), workers.max(1), color=look(method).color, alpha=0.15, linewidth=0)
left.set(xlabel="local steps", ylabel="test perplexity", yscale="log")
left.set_yticks([6, 8, 10, 15, 20], labels=["6", "8", "10", "15", "20"], minor=False)
left.minorticks_off()
left.legend(title="line: mean of the workers\nband: range of the workers")

exchanges = read_metrics(folder / "lsgd", "exchange")
steps = [entry["step"] for entry in exchanges]
right.plot(steps, [np.ravel(entry["scores"]) for entry in exchanges], linewidth=0.8)
right.plot(
    steps, [np.ravel(entry["scores"])[entry["leader"]] for entry in exchanges], "k.", markersize=4, label="leader"
)
right.set(xlabel="local steps", ylabel="score: mean of the last 10 training losses", title="LSGD: workers and leader")
right.legend()
plt.show()

# %% [markdown]
# LSGD's workers stay apart, and their mean is better than each of them. Local SGD's have no band: every evaluation comes right
# after an exchange, when all have their mean. It is ahead by 0.015 nats here. One seed, and nothing tuned, decides nothing
# between the methods: `lsgd compare tragedies --methods lsgd,local_sgd --seeds 0..4 --tune` would.
#
# ## What it writes
#
# One byte after the other, each sampled from what the model expects after those before it. So small a network, trained for a
# minute, has learned the look of the lines and some short words.

# %%
network = load_trained(folder / "lsgd").center
context = config.task.context
predict = jax.jit(lambda tokens, at: network(tokens[None])[0, at])


def write(start, count, temperature=0.7):
    text, key = list(start.encode()), jax.random.key(0)
    for i in range(count):
        seen = text[-context:]
        tokens = np.array(seen + [0] * (context - len(seen)), np.int32)  # Padding has no effect: attention is causal.
        logits = predict(tokens, len(seen) - 1)
        text.append(int(jax.random.categorical(jax.random.fold_in(key, i), logits / temperature)))
    return bytes(text).decode(errors="replace")


print(write("TIMON\n", 20 if small else 500))

# %% [markdown]
# ## Try this
#
# - Remove `size` and train the preset as it is (about ten times as long): what does it write then?
# - Set `temperature` to `0.3` and to `1.5`: repetitive and safe, or random?
# - Set `period=64`: a quarter of the bytes. Which of the two methods loses more?
# - Set `pull=1.0`: all restart from the leader. Look at the band of the workers, and at the perplexity of their mean.
# - Add `"diloco"` to `methods`: with its outer momentum, is it ahead of local SGD after so few steps?
