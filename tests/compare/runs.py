"""Runs that nobody has trained, and summaries of them."""

import json

import numpy as np

from lsgd_jax.compare import cells
from lsgd_jax.compare.results import summary_of
from lsgd_jax.compare.statistics import differences_to_first


def write_run(path, config, values, loss=1.0):
    """The folder of a run whose headline has these values at evaluations every 10 steps."""
    headline = config.task.headline
    path.mkdir(parents=True)
    with (path / "metrics.jsonl").open("w") as file:
        for i, value in enumerate(values):
            entry = {"event": "evaluation", "step": 10 * (i + 1), "seconds": 1.0, "bytes_sent": 1e6 * (i + 1)}
            entry |= {"center_loss": loss, headline.center: value, headline.workers: [[value]]}
            file.write(json.dumps(entry | {"train_losses": [[value]]}) + "\n")
    return path


def written_untrained(monkeypatch, error):
    """Have comparisons write runs of a final error in place of training; the list of their names and configurations."""
    runs = []

    def write(config, path, **_):
        runs.append((f"{config.method}/{path.stem}", config))
        (write_run(path, config, [error(config)]) / "config.json").write_text(config.to_json())

    monkeypatch.setattr(cells, "train_and_evaluate", write)
    return runs


def summary_of_finals(folder, config, finals, target=None):
    """The summary of a comparison, from the final headline measures of each method's seeds; None if a seed failed."""
    headline = config.task.headline
    summary = {"headline": headline._asdict(), "unit": config.task.counted_in[0], f"target_{headline.name}": target}
    methods = {}
    for method, values in finals.items():
        runs = [
            write_run(folder / method / str(seed), config, [1.0 if value is None else value], loss=value)
            for seed, value in enumerate(values)
        ]
        of = config.replace(method=method)
        methods[method] = summary_of(of, runs, runs, target) | {"tried": [{"values": {}}] * 6}
    found = {method: np.array(values, float) for method, values in finals.items()}
    for method, difference in differences_to_first(found).items():
        methods[method]["difference_to_first"] = difference
    return summary | {"seeds": list(range(len(values))), "tuning_seeds": [8, 9], "methods": methods}
