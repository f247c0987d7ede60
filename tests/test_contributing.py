"""The worked example of CONTRIBUTING.md is a method, with one new file and one row."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
MODULE, ROW = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = """
import sys
from lsgd_jax import cli

base = ["train", "digits", "--groups", "1", "--workers", "2", "--steps", "4", "--checkpoint-every", "0"]
for options in (
    ["--method", "soft_averaging", "--blend", "0.3", "--run-dir", "run"],
    ["--method", "soft_averaging", "--blend", "2"],
    ["--method", "local_sgd", "--blend", "0.3"],
    ["--method", "soft_averaging", "--help"],
):
    try:
        print("exit code", cli.main([*base, *options]), flush=True)
    except SystemExit:
        pass
"""


def test_the_example_method_works():
    module: dict = {}
    exec(MODULE, module)
    tx = module["soft_averaging"](optax.sgd(0.0), axis_name="worker", period=1, blend=0.5)
    x = jnp.array([0.0, 4.0, 8.0])
    updates, _ = jax.vmap(lambda x: tx.update(x, tx.init(x), x), axis_name="worker")(x)
    np.testing.assert_array_equal(x + updates, [2, 4, 6])


def test_one_file_and_one_row_make_it_a_method_everywhere(tmp_path):
    """In a copy of the package, with an option that no other method has."""
    package, new = tmp_path / "lsgd_jax", re.search(r"`(lsgd_jax/methods/\w+\.py)`", TEXT)[1]
    shutil.copytree(ROOT / "lsgd_jax", package)  # With what is compiled of it.
    assert not [path for path in package.rglob("*.py") if "blend" in path.read_text()]
    (tmp_path / new).write_text(MODULE)
    table = package / "methods" / "__init__.py"
    (line, row), text = ROW.strip().split("\n\n"), table.read_text()
    for place, added in (("\n__all__", f"{line}\n"), ('}\n"""LSGD and', f"{row}\n")):
        assert text.count(place) == 1
        text = text.replace(place, added + place)
    table.write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "COLUMNS": "200"},
    )
    assert re.findall(r"exit code (\d)", done.stdout) == ["0", "2", "2", "0"]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["method"], config["blend"], "pull" in config) == ("soft_averaging", 0.3, False)
    assert "lsgd: blend must be in [0, 1], got 2.0.\n" in done.stderr
    assert "lsgd: blend has no effect with local_sgd: it is an option of soft_averaging.\n" in done.stderr
    help_text = " ".join(done.stdout.split())
    assert "--blend 0.5 How far each worker moves towards the mean, in [0, 1]." in help_text
