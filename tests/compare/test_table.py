"""The tables of a comparison, from runs that nobody has trained."""

import io

import pytest
from rich.console import Console

from lsgd_jax.compare.table import for_terminal, markdown, rows_of
from lsgd_jax.presets import PRESETS
from tests.compare.runs import summary_of_finals


def finals(scale):
    return {
        method: [scale * 0.0412, scale * (0.0512 + 0.01 * i)]
        for i, method in enumerate(("lsgd", "data_parallel", "independent"))
    }


@pytest.mark.parametrize(("preset", "scale", "target"), [("mnist1d", 1, 0.05), ("tragedies", 50, None)])
def test_a_table_fits_a_terminal_and_no_number_is_broken(preset, scale, target, tmp_path):
    summary = summary_of_finals(tmp_path, PRESETS[preset], finals(scale), target)
    text = io.StringIO()
    Console(width=80, file=text).print(for_terminal(summary))
    lines = [line.rstrip() for line in text.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    wide = rows_of(summary)
    where = [wide[0].index(title) for title in wide[0] if title.startswith(("final", "minus", "perpl", "MB sent per"))]
    where = [i for i in where if "worker)" not in wide[0][i] and " of " not in wide[0][i] and " at " not in wide[0][i]]
    for row in wide[1:]:
        [line] = [line for line in lines if line.lstrip().startswith(row[0])]
        assert all(row[i] in line for i in where)


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
