"""The scripts that start training on clusters, without a cluster."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lsgd_jax.presets import PRESETS

SCRIPTS = Path(__file__).parents[1] / "scripts"
POD = {"TPU_NAME": "lsgd", "TPU_ZONE": "us-west4-a", "TPU_TYPE": "v5litepod-16", "TPU_VERSION": "v2-alpha-tpuv5-lite"}
TPU_VM = ["gcloud", "compute", "tpus", "tpu-vm"]
ZONE = "--zone=us-west4-a"


def run(script, *arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PATH": os.environ["PATH"]} | environment,
    )


def printed(script, *arguments, **environment):
    """The commands that it would run."""
    done = run(script, *arguments, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    return [
        subprocess.check_output(["bash", "-c", f"printf '%s\\0' {line}"], text=True).split("\0")[:-1] for line in lines
    ]


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS.iterdir() if path.suffix in (".sh", ".sbatch")])
def test_shellcheck_finds_nothing(script):
    shellcheck = Path(sys.prefix, "bin", "shellcheck")
    done = subprocess.run([shellcheck, SCRIPTS / script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "commands"),
    [
        (
            ["create"],
            [[*TPU_VM, "create", "lsgd", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite", ZONE]],
        ),
        (
            ["run", "train", "digits", "--run-dir", "runs/two words"],
            [
                [
                    *TPU_VM,
                    "ssh",
                    "lsgd",
                    "--worker=all",
                    r"--command=.venv/bin/lsgd train digits --run-dir runs/two\ words",
                    ZONE,
                ]
            ],
        ),
        (
            ["fetch", "runs/pod"],
            [["mkdir", "-p", "runs"], [*TPU_VM, "scp", "--recurse", "lsgd:runs/pod", "runs", "--worker=0", ZONE]],
        ),
        (["delete"], [[*TPU_VM, "delete", "lsgd", "--quiet", ZONE]]),
    ],
)
def test_what_a_tpu_pod_is_told(arguments, commands):
    assert printed("tpu_pod.sh", *arguments, **POD) == commands


def test_installing_on_a_tpu_pod_copies_the_commit_and_installs_what_is_locked():
    archive, copy, install = printed("tpu_pod.sh", "install", **POD)
    assert archive[:2] == ["git", "archive"]
    assert copy[4:7] == ["scp", archive[3].removeprefix("--output="), "lsgd:"]
    [on_hosts] = [argument.removeprefix("--command=") for argument in install if argument.startswith("--command=")]
    subprocess.run(["bash", "-n", "-c", on_hosts], check=True)
    assert "./lsgd-jax[tpu]" in shlex.split(on_hosts)
    for lock in re.findall(r"-c lsgd-jax/(\S+)", on_hosts):
        assert (SCRIPTS.parent / lock).exists()


def test_without_a_dry_run_it_runs_what_a_dry_run_prints(tmp_path):
    for name in ("gcloud", "mkdir"):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "%s\\n" {name} "$@" >> {tmp_path}/called\n')
        (tmp_path / name).chmod(0o755)
    arguments = ["fetch", "runs/pod"]
    expected = printed("tpu_pod.sh", *arguments, **POD)
    done = run("tpu_pod.sh", *arguments, **POD | {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "called").read_text().splitlines() == [word for command in expected for word in command]


@pytest.mark.parametrize("arguments", [[], ["reboot"], ["run"], ["fetch"]])
def test_a_wrong_action_says_which_there_are(arguments):
    done = run("tpu_pod.sh", *arguments, **POD)
    assert done.returncode == 2
    assert "usage: " in done.stderr


@pytest.mark.parametrize("name", POD)
def test_a_missing_variable_is_named(name):
    done = run("tpu_pod.sh", "create", DRY_RUN="1", **{key: value for key, value in POD.items() if key != name})
    assert done.returncode == 2
    assert f"set {name}" in done.stderr


def test_slurm_starts_a_worker_on_every_gpu_and_a_group_on_every_node():
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "8"}
    [command] = printed("slurm.sbatch", "mnist1d", "--period", "8", **job)
    assert command[:5] == ["srun", "--gpu-bind=none", "--kill-on-bad-exit=1", "lsgd", "train"]
    run_dir = ["--run-dir", "runs/slurm-7", "--resume"]
    assert command[5:] == ["mnist1d", "--groups", "2", "--workers", "8", *run_dir, "--period", "8"]
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", (SCRIPTS / "slurm.sbatch").read_text(), re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert run("slurm.sbatch").returncode == 2


def test_the_jobset_has_a_pod_on_every_host_and_a_worker_on_every_chip():
    jobset = yaml.safe_load((SCRIPTS / "k8s-jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    [replicated] = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    across, down = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert (replicated["replicas"], job["completions"] * chips) == (1, across * down)
    assert (job["parallelism"], job["completionMode"]) == (job["completions"], "Indexed")
    lsgd, train, preset = container["command"]
    assert (lsgd, train, preset in PRESETS) == ("lsgd", "train", True)
    *arguments, resume = container["args"]
    assert resume == "--resume"
    options = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert (int(options["--groups"]), int(options["--workers"])) == (job["completions"], chips)
    [mounted], [volume] = container["volumeMounts"], pod["volumes"]
    assert mounted["name"] == volume["name"]
    for folder in ("--data-dir", "--run-dir"):
        assert options[folder].startswith(mounted["mountPath"])
