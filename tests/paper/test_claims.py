"""Every claim gets a verdict, with a figure and a table."""

import json
import os
from functools import partial

import pytest

from lsgd_jax.errors import UsageError
from lsgd_jax.paper import verdicts
from lsgd_jax.paper.claims import CLAIMS, Sizes, comparisons


def method(errors, megabytes):
    return {"final_error": {"values": errors}, "megabytes_to_target": megabytes}


def test_two_seeds_that_differ_by_the_same_are_no_certainty(tmp_path):
    of = {"lsgd": method([0.04, 0.05], 10.0), "easgd": method([0.06, 0.07], 10.0)}
    summary = {"target_error": 0.05, "methods": of, "environment": {"command": "lsgd compare digits"}}
    (tmp_path / "digits-4").mkdir()
    (tmp_path / "digits-4" / "comparison.json").write_text(json.dumps(summary))
    [row, _] = comparisons.read(tmp_path).rows
    assert row.verdict == "tie"
    assert "paired by seed: 2.00 %, higher in 2 of 2 seeds" in row.measured


def test_comparisons_get_the_verdict_of_their_intervals(tmp_path):
    of = {
        "lsgd": method([0.04, 0.05, 0.04, 0.05, 0.04], 10.0),
        "easgd": method([0.05, 0.04, 0.04, 0.05, 0.04], 10.5),
        "downpour": method([0.06, 0.07, 0.06, 0.07, 0.09], None),
        "data_parallel": method([0.03, 0.04, 0.03, 0.04, 0.02], 5.0),
    }
    summary = {"target_error": 0.05, "methods": of, "environment": {"command": "lsgd compare digits"}}
    (tmp_path / "digits-4").mkdir()
    (tmp_path / "digits-4" / "comparison.json").write_text(json.dumps(summary))
    rows = comparisons.read(tmp_path).rows
    assert [row.verdict for row in rows] == ["tie", "holds", "fails"] * 2
    assert rows[0].command == "lsgd compare digits"
    path = tmp_path / "digits-4" / "comparison.json"
    path.write_text(json.dumps(summary).replace("0.09", "null"))
    failed = comparisons.read(tmp_path)
    assert failed.rows[1].verdict == "tie"
    assert "paired by seed: 1 failed, higher in 4 of 5 seeds" in failed.rows[1].measured
    json.dumps(failed.numbers, allow_nan=False)
    for text in (
        "{}",
        "[" * 100_000,
        json.dumps(summary).replace("0.09", "1e400"),
        json.dumps(summary | {"methods": 5}),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match="was not written by a comparison"):
            comparisons.read(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="Not a regular file"):
        comparisons.read(tmp_path)


@pytest.mark.usefixtures("png_only")
def test_every_claim_gets_a_verdict(tmp_path, monkeypatch):
    """Of few dimensions, ranks and numbers of workers, for each of which much is compiled."""
    for name, fewer in {
        "one step": {"conditions": (10.0,), "workers": (4,)},
        "stochastic leader": {"workers": (4,)},
        "step directions": {"dimensions": (2,), "conditions": (10.0,)},
        "symmetry": {"dimension": 20, "ranks": (1,)},
    }.items():
        monkeypatch.setitem(CLAIMS, name, partial(CLAIMS[name], **fewer))
    # As many steps as the descents to a stochastic leader have, so that they are one program.
    sizes = Sizes(starts=50, points=2, samples=20, replicas=4, steps=300, candidates=500, runs=20)
    summary = verdicts.make(tmp_path, tmp_path / "none", sizes)
    table = json.loads((tmp_path / "theory.json").read_text())["table"]
    assert {row["verdict"].split()[0] for row in table} <= {"holds", "fails", "tie"}
    assert len(table) == 11
    assert (tmp_path / "theory.md").read_text() in summary
    assert "no rows on networks" in summary
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "theory.csv").read_text().startswith("panel,series,x,y,low,high,bound\n")
