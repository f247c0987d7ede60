"""The launcher of a posted run, with processes that are shell scripts."""

import os
import signal
import time
from pathlib import Path

import pytest

from lsgd_jax.distributed import supervision
from tests.distributed.test_processes import alive, wait_until
from tests.reliability import commands


@pytest.fixture
def done(tmp_path, monkeypatch, capfd):
    """Runs a script in several processes to the end: the exit code, and the lines of output and of errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(supervision, "DELAYS", (0.01, 0.1))

    def done(script, processes=2, hang_seconds=0):
        code = supervision.supervise(["bash", "-c", script, "member"], processes, restarts=2, hang_seconds=hang_seconds)
        output, errors = capfd.readouterr()
        return code, output.splitlines(), errors.splitlines()

    return done


def supervised(script, *, detached=False):
    return supervision.supervise(["bash", "-c", script], 2, detached=detached)


def detached(script):
    return supervised(script, detached=True)


def test_who_dies_comes_back_by_itself_and_resumes(done, tmp_path):
    script = """
        echo "life $*" | tee -a lives-$LSGD_PROCESS
        [ $LSGD_PROCESS = 1 ] && ! [ "$1" ] && kill -9 $$
        until [ -e lives-1 ] && grep -q resume lives-1; do sleep 0.02; done
    """
    code, output, errors = done(script)
    assert code == 0
    assert (tmp_path / "lives-0").read_text() == "life \n"
    assert (tmp_path / "lives-1").read_text() == "life \nlife --resume\n"
    assert set(output) == {"[0] life ", "[1] life ", "[1] life --resume"}
    assert errors == ["lsgd: process 1 was killed by SIGKILL; it is restarted."]


@pytest.mark.parametrize("own", [None, "mine"])
def test_who_comes_back_finds_what_was_compiled_and_nothing_stays(done, tmp_path, monkeypatch, own):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    if own:
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", own)
        (tmp_path / own).mkdir()
    script = """
        echo "$JAX_COMPILATION_CACHE_DIR" >> folders
        [ "$1" ] || { echo program > "$JAX_COMPILATION_CACHE_DIR/kept"; kill -9 $$; }
        cat "$JAX_COMPILATION_CACHE_DIR/kept"
    """
    code, output, _ = done(script, processes=1)
    first, second = (tmp_path / "folders").read_text().splitlines()
    assert (code, output, first) == (0, ["[0] program"], second)
    assert (tmp_path / first).exists() == bool(own)


def test_who_dies_again_and_again_is_given_up_and_the_others_go_on(done, tmp_path, monkeypatch):
    restart_later = supervision._Supervisor._restart_later

    def noted(self, place, how):
        restart_later(self, place, how)
        if place.due is None:
            (tmp_path / "given-up").touch()

    monkeypatch.setattr(supervision._Supervisor, "_restart_later", noted)
    script = """
        [ $LSGD_PROCESS = 1 ] && exit 3
        until [ -e given-up ]; do sleep 0.02; done
    """
    code, _, errors = done(script)
    assert code == 0
    assert errors == [
        *["lsgd: process 1 ended with code 3; it is restarted."] * 2,
        "lsgd: process 1 ended with code 3 after 2 restarts in a row; the others go on.",
    ]


@pytest.mark.parametrize(("script", "code"), [("exit 2", 2), ("kill -TERM $$", 128 + signal.SIGTERM)])
def test_who_says_what_is_wrong_or_leaves_is_not_restarted(script, code, done, tmp_path):
    assert done(f"echo x >> lives; {script}", processes=1) == (code, [], [])
    assert (tmp_path / "lives").read_text() == "x\n"


def test_what_may_pass_is_no_reason_not_to_restart_who_has_trained(done):
    script = """
        [ "$1" ] || { printf . >&$LSGD_BEATS; exit 2; }
    """
    assert done(script, processes=1) == (0, [], ["lsgd: process 0 ended with code 2; it is restarted."])


def test_who_does_not_get_on_is_killed_once_it_has(done):
    """Neither before it trains nor after it has ended."""
    script = """
        [ "$1" ] || { sleep 1; printf . >&$LSGD_BEATS; exec sleep 60; }
        printf .! >&$LSGD_BEATS; sleep 1
    """
    code, _, errors = done(script, processes=1, hang_seconds=0.5)
    assert code == 0
    killed, restarted = errors
    assert killed.startswith("lsgd: process 0 has not got on for ")
    assert restarted == "lsgd: process 0 was killed by SIGKILL; it is restarted."


def test_a_signal_to_the_launcher_stops_all(tmp_path):
    with commands.calling(supervised, "echo $$ > pid-$LSGD_PROCESS; exec sleep 60", cwd=tmp_path) as launcher:
        pids = wait_for_pids(tmp_path)
        os.kill(launcher.pid, signal.SIGINT)
        assert launcher.end() == (130, ["lsgd: stopped by SIGINT."])
        assert not any(alive(pid) for pid in pids)


def test_detached_processes_outlive_the_launcher(tmp_path):
    with commands.calling(detached, "echo $$ > pid-$LSGD_PROCESS; sleep 60", cwd=tmp_path) as launcher:
        pids = wait_for_pids(tmp_path)
        os.kill(launcher.pid, signal.SIGKILL)
        launcher.end()
        time.sleep(0.2)
        assert all(alive(pid) for pid in pids)
        for pid in pids:
            os.killpg(pid, signal.SIGKILL)


def wait_for_pids(path: Path):
    wait_until(lambda: all((path / f"pid-{i}").exists() and (path / f"pid-{i}").read_text() for i in range(2)), 30)
    return [int((path / f"pid-{i}").read_text()) for i in range(2)]
