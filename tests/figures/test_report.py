"""The page about runs, of runs that are trained and of made-up ones."""

import dataclasses
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.figure import Figure

from lsgd_jax import cli
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.figures import report
from lsgd_jax.figures import run as figures
from lsgd_jax.figures.report import charts, page, reading
from lsgd_jax.tracking.run_folder import read_metrics
from tests.figures.runs import evaluation, make_run
from tests.reliability import faults


class Page(HTMLParser):
    """What a page says and refers to."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.references, self.ids, self.open = [], [], [], [], []
        self.feed(path.read_text())
        self.close()
        assert self.open == []  # All that was opened is closed.

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "br", "img", "input", "link"):
            self.open.append(tag)
        for name, value in attrs:
            if name.endswith("href") or name == "src":
                self.references.append(value)
            if name == "id":
                self.ids.append(value)
            self.references += re.findall(r"url\((.*?)\)", value or "")

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "style":
            self.references += re.findall(r"url\((.*?)\)|@import", data)
        else:
            self.text.append(data)

    def says(self, words):
        return words in " ".join(" ".join(self.text).split())


def page_of(tmp_path, *runs):
    report.write(list(runs), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    assert "script" not in page.tags
    for reference in page.references:
        assert reference.startswith(("#", "data:image/png;base64,")), reference
        if reference.startswith("#"):
            assert reference[1:] in page.ids
    assert len(set(page.ids)) == len(page.ids)
    return page


def test_a_page_tells_of_a_run(trained, tmp_path):
    page, asynchronous = page_of(tmp_path, trained), Config.load(trained).asynchronous is not None
    error = read_metrics(trained, "evaluation")[-1]["center_error"]
    assert page.says(f"final test error of the center {100 * error:.2f} %")
    assert page.says("steps taken 32 MB sent")
    for title in ("Global leader", "Group leader", "distance to the group leader"):
        assert page.says(title)
    assert page.says("a worker's local steps") == asynchronous
    assert page.says("Workers' score") != asynchronous
    config = Config.load(trained)
    for name, value in config.effective.items():
        assert page.says(f"{name} {reading.text_of(value)}")
    for name in {field.name for field in dataclasses.fields(Config)} - config.effective.keys():
        assert not page.says(f"{name} not given")
    assert page.says("jaxlib")
    assert page.tags.count("figure") == page.tags.count("figcaption") == 11


def test_a_run_without_leaders(tmp_path):
    exchange = {"event": "exchange", "step": 4, "seconds": 0.5, "worker": 1, "worker_step": 4, "count": 9}
    run = make_run(tmp_path / "run", [exchange, evaluation(16)], method="easgd")
    page = page_of(tmp_path, run)
    assert page.says("16 of 32, not finished")
    assert not page.says("leader")


def test_elections_are_those_that_were_logged():
    """Of 2 groups of 2 workers; -1 is nobody, and null is not finite."""
    in_step = [
        {"step": 4, "local_leaders": [1, 0], "local_distances": [[7, 0], [0, 5]], "scores": [[3, 2], [1, 4]]},
        {"step": 8, "local_leaders": [-1, 1], "local_distances": [[1, 2], [None, 0]], "leader": 3}
        | {"distances": [[1, 2], [3, 0]]},
    ]
    local, overall = (reading.elections(in_step, level, 2) for level in ("local_", ""))
    assert (local.steps.tolist(), local.leaders.tolist()) == ([4, 4, 8], [1, 2, 3])
    assert (overall.steps.tolist(), overall.leaders.tolist()) == ([8], [3])
    np.testing.assert_array_equal(np.concatenate([of for _, of in local.distances]), [7, 5, np.nan])
    np.testing.assert_array_equal(np.concatenate([of for _, of in overall.distances]), [1, 2, 3])

    alone = [
        {"step": 5, "worker": 2, "local_leader": 1, "local_distance": 6.0},
        {"step": 4, "worker": 3, "local_leader": 1, "local_distance": 0.0, "leader": 0, "distance": 8.0},
        {"step": 6, "worker": 0, "local_leader": -1, "local_distance": 0.0},
    ]
    local, overall = (reading.elections(alone, level, 2) for level in ("local_", ""))
    assert (local.steps.tolist(), local.leaders.tolist()) == ([4, 5], [3, 3])
    assert [(step, of.tolist()) for step, of in local.distances] == [(5, [6.0])]
    assert overall.leaders.tolist() == [0]
    assert [(step, of.tolist()) for step, of in overall.distances] == [(4, [8.0])]


def test_several_runs_differ_in_some_fields(tmp_path):
    events = [evaluation(16, 0.25), evaluation(32, 0.125)]
    runs = [make_run(tmp_path / "a" / f"seed-{seed}", events, seed=seed, period=2 + seed) for seed in range(2)]
    runs.append(make_run(tmp_path / "b", []))
    page = page_of(tmp_path, *runs)
    assert page.says("3 runs")
    assert page.says(
        "run final test error of the center lowest test error steps taken MB sent per worker seconds of training"
    )
    assert page.says("a/seed-1 12.50 % 12.50 % 32 32.00 3.2 3 1")
    assert page.says("b not evaluated yet 0 of 32, not finished 4 0")
    assert {"#run-1", "#run-3"} <= set(page.references)


def test_what_has_happened(tmp_path):
    events = [
        {"event": "failure", "step": 4, "workers": [1, 2]},
        {"event": "revival", "step": 8, "workers": [1]},
        evaluation(16, workers=2, worker_errors=[[0.5, None]], train_losses=[[None, None]]),
        {"event": "resume", "step": 16, "workers_from": [[0, 1], [0, 0]], "processes": 1, "devices": 8},
        {"event": "start", "step": 0, "worker": 1, "life": 1, "from": None},
        {"event": "dead", "step": 17, "worker": 1, "life": 1, "seen_by": 0},
        {"event": "start", "step": 18, "worker": 1, "life": 2, "from": {"worker": 3, "life": 1, "step": 19}},
        {"event": "start", "step": 19, "worker": 1, "life": 3, "from": {"saved": 18, "life": 2, "pulled": True}},
        {"event": "exchange", "step": 20, "scores": [[1, None], [2, 3]], "leader": 5, "distances": [[0, 0], [0, 0]]},
    ]
    page = page_of(tmp_path, make_run(tmp_path / "run", events))
    assert page.says("4 NaN or infinite parameters: workers 1, 2. 8 Revived from the leader: worker 1. 16 Resumed with")
    assert page.says("16 Resumed with 2 x 2 workers on 8 devices of 1 processes.")
    assert page.says("20 of 32, not finished")
    assert page.says(
        "17 Worker 1 had ended in its life 1, worker 0 has seen. 18 Worker 1 began its life 2 after 18 steps"
    )
    assert page.says(
        "after 18 steps, from worker 3. 19 Worker 1 began its life 3 after 19 steps, from what it had saved."
    )
    assert not page.says("its life 1 after")


@pytest.fixture
def no_pictures(monkeypatch):
    monkeypatch.setattr(page, "picture", lambda *_: "")


@pytest.mark.usefixtures("no_pictures")  # Nothing in them is a folder's.
def test_nothing_that_a_folder_holds_becomes_part_of_the_page(tmp_path):
    hostile = "<script>alert('$x$')</script>&amp;\"'"
    run = make_run(tmp_path / "<b>run$a$", [evaluation(16)])
    (run / "environment.json").write_text(json.dumps({hostile: {hostile: hostile}}))
    for runs in ([run], [run, make_run(tmp_path / "other", [evaluation(16)])]):
        page = page_of(tmp_path, *runs)
        assert page.says(hostile)
        assert "b" not in page.tags


def test_long_series_are_small_pictures():
    rng, x = np.random.default_rng(0), np.arange(10_000)
    lines = charts.picture(lambda axes: axes.plot(x, rng.random((10_000, 4))), "Lines.", "run")
    assert "data:image/png;base64," in lines
    assert ">10000</text>" in lines  # What stands at the axes is text.
    assert len(lines) < 100_000
    values = [(step, rng.random(16)) for step in range(2_000)]
    band = charts.picture(lambda axes: charts.draw_band(axes, values, "score"), "Band.", "run")
    assert "data:" not in band
    assert len(band) < 60_000


def test_what_is_no_run_is_one_sentence(tmp_path, capsys):
    out = ["--out", str(tmp_path / "report.html")]
    (tmp_path / "empty").mkdir()
    damaged = make_run(tmp_path / "damaged", [{"event": "evaluation", "step": 4}])
    for arguments, message in [
        ([str(tmp_path / "empty")], "empty is not a run folder, its config.json can't be read"),
        ([str(tmp_path / "nowhere")], "nowhere is not a run folder, its config.json can't be read"),
        ([str(damaged)], "damaged are not those of a run (KeyError: "),
        ([], "report needs the folder of a run, as in lsgd report runs/a."),
    ]:
        assert cli.main(["report", *arguments, *out]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"step": 2**63}, f"the number {2**63} is out of range"),
        ({"step": "4"}, "a line is not an event with a step"),
        ({"center_error": 1e308}, r"the number 1e\+308 is out of range"),
        ({"center_error": float("inf")}, "the number Infinity is out of range"),
        ({"seconds": "soon"}, "ValueError: could not convert"),
        (
            {"event": "exchange", "leader": 10**9, "distances": [0]},
            "a worker's index is 1,000,000,000, but the largest",
        ),
        ({"event": "exchange", "leader": 0, "worker": 10**9, "distance": 1}, "a worker's index is 1,000,000,000"),
        ({"event": "resume", "workers_from": 5}, "ValueError: not enough values"),
    ],
)
@pytest.mark.usefixtures("no_pictures")
def test_numbers_that_no_run_has_are_one_sentence(lie, message, tmp_path):
    run = make_run(tmp_path / "run", [evaluation(16) | lie])
    with pytest.raises(UsageError, match=message) as error:
        report.write([run], tmp_path / "report.html")
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.usefixtures("no_pictures")
def test_more_workers_than_a_page_can_show_are_one_sentence(tmp_path):
    run = make_run(tmp_path / "run", [evaluation(16)], workers=500_000_000)
    with pytest.raises(UsageError, match="a worker's index is 999,999,999, but the largest is 65,535"):
        report.write([run], tmp_path / "report.html")
    rows = [{"errors": [0.5] * 20_000}] + [{"errors": [0.5]}] * 20_000  # All as long would be 3.2 GB.
    with pytest.raises(ValueError, match="errors has 20,000 workers in 20,001 events"):
        figures.by_worker(rows, "errors")


@pytest.mark.usefixtures("no_pictures")
def test_pipes_are_not_waited_for(tmp_path):
    run, out = make_run(tmp_path / "run", [evaluation(16)]), tmp_path / "report.html"
    os.mkfifo(run / "environment.json")
    report.write([run], out)  # It does without.
    for name in ("metrics.jsonl", "config.json"):
        (run / name).unlink()
        os.mkfifo(run / name)
        with pytest.raises(UsageError, match="Not a regular file"):
            report.write([run], out)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="exists and is not a report"):
        report.write([run], tmp_path / "pipe")


def test_text_that_is_none_is_shown_as_escapes(tmp_path):
    run = make_run(tmp_path / os.fsdecode(b"run\xff"), [evaluation(16)])
    (run / "environment.json").write_text(json.dumps({"deep\ud800": "\ud800"}))
    page = page_of(tmp_path, run)
    assert page.says(r"run\xff")
    assert page.says(r"deep\ud800")
    config = run / "config.json"
    config.write_text(config.read_text().replace('"digits"', r'"data\ud800"'))
    with pytest.raises(UsageError, match=r"config\.json can't be read \(dataset must be .*, got 'data\\ud800'\.\)\.$"):
        page_of(tmp_path, run)


def test_a_picture_is_written_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    path = make_run(tmp_path / "run", [])
    with pytest.raises(UsageError, match="has not been evaluated yet"):
        figures.draw(path)
    path = make_run(tmp_path / "tested", [evaluation(16)])
    faults.fill_disk(monkeypatch, "curves.png")
    with pytest.raises(UsageError, match=r"curves\.png can't be written \(No space left on device\)\.$"):
        figures.draw(path)
    assert sorted(file.name for file in path.iterdir()) == ["config.json", "metrics.jsonl"]


@pytest.mark.parametrize("count", [300, 65_536])
def test_many_workers_are_an_outline(count):
    axes = Figure().add_subplot()
    figures.draw_shares(axes, np.array([0, 2, 2]), count)
    [outline] = axes.patches
    assert outline.get_data().values[:4].tolist() == [1, 0, 2, 0]
    assert len(outline.get_data().values) == count


@pytest.mark.usefixtures("no_pictures")
def test_only_a_report_is_replaced(tmp_path):
    run, out = make_run(tmp_path / "run", [evaluation(16)]), tmp_path / "report.html"
    out.write_text("<!doctype html>mine")
    with pytest.raises(UsageError, match="exists and is not a report: name another out file"):
        report.write([run], out)
    assert out.read_text() == "<!doctype html>mine"
    with pytest.raises(UsageError, match="can't be written"):
        report.write([run], out / "below")
    out.unlink()
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "report.html.new").symlink_to(tmp_path / "mine")
    report.write([run], out)
    assert (tmp_path / "mine").read_text() == "mine"
    first = out.read_text()
    report.write([run], out)
    assert out.read_text() == first  # To the byte.
