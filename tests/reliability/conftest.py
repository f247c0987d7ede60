"""What is compiled is kept for the runs that follow: most are of a few configurations. A soak is summed up."""

import json
from collections import Counter
from pathlib import Path

import jax
import pytest

from lsgd_jax.run_folder import environment
from tests.reliability.faults import SOAK

SUMMARY = Path(__file__).parents[2] / "benchmarks" / "reliability" / "results" / "soak.json"
OPTIONS = {
    "jax_compilation_cache_dir": None,
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@pytest.fixture(scope="package", autouse=True)
def compilation_cache(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("compiled"))
    options = OPTIONS | {"jax_compilation_cache_dir": folder}
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in options.items():
            jax.config.update(name, value)
            monkeypatch.setenv(name.upper(), str(value))
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    """Keep what a soak has tried that has passed: the numbers that its tests have recorded, and the cases of each."""
    in_worker = hasattr(config, "workerinput")  # Of pytest-xdist.
    if not SOAK or in_worker or exitstatus != 0:
        return
    tried, cases = Counter(), Counter()
    for report in terminalreporter.stats["passed"]:
        cases[report.nodeid.split("::")[-1].split("[")[0]] += 1
        for name, count in report.user_properties:
            tried[name] += count
    totals = Counter()
    for name, count in tried.items():
        totals[name.split(":")[0]] += count
    content = {
        "totals": totals,
        "tried": tried,
        "cases by test": cases,
        "environment": environment(),
    }
    SUMMARY.parent.mkdir(exist_ok=True)
    SUMMARY.write_text(json.dumps(content, indent=2) + "\n")
    told = [f"{name}: {count}" for name, count in totals.items()]
    terminalreporter.write_line("\n".join([*told, f"see {SUMMARY}"]))
