"""Figures 4 to 8 from made-up runs."""

import csv
import json
import os

import numpy as np
import pytest
from matplotlib.axes import Axes

from lsgd_jax.errors import UsageError
from lsgd_jax.paper import networks
from lsgd_jax.presets import PRESETS

pytestmark = pytest.mark.usefixtures("png_only")


def make_run(path, preset, *, evaluations=3, **changed):
    config = PRESETS[preset].replace(**changed)
    path.mkdir(parents=True)
    (path / "config.json").write_text(config.to_json())
    shape = (config.groups, config.workers)
    with (path / "metrics.jsonl").open("w") as file:
        for i, step in enumerate(np.linspace(0, config.steps, 4, dtype=int)[1 : evaluations + 1].tolist()):
            entry = {"event": "exchange", "step": step, "leader": i % 2}
            file.write(json.dumps(entry) + "\n")
            entry = {
                "event": "evaluation",
                "step": step,
                "seconds": 10.0 * (i + 1),
                "bytes_sent": 1e6,
                "center_error": 0.3,
            }
            entry |= {"worker_errors": np.full(shape, 0.4).tolist(), "train_losses": np.ones(shape).tolist()}
            entry["center_error"] = 0.3 - 0.05 * i
            file.write(json.dumps(entry) + "\n")


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / "runs" / "a" / f"lsgd-{seed}", "cnn7-cifar10-4", seed=seed)
    make_run(tmp_path / "runs" / "easgd", "cnn7-cifar10-16", method="easgd")
    make_run(tmp_path / "runs" / "shorter", "cnn7-cifar10-4", steps=10)
    make_run(tmp_path / "runs" / "tuning", "cnn7-cifar10-4", method="downpour", validation=0.2)
    make_run(tmp_path / "runs" / "not yet ended", "cnn7-cifar10-4", method="data_parallel", evaluations=2)
    make_run(tmp_path / "runs" / "resnet", "resnet20-cifar10-4")
    (tmp_path / "runs" / "config.json").write_text("{}")
    for name, text in {"deep": "[" * 100_000, "bytes": "\udcff"}.items():
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "config.json").write_text(text, errors="surrogateescape")
    (tmp_path / "runs" / "pipe").mkdir()
    os.mkfifo(tmp_path / "runs" / "pipe" / "config.json")
    return tmp_path / "runs"


def test_a_figure_has_what_there_is_and_tells_what_is_missing(runs, tmp_path):
    told = networks.make("F4", runs, tmp_path / "out").splitlines()
    assert told == [
        "4 workers, LSGD: 20.00 % (median of 2 seeds, 20.00 to 20.00)",
        "16 workers, EASGD: 20.00 % (median of 1 seeds, 20.00 to 20.00)",
        "missing: 4 workers, SGD (data parallel)",
        "missing: 4 workers, DOWNPOUR",
        "missing: 4 workers, EASGD",
        "missing: 16 workers, SGD (data parallel)",
        "missing: 16 workers, DOWNPOUR",
        "missing: 16 workers, LSGD",
    ]
    assert (tmp_path / "out" / "F4.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "out" / "F4.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["workers"], row["method"], row["seed"]) for row in rows[::3]] == [
        ("4", "lsgd", "0"),
        ("4", "lsgd", "1"),
        ("16", "easgd", "0"),
    ]
    assert [float(row["center_error"]) for row in rows[:3]] == pytest.approx([0.3, 0.25, 0.2])
    summary = json.loads((tmp_path / "out" / "F4.json").read_text())
    assert summary["cells"][0]["config"]["steps"] == PRESETS["cnn7-cifar10-4"].steps


def test_methods_are_told_apart_by_color_or_dashes(tmp_path, monkeypatch):
    methods = ("lsgd", "easgd", "downpour", "data_parallel")
    for method in methods:
        make_run(tmp_path / "runs" / method, "cnn7-cifar10-4", method=method)
    drawn, plot = {}, Axes.plot

    def noted(axes, *data, **line):
        drawn.setdefault(axes, []).append((line["color"], line["linestyle"]))
        return plot(axes, *data, **line)

    monkeypatch.setattr(Axes, "plot", noted)
    networks.make("F4", tmp_path / "runs", tmp_path / "out")
    assert [len(set(lines)) for lines in drawn.values()] == [len(methods)] * 2


def test_who_led(runs, tmp_path):
    assert networks.make("F8", runs, tmp_path / "out") == "workers 0 to 3 led 2, 1, 0, 0 of 3 times"
    with (tmp_path / "out" / "F8.csv").open() as file:
        assert [row["leader"] for row in csv.DictReader(file)] == ["0", "1", "0"]


def test_another_network_or_data_set(runs, tmp_path):
    told = networks.make("F4", runs, tmp_path / "out", model="resnet20")
    assert told.startswith("4 workers, LSGD: 20.00 % (median of 1 seeds")
    with pytest.raises(UsageError, match=r"holds no finished run of cnn7 on mnist5k with 4 or 16 workers by data_par"):
        networks.make("F4", runs, tmp_path / "out", dataset="mnist5k")
    with pytest.raises(UsageError, match="holds no finished run of vgg16 on cifar10 with 4 workers"):
        networks.make("F6", tmp_path / "nowhere", tmp_path / "out")
