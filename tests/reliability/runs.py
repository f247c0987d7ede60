"""Small runs and what they have written."""

import json
import math

import numpy as np

from lsgd_jax.presets import PRESETS

SMALL = PRESETS["digits"].replace(
    width=0.1, batch_size=8, groups=2, workers=2, steps=24, eval_every=12, checkpoint_every=8
)
"""Programs of four steps, and with them exchanges; evaluations and checkpoints do not fall together."""


def metrics(path):
    """All events of a run but for their seconds."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def arrays(path, step):
    """All that a checkpoint holds by name, [worker, ...]."""
    folder = path / "checkpoints" / str(step)
    by_worker = {}
    for file in (folder / "state").glob("*.npz"):
        with np.load(file) as part:
            by_worker |= dict(zip(part["workers"].tolist(), part["rows"], strict=True))
    rows = np.stack([by_worker[worker] for worker in range(len(by_worker))])
    by_name, start = {}, 0
    for name, dtype, shape in json.loads((folder / "progress" / "metadata").read_text())["arrays"]:
        end = start + math.prod(shape) * np.dtype(dtype).itemsize
        by_name[name] = np.frombuffer(rows[:, start:end].tobytes(), dtype).reshape(-1, *shape)
        start = end
    assert start == rows.shape[1]
    return by_name


def assert_same(path, other, step):
    """The metrics of two runs are the same, and to the bit what their checkpoints of a step hold."""
    assert metrics(path) == metrics(other)
    one, two = arrays(path, step), arrays(other, step)
    assert one.keys() == two.keys()
    for name, x in one.items():
        assert x.tobytes() == two[name].tobytes(), name
