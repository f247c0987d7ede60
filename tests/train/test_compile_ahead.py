"""`lsgd compile`, run as a user runs it, and what the training step sends on TPUs that are not there."""

import io
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from lsgd_jax import cli
from lsgd_jax.costs.collectives import collectives
from lsgd_jax.costs.ledger import share_bytes
from lsgd_jax.data.feeds import batch_of
from lsgd_jax.distributed import SHARED, place
from lsgd_jax.errors import UsageError
from lsgd_jax.presets import PRESETS
from lsgd_jax.train.compile_ahead import blank_feed, lowered_steps, parameter_shapes, spread
from lsgd_jax.train.setup import prepare, rounds, step_key
from lsgd_jax.train.step import init_state, local_steps
from tests.reliability import commands, faults

LIBTPU = Path(sys.prefix, "tpu")
"""Out of the environment of all other tests: with libtpu in it every start of JAX looks for TPUs."""
HOSTS = {"v5e:2x4": 2, "v5e:16x16": 64}
"""Of 4 devices each."""
SCALAR = 4
SMALL = {"width": 0.25, "batch_size": 8}


def started(*arguments, path=""):
    """The command, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "lsgd_jax", "compile", *arguments],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": f"{path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )


@pytest.fixture(scope="module")
def libtpu():
    if not (LIBTPU / "libtpu").exists():
        pytest.fail(f"libtpu is not in {LIBTPU}: run make tpu, which needs the network once.", pytrace=False)
    return str(LIBTPU)


def _find_in(folder):
    sys.path.append(folder)


def _compile(arguments):
    """The exit code of the command, and what it prints."""
    printed, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(printed), redirect_stderr(errors):
        try:
            code = cli.main(["compile", *arguments])
        except SystemExit as end:  # By which tyro ends.
            code = end.code
    return code, printed.getvalue(), errors.getvalue()


@pytest.fixture(scope="module")
def lsgd_compile(libtpu):
    """The command in one process for all tests, which has libtpu in its path; see `_compile`."""
    with ProcessPoolExecutor(1, faults.FORKS, initializer=_find_in, initargs=(libtpu,)) as pool:
        yield lambda *arguments: pool.submit(_compile, arguments).result(timeout=1200)


@pytest.fixture
def compiled(lsgd_compile, tmp_path):
    """What a small training step sends beside its metrics, and what the command prints."""

    def compiled(topology, *arguments):
        small = [option for name, value in SMALL.items() for option in (f"--{name.replace('_', '-')}", str(value))]
        text = tmp_path / "hlo.txt"
        code, printed, errors = lsgd_compile("mnist1d", *small, "--topology", topology, "--hlo", str(text), *arguments)
        assert code == 0, errors
        found = collectives(text.read_text())
        # The metrics, that every process has all of them: of a worker no more than the loss, whether it has failed and,
        # for two leaders, the score, positions, distances and whether it was revived. They alone are sent once in the
        # program, outside of its loop. Of the two that are no numbers, some TPUs send 512 bytes at least.
        metrics = [each for each in found if each.times == 1]
        [devices] = re.findall(r", (\d+) devices", printed)
        assert sum(each.bytes for each in metrics) <= 8 * SCALAR * int(devices) + 2 * 512
        return [each for each in found if each not in metrics], printed

    return compiled


def parameter_bytes(**changes):
    config = PRESETS["mnist1d"].replace(**SMALL | changes)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(parameter_shapes(config)))


def sizes(found, **of):
    """The sizes of those collectives, the scalars' apart from all others', which are added up."""
    all_sizes = [each.bytes for each in found if all(getattr(each, name) == value for name, value in of.items())]
    scalars = [size for size in all_sizes if size <= SCALAR]
    return scalars, sum(all_sizes) - sum(scalars)


@pytest.mark.parametrize("topology", HOSTS)
def test_lsgd_sends_scalars_and_one_parameter_sized_sum_an_exchange_in_branches_only(topology, compiled):
    hosts, devices = HOSTS[topology], 4 * HOSTS[topology]
    found, printed = compiled(topology)
    assert f"groups: {hosts}, workers in each: 4" in printed
    assert {each.kind for each in found} == {"all-reduce"}  # Nobody gathers everybody's parameters.
    assert all(each.conditional and each.times == 4 for each in found)  # A branch of each of the 4 steps.
    for among in (4, devices):  # An election, and one worker's parameters.
        assert sizes(found, group_size=among) == ([SCALAR, SCALAR], parameter_bytes())
    assert {each.group_size for each in found} == {4, devices}


def test_lsgd_in_one_group(compiled):
    found, printed = compiled("v5e:2x4", "--groups", "1")
    assert "groups: 1, workers in each: 8" in printed
    assert all(each.conditional for each in found)
    assert {(each.kind, each.group_size) for each in found} == {("all-reduce", 8)}
    assert sizes(found) == ([SCALAR, SCALAR], parameter_bytes())


def test_easgd_sends_a_mean_an_exchange_and_one_of_the_starts(compiled):
    found, _ = compiled("v5e:16x16", "--method", "easgd")
    assert {(each.kind, each.group_size) for each in found} == {("all-reduce", 256)}
    assert all(each.conditional for each in found)
    assert sizes(found) == ([], 2 * parameter_bytes())


def test_data_parallel_sends_a_mean_gradient_every_step(compiled):
    found, _ = compiled("v5e:2x4", "--method", "data_parallel")
    assert {(each.kind, each.group_size) for each in found} == {("all-reduce", 8)}
    assert not any(each.conditional for each in found)
    assert all(each.times == 4 for each in found)
    assert sizes(found) == ([], parameter_bytes())


def test_what_is_printed(compiled):
    found, printed = compiled("v5e:2x2", "--groups", "2")
    assert printed.startswith("one program of 4 local steps of lsgd for v5e:2x2, 4 devices (TPU v5 lite)\n")
    rows = re.findall(r"^  all-reduce +([\d,]+) +(\d) +(\d+)  at most", printed, re.MULTILINE)
    assert sum(int(row[0].replace(",", "")) * int(row[2]) for row in rows) == sum(e.bytes * e.times for e in found)
    numbers = dict(re.findall(r"^  (\w[\w ]+?) +([\d,]+)$", printed, re.MULTILINE))
    assert {"arguments", "outputs", "temporaries", "flops", "bytes accessed"} <= set(numbers)
    assert int(numbers["flops"].replace(",", "")) > 0


def test_each_chip_of_a_worker_sends_its_share(lsgd_compile, tmp_path):
    text = tmp_path / "hlo.txt"
    arguments = ["--width", "0.25", "--batch-size", "8", "--chips-per-worker", "4", "--hlo", str(text)]
    code, printed, errors = lsgd_compile("mnist1d", *arguments, "--topology", "v5e:4x4")
    assert code == 0, errors
    assert "groups: 1, workers in each: 4, chips of each worker: 4\n" in printed
    config = PRESETS["mnist1d"].replace(**SMALL, groups=1, workers=4, chips_per_worker=4)
    share = share_bytes(config, parameter_shapes(config))
    assert f"bytes per chip, which holds {share:,} bytes of the parameters\n" in printed
    exchanges = [each for each in collectives(text.read_text(), chips=4) if each.conditional]
    among, within = ([each for each in exchanges if each.within_worker is kind] for kind in (False, True))
    assert {(each.kind, each.group_size) for each in among} == {("all-reduce", 4)}
    assert sizes(among) == ([SCALAR, SCALAR], share)
    assert {each.kind for each in within} == {"all-reduce"}
    assert max(each.bytes for each in within) < 0.05 * share  # Finiteness and distance.


def test_what_does_not_fit_into_the_memory(libtpu):
    large = ["--model", "mlp", "--batch-size", "8192", "--width", "4"]
    done = started("resnet50-imagenet-4", "--topology", "v5e:2x2", *large, path=libtpu)
    assert done.returncode == 2
    assert re.match(r"lsgd: the devices can't run it: RESOURCE_EXHAUSTED: .*available HBM.*\n$", done.stderr)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digits", "--topology", "v5e:3x5"], "there is no TPU topology 'v5e:3x5', as v5e:2x4 and v5e:16x16 are: "),
        (["digits", "--topology", "pod"], "there is no TPU topology 'pod'"),
        (["digits", "--topology", "v5e:2x4", "--groups", "3"], "a worker on each of the 8 devices"),
        (["digits", "--topology", "v5e:2x4", "--period", "0"], "period must be at least 1, got 0."),
        (["digits", "--topology", "v5e:2x4", "--model", "conv1d"], "use mlp"),
        (["digits", "--topology", "v5e:16x16"], "takes 4096 examples, but there are 1437"),
        (["digits"], "--topology"),
    ],
)
def test_a_wrong_argument_exits_with_2_and_says_what_would_be_right(arguments, message, lsgd_compile):
    code, _, errors = lsgd_compile(*arguments)
    assert code == 2
    assert message in errors


def test_without_libtpu_it_says_what_to_install(tmp_path):
    told = ["lsgd: compiling for TPUs needs libtpu: pip install 'jax[tpu]'."]
    assert commands.done("compile", "digits", "--topology", "v5e:2x4", cwd=tmp_path) == (2, told)


def on_hosts(hosts, each=4):
    return [SimpleNamespace(process_index=host) for host in range(hosts) for _ in range(each)]


@pytest.mark.parametrize(
    ("groups", "workers", "right"),
    [(None, None, (3, 4)), (1, None, (1, 12)), (None, 6, (2, 6)), (4, 3, (4, 3))],
)
def test_what_is_not_given_is_filled_so_that_every_device_has_a_worker(groups, workers, right):
    assert spread(groups, workers, on_hosts(3)) == right


@pytest.mark.parametrize(
    ("chips", "workers", "right"), [(2, None, (3, 2)), (4, None, (1, 3)), (6, None, (1, 2)), (2, 3, (2, 3))]
)
def test_groups_are_hosts_if_these_have_several_workers(chips, workers, right):
    assert spread(None, workers, on_hosts(3), chips) == right


def test_chips_that_do_not_divide_the_devices():
    with pytest.raises(UsageError, match="chips_per_worker must divide the 12 devices, got 5"):
        spread(None, None, on_hosts(3), 5)


@pytest.mark.parametrize(("groups", "workers"), [(5, None), (None, 5), (0, None), (None, 24), (1, 4)])
def test_workers_that_do_not_fill_the_devices(groups, workers):
    with pytest.raises(UsageError, match="a worker on each of the 12 devices"):
        spread(groups, workers, on_hosts(3))


def test_what_is_compiled_is_what_train_runs():
    config = PRESETS["mnist1d"].replace(**SMALL)
    placement, feed, model, optimizer = prepare(config)
    state, shared = init_state(model, optimizer, placement), placement.put(feed.shared, SHARED)
    [batch] = rounds(feed, placement, config.period, config.period)
    program = local_steps(config.task, model, optimizer, placement, feed)
    numbers = np.int32(0), np.float32(1), step_key(config.seed)
    trained = program.lower(state, shared, batch, *numbers)
    assert lowered_steps(config, place(config.groups, config.workers)).as_text() == trained.as_text()


@pytest.mark.parametrize("name", ["cnn7-cifar10-16", "resnet50-imagenet-4"])
def test_a_preset_whose_data_are_not_prepared_is_lowered(name):
    config = PRESETS[name].replace(width=0.05, batch_size=2)
    if config.task.is_streamed:
        config = config.replace(image_size=32, model="mlp")
    text = lowered_steps(config, place(config.groups, config.workers)).as_text()
    assert "all_reduce" in text


@pytest.mark.parametrize("name", PRESETS)
def test_the_blank_feed_of_every_preset_takes_no_memory(name):
    config = PRESETS[name]
    feed = blank_feed(config)
    for x in jax.tree.leaves(feed.shared):
        assert set(x.strides) == {0} or name in ("diabetes", "tragedies", "dialects")  # Whose data are small, and here.
    examples = jax.eval_shape(feed.training, feed.shared, feed.batch)
    assert examples == batch_of(feed.example, config.worker_batch_size)
    [batch] = feed.batches(0, 1) if not config.task.is_streamed else [feed.batch]
    assert {x.dtype for x in jax.tree.leaves(batch)} == {x.dtype for x in jax.tree.leaves(feed.batch)}
    assert {x.shape[-1:] for x in jax.tree.leaves(batch)} == {x.shape[-1:] for x in jax.tree.leaves(feed.batch)}
