"""What a figure leaves behind."""

import io

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lsgd_jax.errors import UsageError
from lsgd_jax.figures.output import write, write_formats
from tests.reliability import faults


@pytest.mark.parametrize("name", ["figure.png", "figure.csv", "figure.json"])
def test_a_full_disk_is_one_sentence_and_no_file_is_half(name, tmp_path, monkeypatch):
    faults.fill_disk(monkeypatch, name)
    with pytest.raises(UsageError, match=rf"{name} can't be written \(No space left on device\)\.$"):
        write(tmp_path, "figure", Figure(), ["x"], [[1]], {"x": 1})
    assert not (tmp_path / name).exists()
    assert all(path.stat().st_size for path in tmp_path.iterdir())


def test_a_picture_is_what_matplotlib_saves_and_drawn_once(tmp_path, monkeypatch):
    def figure():
        figure = Figure(figsize=(6, 4), layout="constrained")
        for axes in figure.subplots(2, 2).flat:
            axes.plot([1, 20_000], [1e-3, 1])
            axes.set(title="title", xlabel="steps", ylabel="loss", yscale="log")
        return figure

    figure().savefig(expected := io.BytesIO(), format="png", dpi=120, metadata={"Software": None})
    draw, drawn = Axes.draw, []
    monkeypatch.setattr(Axes, "draw", lambda axes, renderer: (drawn.append(axes), draw(axes, renderer)))
    write_formats(tmp_path / "figure.png", figure(), dpi=120)
    assert (tmp_path / "figure.png").read_bytes() == expected.getvalue()
    assert len(drawn) == 3 * len(set(drawn)) == 12
