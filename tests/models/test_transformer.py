"""The transformer against an implementation in NumPy, in float64 and word by word, and what its options change."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsgd_jax.models.transformer import Transformer

SMALL = {"vocabulary": 11, "width": 12, "depth": 2, "heads": 2}
TOKENS = np.random.default_rng(1).integers(11, size=(2, 7))


@pytest.fixture(autouse=True)
def _float32():
    """Products of float32 are rounded to TF32 on GPUs by default."""
    with jax.default_matmul_precision("highest"):
        yield


def made(**options):
    """A small network, its values drawn here so that no two of them are alike."""
    rng = np.random.default_rng(0)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: Transformer(**SMALL | options, rngs=nnx.Rngs(0))))
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.5, leaf.shape), leaf.dtype), params)
    return nnx.merge(graphdef, params)


def values(model):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(nnx.state(model)))


def normed(x, gain):
    return x / math.sqrt(np.mean(x**2) + 1e-6) * gain


def turned(x, position):
    """Pairs of entries, as complex numbers, each turned by the position at a frequency of its own."""
    half = len(x) // 2
    z = (x[:half] + 1j * x[half:]) * np.exp(1j * position / 10_000 ** (np.arange(half) / half))
    return np.concatenate([z.real, z.imag])


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def expected_logits(params, tokens, heads):
    """Of one text: the hidden states of one token after another, each of which sees those before it."""
    embedding, blocks = params["embedding"], params["blocks"]
    width, depth = embedding.shape[1], len(blocks["qkv"])
    seen = [[[] for _ in range(heads)] for _ in range(depth)]
    logits = []
    for position, token in enumerate(tokens):
        x = embedding[token] * math.sqrt(width)
        for b in range(depth):
            of = {name: value[b] for name, value in blocks.items()}
            y, attended = normed(x, of["attention_gain"]), 0
            for h in range(heads):
                q, k, v = (y @ of["qkv"][:, i, h] for i in range(3))
                seen[b][h].append((turned(k, position), v))
                weights = np.exp([turned(q, position) @ k / math.sqrt(len(q)) for k, _ in seen[b][h]])
                values = sum(weight * v for weight, (_, v) in zip(weights / sum(weights), seen[b][h], strict=True))
                attended += values @ of["out"][h]
            x = x + attended
            y = normed(x, of["hidden_gain"])
            up = [y @ of["up"][:, i] for i in range(of["up"].shape[1])]
            x = x + (gelu(up[0]) if len(up) == 1 else up[0] / (1 + np.exp(-up[0])) * up[1]) @ of["down"]
        logits.append(embedding @ normed(x, params["final_gain"]))
    return np.stack(logits)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_the_logits_are_those_of_numpy(activation):
    model = made(activation=activation)
    expected = [expected_logits(values(model), tokens, heads=2) for tokens in TOKENS]
    np.testing.assert_allclose(nnx.jit(model)(TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_parameters_may_be_arrays_of_numpy():
    """As those of a trained network are, which may be called in a compiled function."""
    graphdef, params = nnx.split(made())
    loaded = nnx.merge(graphdef, jax.tree.map(np.asarray, params))
    np.testing.assert_array_equal(jax.jit(lambda tokens: loaded(tokens))(TOKENS), nnx.jit(made())(TOKENS))


def losses_and_gradients(**options):
    graphdef, params = nnx.split(made(**options))

    def loss(params):
        return (nnx.merge(graphdef, params)(TOKENS) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    "options", [{"unroll": False}, {"unroll": None}, {"remat": True}, {"remat": True, "unroll": False}], ids=str
)
def test_how_blocks_are_run_changes_no_loss_and_no_gradient(options):
    results = [losses_and_gradients(**{"activation": "swiglu", "unroll": True} | of) for of in ({}, options)]
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5), *results)


def test_blocks_are_one_loop_but_on_cpus():
    tokens = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    traced = jax.jit(made(depth=3)).trace(tokens)
    loops = {
        name: traced.lower(lowering_platforms=(name,)).as_text().count("stablehlo.while") for name in ("cpu", "tpu")
    }
    assert loops == {"cpu": 0, "tpu": 1}


def test_no_logit_sees_a_later_token():
    text = np.arange(6)
    texts = np.tile(text, (6, 1)) + np.eye(6, dtype=int)  # In each, another token is a different one.
    logits, changed = (nnx.jit(made())(tokens) for tokens in (np.tile(text, (6, 1)), texts))
    np.testing.assert_array_equal((logits != changed).any(2), np.triu(np.ones((6, 6), bool)))


def test_bfloat16_computes_in_it_and_answers_in_float32():
    model, exact = made(dtype=jnp.bfloat16), made()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype(jnp.float32)}
    program = jax.make_jaxpr(model)(TOKENS)
    assert [str(logits) for logits in program.out_avals] == ["float32[2,7,11]"]
    assert "bf16[2,7,12]" in str(program)
    logits, expected = model(TOKENS), exact(TOKENS)
    assert np.abs(logits - expected).max() < 0.05 * np.abs(expected).max()


def test_starts_near_the_loss_of_a_guess():
    model = Transformer(64, width=32, depth=2, heads=2, rngs=nnx.Rngs(0))
    logits = nnx.jit(model)(np.random.default_rng(0).integers(64, size=(4, 16)))
    assert 0.5 < np.std(logits) < 1.5
    tokens = {name: np.std(p) for name, p in nnx.to_pure_dict(nnx.state(model))["blocks"].items()}
    np.testing.assert_allclose(tokens["qkv"], 32**-0.5, rtol=0.05)
    np.testing.assert_allclose(tokens["out"], 32**-0.5 / 2, rtol=0.05)
    np.testing.assert_allclose(tokens["down"], 128**-0.5 / 2, rtol=0.05)


def test_a_billion_parameters_without_memory():
    model = nnx.eval_shape(
        lambda: Transformer(32_768, width=2048, depth=18, heads=16, activation="swiglu", rngs=nnx.Rngs(0))
    )
    shapes = jax.tree.map(lambda p: p.shape, nnx.to_pure_dict(nnx.state(model)))
    assert shapes["blocks"] == {
        "attention_gain": (18, 2048),
        "qkv": (18, 2048, 3, 16, 128),
        "out": (18, 16, 128, 2048),
        "hidden_gain": (18, 2048),
        "up": (18, 2048, 2, 5504),
        "down": (18, 5504, 2048),
    }
    assert shapes["embedding"] == (32_768, 2048)
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model))) == 977_872_896


def test_heads_that_do_not_fit_are_one_sentence():
    with pytest.raises(ValueError, match=r"^width must be a multiple of 2 \* heads, 10, got 12\.$"):
        Transformer(**SMALL | {"heads": 5}, rngs=nnx.Rngs(0))
