"""What a figure leaves behind."""

import pytest
from matplotlib.figure import Figure

from lsgd_jax.errors import UsageError
from lsgd_jax.figures.output import write
from tests.reliability import faults


@pytest.mark.parametrize("name", ["figure.png", "figure.csv", "figure.json"])
def test_a_full_disk_is_one_sentence_and_no_file_is_half(name, tmp_path, monkeypatch):
    faults.fill_disk(monkeypatch, name)
    with pytest.raises(UsageError, match=rf"{name} can't be written \(No space left on device\)\.$"):
        write(tmp_path, "figure", Figure(), ["x"], [[1]], {"x": 1})
    assert not (tmp_path / name).exists()
    assert all(path.stat().st_size for path in tmp_path.iterdir())
