"""Faults injected into a run of several processes, all of whose survivors are replayed to the bit."""

import json
import subprocess

from tests.reliability.faults import HANG, LSGD, SOAK

if SOAK:  # It takes minutes.

    def test_faults_change_who_is_there_and_nothing_else(tmp_path, record_property):
        options = ["--groups", "1", "--workers", "4", "--width", "0.1", "--min-step-seconds", "0.05"]
        chaos = [*LSGD, "chaos", "digits", *options, "--minutes", "1", "--faults-per-hour", "600", "--out", "out"]
        done = subprocess.run(chaos, cwd=tmp_path, capture_output=True, text=True, timeout=4 * HANG)
        assert done.returncode == 0, done.stdout + done.stderr
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert "all distances" in summary["replay"]
        assert summary["ended"] == []
        assert summary["steps"] > 0
        for kind, count in summary["faults"].items():
            record_property(f"faults injected into a posted run, replayed to the bit: {kind}", count)
