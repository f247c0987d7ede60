"""The GPU check in its smallest size, what it does with parts that fail or hang, and its page of results."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.gpu import __main__ as check
from benchmarks.gpu.summary import NO_RESULT, lines
from benchmarks.gpu.workers import convolve_by_worker
from tests.distributed.test_processes import alive, wait_until

ROOT = Path(__file__).parents[1]


def test_the_smallest_size_runs_on_a_cpu_from_anywhere(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--size", "small", "--parts", "device", "--results", "results"]
    variables = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout
    device = json.loads((tmp_path / "results" / "device.json").read_text())
    assert not [name for name, result in device["results"].items() if "error" in result]
    errors = device["results"]["relative error of float32"]["JAX, highest"]
    assert 0 < errors["matrix product"] < 1e-5
    assert 0 < errors["convolution"] < 1e-5
    assert NO_RESULT in (tmp_path / "results" / "README.md").read_text()


def test_parts_that_fail_or_hang_do_not_keep_the_others(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\ncase $3 in\nexchange) echo broken >&2; exit 3;;\n"
        f"input) sleep 600 & echo $! > {tmp_path}/sleeping; wait;;\nesac\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setitem(check.LIMITS, "input", 1)
    arguments = ["--parts", "exchange,input,steps", "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["gpu", *arguments])
    assert check.main() == 1
    processes = json.loads((tmp_path / "results" / "run.json").read_text())["processes"]
    assert {name: of["problem"] for name, of in processes.items()} == {
        "exchange": "exit code 3",
        "input": "stopped after 1 s",
        **{f"steps {network}": "" for network in check.NETWORKS},
    }
    assert processes["exchange"]["last line"] == "broken"
    wait_until(lambda: not alive(int((tmp_path / "sleeping").read_text())), 10)
    page = (tmp_path / "results" / "README.md").read_text()
    assert "- exchange: exit code 3" in page
    assert "- input: stopped after 1 s" in page


def test_when_the_time_is_up_nothing_starts(tmp_path):
    run = check.Run(tmp_path, "full", ["device"], end=0)
    run.process(("device",))
    assert run.outcomes["device"]["problem"] == "not started: the time was up"


def test_the_page_has_a_line_per_program_and_what_failed(tmp_path):
    times = {
        "JAX": {"median": 1.0, "low": 0.9, "high": 1.1},
        "PyTorch, eager": {"median": 2.0, "low": 1.9, "high": 2.2},
    }
    ratios = {"PyTorch, eager": {"ratio": 2.0, "low": 1.8, "high": 2.1}}
    content = {
        "results": {
            "CNN7, float32": {"milliseconds": times, "ratio to JAX": ratios},
            "CNN7, bfloat16": {"error": "ValueError: no"},
        },
        "environment": {"devices": "1 x NVIDIA H100 (gpu)", "packages": {"jax": "0.11.2"}},
    }
    (tmp_path / "steps.json").write_text(json.dumps(content))
    page = list(lines(tmp_path))
    assert NO_RESULT not in page
    assert "| CNN7, float32 | JAX | 1 [0.9, 1.1] |  |" in page
    assert "| CNN7, float32 | PyTorch, eager | 2 [1.9, 2.2] | JAX 2 [1.8, 2.1] |" in page
    assert "- CNN7, bfloat16 failed: ValueError: no" in page


def test_a_convolution_per_worker_has_the_values_and_gradients_of_the_stock_one():
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (3, 2, 8, 8, 2)), jax.random.normal(keys[1], (3, 3, 3, 2, 4))
    options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}

    def values(convolve):
        def loss(x, kernel):
            return jnp.sum(jnp.sin(convolve(x, kernel, (2, 2), "SAME", **options)))

        return jax.jit(jax.vmap(jax.value_and_grad(loss, (0, 1))))(x, kernel)

    got, expected = values(convolve_by_worker), values(lax.conv_general_dilated)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, expected)
