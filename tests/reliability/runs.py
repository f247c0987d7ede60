"""Small runs and what they have written."""

import dataclasses
import json
import math

import numpy as np
import orbax.checkpoint as ocp

from lsgd_jax.presets import PRESETS

SMALL = dataclasses.replace(
    PRESETS["digits"], width=0.1, batch_size=8, groups=2, workers=2, steps=24, eval_every=12, checkpoint_every=8
)
"""Programs of four steps, and with them exchanges; evaluations and checkpoints do not fall together."""


def metrics(path):
    """All events of a run but for their seconds."""
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def arrays(path, step):
    """All that a checkpoint holds by name, [group, worker, ...], read by its description and orbax alone."""
    folder = path.absolute() / "checkpoints" / str(step)
    described = json.loads((folder / "progress" / "metadata").read_text())["arrays"]
    with ocp.StandardCheckpointer() as checkpointer:
        shapes = checkpointer.metadata(folder / "state").item_metadata.tree
        blank = {dtype: np.zeros(x.shape, x.dtype) for dtype, x in shapes.items()}
        packed = checkpointer.restore(folder / "state", blank)
    ends = dict.fromkeys(packed, 0)
    by_name = {}
    for name, dtype, shape in described:
        start, ends[dtype] = ends[dtype], ends[dtype] + math.prod(shape)
        by_name[name] = packed[dtype][:, :, start : ends[dtype]].reshape(*packed[dtype].shape[:2], *shape)
    assert ends == {dtype: x.shape[2] for dtype, x in packed.items()}
    return by_name


def assert_same(path, other, step):
    """The metrics of two runs are the same, and to the bit what their checkpoints of a step hold."""
    assert metrics(path) == metrics(other)
    one, two = arrays(path, step), arrays(other, step)
    assert one.keys() == two.keys()
    for name, x in one.items():
        assert x.tobytes() == two[name].tobytes(), name
