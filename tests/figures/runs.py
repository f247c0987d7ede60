"""A small run, and folders of made-up runs."""

import dataclasses
import json

from lsgd_jax.presets import PRESETS

SMALL = PRESETS["digits"].replace(
    width=0.1, batch_size=8, groups=2, workers=2, steps=32, eval_every=16, checkpoint_every=0
)


def make_run(path, events, **changed):
    path.mkdir(parents=True)
    (path / "config.json").write_text(dataclasses.replace(SMALL, **changed).to_json())
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return path


def evaluation(step, center_error=0.5, workers=4, **more):
    entry = {"event": "evaluation", "step": step, "seconds": step / 10, "bytes_sent": 1e6 * step}
    entry |= {"center_error": center_error, "worker_errors": [[0.5] * workers], "train_losses": [[1.0] * workers]}
    return entry | more
