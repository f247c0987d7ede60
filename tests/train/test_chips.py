"""Training runs whose workers are spread over several chips, on eight simulated devices."""

import dataclasses
import json
import math
import shutil
from functools import partial
from unittest.mock import ANY

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lsgd_jax import train
from lsgd_jax.config import Config
from lsgd_jax.costs.collectives import collectives
from lsgd_jax.costs.ledger import bytes_sent, exchanges, share_bytes, shares
from lsgd_jax.distributed import CHIP, SHARED, over_chips, place, value_and_gradient
from lsgd_jax.errors import UsageError
from lsgd_jax.exchange import largest_axis
from lsgd_jax.models.transformer import Transformer
from lsgd_jax.presets import PRESETS
from lsgd_jax.simulate.cluster import Cluster, collective_costs, server_costs
from lsgd_jax.tracking.run_folder import read_metrics
from lsgd_jax.train import setup
from lsgd_jax.train.compile_ahead import parameter_shapes
from lsgd_jax.train.saved_arrays import Part, SavedArray, joined
from lsgd_jax.train.step import init_state, local_steps, state_shapes
from lsgd_jax.trained import load_trained
from tests.reliability import commands, faults

WHOLE = PRESETS["digits"].replace(
    groups=2, workers=2, batch_size=8, width=0.5, steps=16, eval_every=8, period=2, global_period=4
)
SPREAD = dataclasses.replace(WHOLE, chips_per_worker=2)
FOUR = dataclasses.replace(WHOLE, groups=1, global_period=None, chips_per_worker=4)


def run(config, path, **options):
    train.train_and_evaluate(config, path, lines=False, **options)
    return read_metrics(path, "exchange"), read_metrics(path, "evaluation")


def assert_same_course(found, expected):
    """The same leaders, and up to rounding the same numbers; bytes are per chip."""
    for entry, same in zip(found[0], expected[0], strict=True):
        for name in ("step", "leader", "local_leaders"):
            assert entry.get(name) == same.get(name)
        np.testing.assert_allclose(entry["scores"], same["scores"], rtol=1e-4)
    for entry, same in zip(found[1], expected[1], strict=True):
        assert entry["worker_errors"] == same["worker_errors"]
        np.testing.assert_allclose(entry["center_loss"], same["center_loss"], rtol=1e-4)


