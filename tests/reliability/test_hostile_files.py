"""Files that no run has written, in the folders of runs that commands read."""

import contextlib
import io
import json
import os
import random
import resource
import shutil
import zipfile

import numpy as np
import pytest

from lsgd_jax import cli, distributed
from tests import programs
from tests.reliability import commands, faults

FILES = 200 if faults.SOAK else 2
"""How many to try with each command."""
MOST_MEMORY = 2**30
"""Bytes that a command may take more than it takes at first."""
RUN = [*commands.TRAIN, "--steps", "24", "--eval-every", "12", "--checkpoint-every", "8"]
VALUES = [None, True, -1, 2**31, 2**63, 10**400, 1e38, 1e300, "", "x" * 10**5, "\ud800", "\x1b[2J\n", [], {}, [[]]]
VALUES += [[1, [2]], {"a": {}}, [None] * 9, float("nan"), float("inf"), "1", [1e30] * 4, [[["a"]]]]


def replaced(tree, rng):
    """JSON with a part in place of which there is another value."""
    if rng.random() < 0.3 or not isinstance(tree, list | dict) or not tree:
        return rng.choice(VALUES)
    if isinstance(tree, dict):
        name = rng.choice(sorted(tree))
        return tree | {name: replaced(tree[name], rng)}
    place = rng.randrange(len(tree))
    return [*tree[:place], replaced(tree[place], rng), *tree[place + 1 :]]


def change_json(path, rng):
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    for place in rng.sample(range(len(lines)), min(len(lines), rng.choice([1, 1, 9]))):
        with contextlib.suppress(ValueError):
            lines[place] = json.dumps(replaced(json.loads(lines[place]), rng))
    path.write_text("\n".join(lines) + "\n")


def nest(path, rng):
    path.write_text(rng.choice(["[", '{"a":']) * 10**5 + "\n")


def change_bytes(path, rng):
    data = bytearray(path.read_bytes()) or bytearray(1)
    for _ in range(rng.choice([1, 10, 100])):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def cut(path, rng):
    faults.cut(path, rng.random())


def repeat(path, rng):
    path.write_bytes(path.read_bytes() * rng.choice([2, 50]))


def write_number(path, rng):
    path.write_text(
        rng.choice(["9" * 10**5, "1e999999", "-" * 99, '{"event": "evaluation", "step": ' + "9" * 5000]) + "\n"
    )


def make_sparse(path, rng):
    os.truncate(path, rng.choice([2**36, 2**42]))


def make_pipe(path, rng):
    path.unlink()
    os.mkfifo(path)


def make_folder(path, rng):
    path.unlink()
    path.mkdir()


def make_link(path, rng):
    path.unlink()
    path.symlink_to(rng.choice(["/dev/zero", "/dev/stdin", path.name, "nowhere", "..", "/proc/self/mem"]))


def make_bomb(path, rng):
    """An archive of few bytes that claims to hold many, and may."""
    header = io.BytesIO()
    claimed = rng.choice([2**24, 2**40, 2**62])
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (4, claimed)})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("workers.npy", "rows.npy"):
            archive.writestr(name, header.getvalue() + bytes(2**24))


DAMAGES = [change_json] * 6 + [change_bytes, cut, nest, repeat, write_number, make_sparse, make_pipe, make_folder]
DAMAGES += [make_link, make_bomb]


@pytest.fixture(scope="module", autouse=True)
def _in_this_process():
    """Commands take its devices, and runs of one configuration share their programs."""
    with pytest.MonkeyPatch.context() as patched, programs.shared():
        for name in ("initialize", "simulate_devices"):
            patched.setattr(distributed, name, lambda *_, **__: None)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with a run and a comparison."""
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for arguments in ([*RUN, "--run-dir", "run"], [*commands.COMPARE, "--out", "compared"]):
            assert cli.main(arguments) == 0
    return folder


READING = {
    "report": ("run", ["report", "run", "compared/lsgd/seed-0"]),
    "figure": ("run", ["figure", "F8", "--runs", ".", "--model", "mlp", "--dataset", "digits", "--out", "out"]),
    "compare": ("compared", [*commands.COMPARE, "--out", "compared"]),
    "resume": ("run", [*RUN, "--run-dir", "run", "--resume"]),
}
"""The folder whose files are damaged, and the command."""


@pytest.mark.usefixtures("png_only")
@pytest.mark.parametrize("name", READING)
def test_whatever_a_folder_holds_is_one_sentence_or_read(name, written, tmp_path, monkeypatch, capfd, record_property):
    """In bounded time and memory."""
    damaged, arguments = READING[name]
    memory = None
    for seed in range(FILES):
        rng, here = random.Random(f"{name} {seed}"), tmp_path / str(seed)
        shutil.copytree(written, here)
        names = [path for path in faults.files(here / damaged) if path.suffix != ".png" and path.name != ".lock"]
        text = [path for path in names if path.suffix in (".json", ".jsonl") or path.name == "metadata"]
        damage = rng.choice(DAMAGES)
        parts = {change_json: text, make_bomb: [path for path in names if path.suffix == ".npz"]}.get(damage) or names
        path = rng.choice(sorted(parts))
        damage(path, rng)
        monkeypatch.chdir(here)
        reproduction = f"{damage.__name__} of {path.relative_to(tmp_path)} with random.Random('{name} {seed}')"
        capfd.readouterr()
        with commands.no_hang():
            try:
                code = cli.main(arguments)
            except BaseException as error:
                raise AssertionError(f"{reproduction}: {error!r}") from error
        commands.assert_one_sentence(code, capfd.readouterr().err.splitlines(), reproduction)
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = memory or used + MOST_MEMORY
        assert used < memory, reproduction
        shutil.rmtree(here)
    record_property(f"hostile files: {name}", FILES)
