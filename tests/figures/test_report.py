"""The page about runs, of runs that are trained and of made-up ones."""

import base64
import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from lsgd_jax import cli
from lsgd_jax.config import Config
from lsgd_jax.errors import UsageError
from lsgd_jax.figures import report
from lsgd_jax.figures import run as figures
from lsgd_jax.figures.palette import look, worker_colors
from lsgd_jax.figures.report import charts, reading
from lsgd_jax.methods import METHODS
from lsgd_jax.tracking.run_folder import read_metrics
from tests.figures.runs import evaluation, make_run
from tests.reliability import faults

FOLDER = Path(report.__file__).parent


class Page(HTMLParser):
    """What a page says and refers to."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.references, self.ids, self.open, self.scripts = [], [], [], [], [], []
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
        elif self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.text.append(data)

    def says(self, words):
        return words in " ".join(" ".join(self.text).split())

    def charts(self, run=0):
        return {
            chart["title"]: chart for chart in (self.data["runs"][run]["charts"] if run >= 0 else self.data["shared"])
        }


def page_of(tmp_path, *runs):
    report.write(list(runs), tmp_path / "report.html")
    page = Page(tmp_path / "report.html")
    for reference in page.references:
        assert reference.startswith("#"), reference
        assert reference[1:] in page.ids
    data, *scripts = page.scripts
    assert scripts == [(FOLDER / name).read_text() for name in ("uplot.js", "report.js")]
    page.data = json.loads(data)
    assert len(set(page.ids)) == len(page.ids)
    return page


def test_a_page_tells_of_a_run(trained, tmp_path):
    page, asynchronous = page_of(tmp_path, trained), Config.load(trained).asynchronous is not None
    error = read_metrics(trained, "evaluation")[-1]["center_error"]
    assert page.says(f"final test error {100 * error:.2f} %")
    assert page.says("steps taken 32 MB sent")
    for title in ("Global leader", "Group leader", "Distance to the group leader: median and range of the workers"):
        assert page.says(title)
    assert page.says("Local steps of each worker") == asynchronous
    assert page.says("Score: median and range of the workers") != asynchronous
    config = Config.load(trained)
    for name, value in config.effective.items():
        assert page.says(f"{name} {reading.text_of(value)}")
    for name in {field.name for field in dataclasses.fields(Config)} - config.effective.keys():
        assert not page.says(f"{name} not given")
    assert page.says("jaxlib")
    charts = page.charts()
    assert page.tags.count("figure") == page.tags.count("figcaption") == len(charts) == 7
    *workers, leader, center = charts["Test error"]["lines"]
    assert [line["name"] for line in (*workers, leader, center)] == [
        *(f"worker {i}" for i in range(4)),
        "leader",
        "evaluated model",
    ]
    assert center["y"][-1] == pytest.approx(100 * error, rel=1e-5)
    assert charts["Test error"]["steps"][-1] == 32


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
    assert page.says("run final test error lowest test error steps taken MB sent per worker seconds of training")
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


def test_nothing_that_a_folder_holds_becomes_part_of_the_page(tmp_path):
    hostile = "<script>alert('$x$')</script>&amp;\"'"
    run = make_run(tmp_path / "<b>run$a$", [evaluation(16)])
    (run / "environment.json").write_text(json.dumps({hostile: {hostile: hostile}}))
    for runs in ([run], [run, make_run(tmp_path / "other", [evaluation(16)])]):
        page = page_of(tmp_path, *runs)
        assert page.says(hostile)
        assert "b" not in page.tags


def test_only_scripts_of_the_package_may_run(tmp_path):
    run = make_run(tmp_path / "</script><script>alert(1)", [evaluation(16)])
    text = (report.write([run], tmp_path / "report.html"), (tmp_path / "report.html").read_text())[1]
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    hashes = [hashlib.sha256((FOLDER / name).read_bytes()).digest() for name in ("uplot.js", "report.js")]
    allowed = " ".join(f"'sha256-{base64.b64encode(each).decode()}'" for each in hashes)
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}"
    assert text.count("</script>") == 3


def test_long_series_are_thinned_out(tmp_path):
    rng = np.random.default_rng(0)
    events = [evaluation(step, float(rng.random())) for step in range(1, 5001)]
    page = page_of(tmp_path, make_run(tmp_path / "run", events, steps=5000))
    chart = page.charts()["Test error"]
    lengths = {len(chart["steps"]), *(len(line["y"]) for line in chart["lines"])}
    assert lengths == {charts.MOST_POINTS}
    assert (chart["steps"][0], chart["steps"][-1]) == (1, 5000)
    values = [(step, rng.random(16)) for step in range(2_000)]
    x, low, middle, high = charts.band(values)
    assert len(x) == len(low) == len(middle) == len(high) == charts.MOST_POINTS
    assert all(a <= b <= c for a, b, c in zip(low, middle, high, strict=True))
    assert low[0] == pytest.approx(min(values[0][1].min(), values[1][1].min()), rel=1e-5)


def test_many_workers_are_a_band(tmp_path):
    errors = [[i / 128 for i in range(128)]]
    page = page_of(
        tmp_path, make_run(tmp_path / "run", [evaluation(16, worker_errors=errors, workers=128)], workers=64)
    )
    line, center = page.charts()["Test error"]["lines"]
    assert (line["low"], line["high"], center["name"]) == ([0.0], [99.2188], "evaluated model")


def test_leaders_have_a_row_per_group(tmp_path):
    events = [
        {
            "event": "exchange",
            "step": 4,
            "local_leaders": [1, 0],
            "local_distances": [[0, 0]] * 2,
            "scores": [[1, 2]] * 2,
        },
        {
            "event": "exchange",
            "step": 8,
            "local_leaders": [-1, 1],
            "local_distances": [[0, 0]] * 2,
            "scores": [[1, 2]] * 2,
        },
    ]
    chart = page_of(tmp_path, make_run(tmp_path / "run", events)).charts()["Group leader"]
    assert (chart["steps"], chart["leaders"], chart["shares"]) == ([4, 8], [[1, -1], [2, 3]], [0, 1, 1, 1])
    assert (chart["colors"], chart["colored"]) == (worker_colors(4), 4)


def led(groups, workers):
    """A run in which the last worker of each group leads it, and the last of all leads all."""
    of_groups, of_all = {"local_leaders": [workers - 1] * groups}, {"leader": groups * workers - 1}
    distances = [[0] * workers] * groups
    of_all |= {"local_distances": distances, "distances": distances, "scores": distances}
    exchange = {"event": "exchange", "step": 4} | of_groups | of_all
    return [exchange, evaluation(16, workers=groups * workers)], {"groups": groups, "workers": workers}


def test_many_workers_are_colored_by_their_place_in_the_group(tmp_path):
    events, counts = led(4, 50)
    charts = page_of(tmp_path, make_run(tmp_path / "run", events, **counts)).charts()
    of_all, of_groups = charts["Global leader"], charts["Group leader"]
    assert (len(set(of_all["colors"])), of_all["colored"]) == (64, 200)
    assert (len(set(of_groups["colors"])), of_groups["colored"]) == (50, 50)


def test_a_browser_shows_whose_color_is_whose(tmp_path):
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("there is no Chromium here")
    page = tmp_path / "report.html"
    runs = []
    for groups, workers in ((2, 2), (4, 8), (2, 50)):
        events, counts = led(groups, workers)
        runs.append(make_run(tmp_path / f"{groups}x{workers}", events, **counts))
    report.write(runs, page)
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [found[0], "--headless", "--no-sandbox", profile, "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "Uncaught" not in done.stderr
    keys = re.findall(r'<div class="key">(.*?)</div></div>', done.stdout)
    assert [" ".join(re.sub(r"<[^>]*>", " ", key).split()) for key in keys] == [
        "worker 0 1 2 3",
        "worker 0 1 2 3",
        "worker 0 31",
        "worker of each group 0 1 2 3 4 5 6 7",
        "worker 0 99",
        "worker of each group 0 49",
    ]
    assert "step 4, a row per group, group 0 at the top" in done.stdout
    assert done.stdout.count('<div class="u-label">evaluated model</div>') == 3


def test_runs_that_differ_in_seeds_have_a_mean_and_an_interval(tmp_path):
    errors = {"easgd": (0.1, 0.2, 0.6), "lsgd": (0.3,)}
    runs = [
        make_run(tmp_path / f"{method}-{seed}", [evaluation(16, 0.5), evaluation(32, error)], seed=seed, method=method)
        for method, values in errors.items()
        for seed, error in enumerate(values)
    ]
    chart = page_of(tmp_path, *runs).charts(-1)["Test error of the evaluated model"]
    assert [line["run"] for line in chart["lines"]] == [0, 1, 2, 3]
    mean, alone = chart["means"]
    assert (mean["name"], mean["runs"], alone["name"], "low" in alone) == ("EASGD, 3 seeds", [0, 1, 2], "lsgd-0", False)
    assert mean["y"] == [50, 30]
    half = 4.302653 * np.std([10, 20, 60], ddof=1) / np.sqrt(3)  # The t quantile for 2 degrees of freedom.
    np.testing.assert_allclose([mean["low"][1], mean["high"][1]], [30 - half, 30 + half], rtol=1e-4)
    assert mean["color"] == look("easgd").color


def test_a_watched_report_is_renewed_until_its_runs_have_ended(tmp_path, monkeypatch):
    run, out = make_run(tmp_path / "run", [evaluation(16)]), tmp_path / "report.html"
    pages = []

    def sleep(seconds):
        assert seconds == report.RENEWED_EVERY
        pages.append(out.read_text())
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(evaluation(16 * (len(pages) + 1))) + "\n")

    monkeypatch.setattr(report.time, "sleep", sleep)
    report.watch([run], out)
    assert len(pages) == 1
    assert '<meta http-equiv="refresh" content="10">' in pages[0]
    assert "refresh" not in out.read_text().split("<style>")[0]


def test_methods_look_alike_in_all_figures():
    known = [look(method) for method in METHODS]
    assert len({(each.color, each.dashes) for each in known}) == len(known)
    assert look("mine") == look("mine") != look("another")
    assert look("mine").name == "mine"


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
def test_numbers_that_no_run_has_are_one_sentence(lie, message, tmp_path):
    run = make_run(tmp_path / "run", [evaluation(16) | lie])
    with pytest.raises(UsageError, match=message) as error:
        report.write([run], tmp_path / "report.html")
    assert len(str(error.value).splitlines()) == 1


def test_more_workers_than_a_page_can_show_are_one_sentence(tmp_path):
    run = make_run(tmp_path / "run", [evaluation(16)], workers=500_000_000)
    with pytest.raises(UsageError, match="a worker's index is 999,999,999, but the largest is 65,535"):
        report.write([run], tmp_path / "report.html")
    rows = [{"errors": [0.5] * 20_000}] + [{"errors": [0.5]}] * 20_000  # All as long would be 3.2 GB.
    with pytest.raises(ValueError, match="errors has 20,000 workers in 20,001 events"):
        figures.by_worker(rows, "errors")


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