@pytest.fixture(scope="module")
def spread(tmp_path_factory):
    """The folder of a run with workers of 2 chips, made from the command line, and what is in it."""
    folder = tmp_path_factory.mktemp("runs")
    names = ("groups", "workers", "chips_per_worker", "batch_size", "width", "steps", "eval_every", "period")
    options = [text for name in names for text in (f"--{name.replace('_', '-')}", str(SPREAD.flat[name]))]
    command = ["train", "digits", *options, "--global-period", "4", "--run-dir", "spread"]
    assert commands.done(*command, cwd=folder) == (0, ANY)
    path = folder / "spread"
    assert Config.load(path) == SPREAD
    return path, (read_metrics(path, "exchange"), read_metrics(path, "evaluation"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(WHOLE, tmp_path_factory.mktemp("runs") / "whole")


def test_workers_of_two_chips_train_as_workers_of_one(spread, whole):
    _, found = spread
    assert_same_course(found, whole)
    sent, of_whole = (evaluations[-1]["bytes_sent"] for _, evaluations in (found, whole))
    assert 0.5 * of_whole <= sent < 0.51 * of_whole


@pytest.mark.parametrize("config", [WHOLE, FOUR], ids=["1 chip", "4 chips"])
def test_a_run_resumes_with_other_chips(config, spread, whole, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(spread[0], path)
    shutil.rmtree(path / "checkpoints" / "16")
    found = run(config, path, resume=True)
    assert f"chips of each worker: {config.chips_per_worker}, before 2" in capsys.readouterr().err
    assert len(load_trained(path).workers) == config.groups * config.workers
    assert np.isfinite(found[1][-1]["center_loss"])
    if config == WHOLE:
        assert_same_course(found, whole)
    # What each chip sent before counts, and from then on what each of the present chips sends.
    of_spread = spread[1][1][0]["bytes_sent"]
    params = parameter_shapes(config)
    since = bytes_sent(config, params, 16) - bytes_sent(config, params, 8)
    np.testing.assert_allclose([entry["bytes_sent"] for entry in found[1]], [of_spread, of_spread + since])


def test_a_worker_may_span_processes(tmp_path):
    """Each of two processes has one of the worker's chips and saves its part; one process resumes from both."""
    config = dataclasses.replace(FOUR, workers=1, chips_per_worker=2, steps=8)
    longer = dataclasses.replace(config, chips_per_worker=1, steps=16)
    faults.trained(config, tmp_path / "run", 2)
    assert_same_course(run(longer, tmp_path / "run", resume=True), run(longer, tmp_path / "whole"))


def compiled(config):
    """The collectives of the training program, and one worker's parameters."""
    placement, feed, model, optimizer = setup.prepare(config)
    state, shared = init_state(model, optimizer, placement), placement.put(feed.shared, SHARED)
    batch = next(setup.rounds(feed, placement, config.steps, setup.steps_per_call(config)))
    program = local_steps(config.task, model, optimizer, placement, feed)
    lowered = program.lower(state, shared, batch, np.int32(0), np.float32(1), setup.step_key(0))
    return collectives(lowered.compile().as_text(), config.chips_per_worker), nnx.state(model, nnx.Param)


@pytest.mark.parametrize(
    "options",
    [
        {"broadcast": "ring"},
        {"wire": "int8"},
        {"method": "easgd"},
    ],
    ids=str,
)
def test_the_ledger_knows_what_each_chip_sends(options):
    config = SPREAD.replace(period=1, eval_every=1, **options)
    found, params = compiled(config)
    among = [each for each in found if each.conditional and not each.within_worker]
    sent = sum(each.sent * each.times for each in among)
    expected = sum(exchange.bytes_sent for exchange in exchanges(config, params))
    if config.method == "easgd":  # The average of the starts.
        expected += bytes_sent(config, params, 1) - expected
    np.testing.assert_allclose(sent, expected, rtol=1e-9)
    # In an exchange, a worker's chips send each other scalars alone, and for int8 the scales that they share.
    within = [each for each in found if each.conditional and each.within_worker]
    assert {each.kind for each in within} <= {"all-reduce"}
    assert sum(each.bytes for each in within) < 0.05 * share_bytes(config, params)


@pytest.mark.parametrize(
    "options", [{"local_optimizer": "adamw", "learning_rate": 0.01}, {"method": "diloco"}], ids=str
)
def test_a_chip_holds_its_share_of_the_optimizer_state_too(options):
    placement, _, model, optimizer = setup.prepare(SPREAD.replace(**options))
    shapes = state_shapes(model, optimizer, placement)
    for part in (shapes.params, shapes.optimizer):
        held = sum(math.prod(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(part))
        whole = sum(math.prod(x.shape[2:]) for x in jax.tree.leaves(part))
        assert 0.5 * whole <= held < 0.51 * whole


def test_a_chip_keeps_neither_gathered_weights_nor_what_is_rematerialized():
    """Weights are gathered a second time for the backward pass, and `jax.checkpoint` has its effect."""
    mesh = jax.make_mesh((1, 2), ("worker", CHIP), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2])
    rng = np.random.default_rng(0)
    weights, x = (0.2 * rng.normal(size=shape).astype(np.float32) for shape in ((6, 32, 32), (512, 32)))

    def block(x, w):
        return jnp.sin(jnp.sin(jnp.cos(x) @ w) @ w), None

    def loss_of(x, block, dtype):
        def loss(w):
            y, _ = jax.lax.scan(block, x.astype(dtype), w.astype(dtype))
            return jnp.sum(y.astype(np.float32) ** 2), y

        return loss

    def run(block, dtype):
        """Bytes gathered and held, as the compiled program has them; loss, last activations and gradient."""
        program = jax.shard_map(
            lambda w, x: value_and_gradient(loss_of(over_chips(x), block, dtype))(w),
            mesh=mesh,
            in_specs=P(),
            out_specs=P(),
            axis_names={"worker"},
        )
        sharded = jax.device_put(weights, NamedSharding(mesh, P(None, CHIP)))
        compiled = jax.jit(program).lower(sharded, x).compile()
        gathered = sum(
            each.sent * each.times for each in collectives(compiled.as_text(), 2) if each.kind == "all-gather"
        )
        return gathered, compiled.memory_analysis().temp_size_in_bytes, compiled(sharded, x)

    results = {
        (dtype, name): run(function, dtype)
        for dtype in ("float32", "bfloat16")
        for name, function in (("plain", block), ("remat", jax.checkpoint(block, prevent_cse=False)))
    }
    for dtype in ("float32", "bfloat16"):
        (gathered, held, _), (gathered_too, rest, _) = results[dtype, "plain"], results[dtype, "remat"]
        assert gathered == gathered_too == 2 * weights.nbytes / 2  # Twice, and each time a chip sends its half.
        assert rest < 0.6 * held
    found = results["float32", "remat"][2]
    expected = jax.jit(jax.value_and_grad(loss_of(x, block, "float32"), has_aux=True))(weights)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4), found, expected)


@pytest.mark.parametrize("remat", [True, False])
def test_stacked_layers_are_gathered_one_after_the_other(remat):
    model = Transformer(16, width=32, depth=4, heads=2, remat=remat, unroll=False, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    tokens = np.random.default_rng(0).integers(16, size=(8, 6))

    def loss(params, tokens):
        logits = nnx.merge(graphdef, params)(tokens)
        return jnp.mean(logits**2), logits[0, 0, 0]

    mesh = jax.make_mesh((1, 2), ("worker", CHIP), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:2])
    sharded = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), params, largest_axis(params, CHIP, 2)
    )
    program = jax.shard_map(
        lambda params, tokens: value_and_gradient(lambda params: loss(params, over_chips(tokens)))(params),
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        axis_names={"worker"},
    )
    compiled = jax.jit(program).lower(sharded, tokens).compile()
    gathered = [
        each.bytes for each in collectives(compiled.as_text(), 2) if each.kind == "all-gather" and each.times > 1
    ]
    largest = params["blocks"]["up"][...].nbytes // 4
    assert gathered.count(largest) >= (2 if remat else 1)  # Of the forward and of the backward pass.
    assert max(gathered) == largest
    expected = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, tokens)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), compiled(sharded, tokens), expected)


