"""The tables of a comparison, from runs that nobody has trained."""

import io

import pytest
from rich.console import Console

from lsgd_jax.compare.table import for_terminal, markdown, notes, rows_of
from lsgd_jax.presets import PRESETS
from tests.compare.runs import summary_of_finals


def test_failed_seeds_are_counted_and_never_averaged(tmp_path):
    finals = {"lsgd": [0.1, 0.2, 0.3], "easgd": [0.2, None, 0.4], "local_sgd": [0.2, 0.3, 0.4]}
    summary = summary_of_finals(tmp_path, PRESETS["digits"], finals)
    header, _, easgd, local_sgd = rows_of(summary)
    easgd, local_sgd = (dict(zip(header, row, strict=True)) for row in (easgd, local_sgd))
    for title in ("final error (95 %)", "final error of the best worker", "final error at equal bytes"):
        assert easgd[title] == "1 of 3 seeds failed"
    assert (easgd["median"], easgd["p (Holm)"]) == ("40.00 %", "")
    assert summary["methods"]["easgd"]["final_error"]["values"] == [0.2, None, 0.4]
    # All differences are 10 %, which would be certain to a t-test.
    assert (local_sgd["minus lsgd, seed by seed (95 %, simultaneous)"], local_sgd["p (Holm)"]) == ("10.00 %", "")
    assert notes(summary) == (
        "3 seeds; ± is half of a 95 % t-interval. Where ± is missing, all seeds agree, and their spread cannot be told"
        " from them. Comparisons with lsgd, paired by seed: 2; their intervals are simultaneous (Bonferroni), and their"
        " p-values corrected by Holm's method. Tuning tried at most 6 cells per method with 2 other seeds on held-out"
        " training data."
    )


def finals(scale):
    return {
        method: [scale * 0.0412, scale * (0.0512 + 0.01 * i)]
        for i, method in enumerate(("lsgd", "data_parallel", "independent"))
    }


def printed(summary, width):
    text = io.StringIO()
    Console(width=width, file=text).print(for_terminal(summary, width))
    return [line.rstrip() for line in text.getvalue().splitlines()]


@pytest.mark.parametrize(("preset", "scale", "target"), [("mnist1d", 1, 0.05), ("tragedies", 50, None)])
def test_a_table_fits_a_terminal_and_no_number_is_broken(preset, scale, target, tmp_path):
    summary = summary_of_finals(tmp_path, PRESETS[preset], finals(scale), target)
    lines = printed(summary, 80)
    assert max(map(len, lines)) <= 80
    header, *rows = rows_of(summary)
    both = ("final error (95 %)", "final loss (95 %)", "minus", "p (", "perplexity", "MB sent per")
    for row in rows:
        [line] = [line for line in lines if line.lstrip().startswith(row[0])]
        shown = [part.strip() for part in line.split("  ")]
        assert all(value in ("", *shown) for title, value in zip(header, row, strict=True) if title.startswith(both))


def test_a_wider_terminal_shows_more_columns(tmp_path):
    summary = summary_of_finals(tmp_path, PRESETS["mnist1d"], finals(1), 0.05)
    least = ["method", "final error\n(95 %)", "minus lsgd\n(95 %)", "p\n(Holm)", "steps\nto 5.0%", "MB\nsent"]
    headers = {}
    for width in (20, 60, 80, 120, 200):
        assert max(map(len, printed(summary, width))) <= width
        headers[width] = [str(column.header) for column in for_terminal(summary, width).columns]
    assert headers[20] == ["method"]
    assert headers[60] == least[:4]
    assert headers[80][:6] == least
    assert "Steps and MB to 5.0% are medians over seeds" in notes(summary)
    assert headers[120][:9] == [*least, "seeds\nat 5.0%", "median", "best error\n(95 %)"]
    assert set(headers[200]) > set(headers[120])
    assert len(rows_of(summary)[0]) <= len(headers[200]) + 1


def test_texts_have_their_tokens_and_perplexity(tmp_path):
    summary = summary_of_finals(tmp_path, PRESETS["tragedies"], {"lsgd": [1.9, 2.1], "easgd": [2.0, 2.0]})
    header, lsgd, _ = (dict(zip(rows_of(summary)[0], row, strict=True)) for row in rows_of(summary))
    assert header["tokens per worker"]
    # 1,280 steps of 8 windows with 64 tokens; e^2.
    assert (lsgd["tokens per worker"], lsgd["perplexity"], lsgd["MB sent per worker"]) == ("655360", "7.39", "1.0")
    assert summary["methods"]["lsgd"]["perplexity"] == pytest.approx(7.389, rel=1e-4)


def test_other_tasks_count_examples_and_have_no_perplexity(tmp_path):
    rows = rows_of(summary_of_finals(tmp_path, PRESETS["digits"], {"lsgd": [0.1, 0.2]}))
    assert "perplexity" not in rows[0]
    # 300 steps of 16 images.
    assert (rows[0][-1], rows[1][-1]) == ("examples per worker", "4800")
    assert markdown(rows).count("\n") == 3