def test_the_simulator_sends_what_a_chip_holds():
    cluster = Cluster(local_latency=0, global_latency=0)
    params = jax.ShapeDtypeStruct((100_000,), np.float32)
    for costs in (collective_costs, server_costs):
        for spread, whole in zip(*(costs(config, cluster, params) for config in (SPREAD, WHOLE)), strict=True):
            assert 0.5 * whole.bytes_sent <= spread.bytes_sent < 0.501 * whole.bytes_sent
            assert 0.499 * whole.nanoseconds <= spread.nanoseconds < 0.501 * whole.nanoseconds


def test_what_a_chip_holds():
    params = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in {"w": (3, 8), "b": (5,)}.items()}
    assert [(share.shape, share.is_sharded) for share in shares(FOUR, params)] == [((5,), False), ((3, 2), True)]
    assert share_bytes(FOUR, params) == 4 * (5 + 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chips_per_worker": 0}, "chips_per_worker must be at least 1, got 0."),
        ({"chips_per_worker": 2, "asynchronous": "posted"}, "chips_per_worker must be 1 if asynchronous, got 2."),
    ],
)
def test_a_configuration_that_no_run_can_have(changes, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        WHOLE.replace(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"chips_per_worker": 4},
            "4 workers of 4 chips each need 16 devices, but there are 8: lower",
        ),
        (
            {"chips_per_worker": 7, "groups": 1, "workers": 1, "batch_size": 7},
            "must divide an axis of some",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(changes, message):
    with pytest.raises(UsageError, match=message):
        setup.prepare(WHOLE.replace(**changes))


def test_the_chips_of_a_worker_divide_its_batch():
    with pytest.raises(ValueError, match="chips_per_worker must be a divisor of the 7 examples of a worker, got 2"):
        WHOLE.replace(chips_per_worker=2, batch_size=7)


def test_a_worker_lies_in_whole_processes_or_processes_in_whole_workers():
    @dataclasses.dataclass(frozen=True)
    class Device:
        process_index: int
        id: int

    def placed(groups, workers, chips, each=4):
        devices = [Device(process, process * each + i) for process in range(4) for i in range(each)]
        return place(groups, workers, devices, chips=chips).mesh.devices

    assert [device.id for device in placed(2, 2, 4)[1, 0]] == [8, 9, 10, 11]
    assert [device.process_index for device in placed(1, 2, 8)[0, 1]] == [2, 2, 2, 2, 3, 3, 3, 3]
    assert [device.id for device in placed(1, 4, 2)[0].flat] == [0, 1, 4, 5, 8, 9, 12, 13]
    for groups, workers, chips in ((1, 3, 2), (1, 6, 2)):
        with pytest.raises(UsageError, match=f"{workers} workers of {chips} chips each can't be distributed evenly"):
            placed(groups, workers, chips)


def test_parts_of_workers_are_joined():
    """Of three processes, of which two have saved the same of what all chips hold."""
    arrays = [SavedArray("w", "float32", (2, 6)), SavedArray("n", "int32", ()), SavedArray("b", "bfloat16", (3,))]
    w, n, b = np.arange(12, dtype=np.float32).reshape(2, 6), np.int32(7), jax.numpy.arange(3, dtype="bfloat16")

    def part(first, last, **changes):
        rows = [np.asarray(x).tobytes() for x in (w[:, first:last], n, b)]
        ends = np.array([(0, 2), (first, last), (0, 3)])
        return Part(**{"row": np.frombuffer(b"".join(rows), np.uint8), "ends": ends} | changes)

    whole = joined([part(0, 2), part(4, 6), part(2, 4)], arrays)
    for found, expected in zip(whole, (w, n, b), strict=True):
        np.testing.assert_array_equal(found, expected)
        assert found.dtype == expected.dtype
    for parts, message in (
        ([part(0, 2), part(4, 6)], "parts of a worker are missing"),
        ([part(0, 2), part(0, 2), part(0, 2)], "parts of a worker are missing"),
        ([part(0, 6, ends=np.array([(0, 2), (-6, 0), (0, 3)]))], "parts of other arrays"),
        ([part(0, 6, ends=np.array([(0, 2), (0, 6)]))], "parts of other arrays"),
        ([part(0, 6, row=np.zeros(62, np.uint8))], "more bytes than the arrays take"),
    ):
        with pytest.raises(ValueError, match=message):
            joined(parts, arrays)


def test_a_configuration_of_before_has_workers_of_one_chip():
    fields = json.loads(WHOLE.to_json())
    del fields["chips_per_worker"]
    assert Config.from_json(json.dumps(fields)) == WHOLE
