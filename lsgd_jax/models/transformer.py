"""Decoder-only transformer for language models, with RMSNorm, rotary position embeddings and tied embeddings.

With x the residual stream, [batch, time, width], a block computes

    x <- x + attention(norm(x)),
    x <- x + f(norm(x)) W_down,   f(y) = gelu(y W_up)   or, with SwiGLU,   silu(y W_gate) * (y W_up).
"""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int
from optax.contrib import MuonDimensionNumbers

from lsgd_jax.distributed import gathered


class Transformer(nnx.Module):
    """Decoder-only transformer: from tokens to logits of the next tokens.

    Sources: RMSNorm, https://arxiv.org/abs/1910.07467; rotary position embeddings, https://arxiv.org/abs/2104.09864;
    SwiGLU, https://arxiv.org/abs/2002.05202. There are no biases and no dropout, and the output layer is the embedding.
    The parameters of all blocks are stacked, with an axis for the block in front.

    Args:
      vocabulary: number of tokens.
      width: width of the residual stream.
      depth: number of blocks.
      heads: attention heads of width / heads each, an even number.
      activation: of the feed-forward layers, "gelu" (hidden width 4 width) or "swiglu" (8/3 width, rounded up to a
        multiple of 64, which has as many parameters).
      remat: whether the backward pass recomputes the activations inside blocks instead of keeping them in memory.
      unroll: whether the blocks are unrolled, which is faster on CPUs, or run by one `lax.scan`, whose program does not
        grow with the depth. None: unrolled on CPUs only.
      dtype: dtype of the computation; parameters, norms, attention weights and logits are float32.
      rngs: random number generators; `params` initializes the parameters.

    Raises:
      ValueError: if the width is not heads times an even number.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        width: int,
        depth: int,
        heads: int,
        activation: Literal["gelu", "swiglu"] = "gelu",
        remat: bool = False,
        unroll: bool | None = None,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        if width % (2 * heads):
            raise ValueError(f"width must be a multiple of 2 * heads, {2 * heads}, got {width}.")
        head, layers = width // heads, 1 if activation == "gelu" else 2
        hidden = 4 * width if activation == "gelu" else -(-8 * width // (3 * 64)) * 64

        def matrix(inputs: int, shape: tuple[int, ...], axes: MuonDimensionNumbers, scale: float = 1.0) -> nnx.Param:
            normal = nnx.initializers.normal(scale * inputs**-0.5)
            return nnx.Param(normal(rngs.params(), (depth, *shape), jnp.float32), muon=axes, stacked=True)

        def gain(*shape: int, stacked: bool = False) -> nnx.Param:
            return nnx.Param(jnp.ones(shape), muon=None, stacked=stacked)

        start = nnx.initializers.normal(width**-0.5)(rngs.params(), (vocabulary, width), jnp.float32)
        self.embedding = nnx.Param(start, muon=None)
        residual = (2 * depth) ** -0.5  # The residual stream starts with the same variance at any depth.
        self.blocks = nnx.Dict(
            attention_gain=gain(depth, width, stacked=True),
            qkv=matrix(width, (width, 3, heads, head), MuonDimensionNumbers(1, (3, 4))),
            out=matrix(width, (heads, head, width), MuonDimensionNumbers((1, 2), 3), residual),
            hidden_gain=gain(depth, width, stacked=True),
            up=matrix(width, (width, layers, hidden), MuonDimensionNumbers(1, 3)),
            down=matrix(hidden, (hidden, width), MuonDimensionNumbers(1, 2), residual),
        )
        self.final_gain = gain(width)
        self.remat, self.unroll, self.dtype = remat, unroll, jnp.dtype(dtype)

    def __call__(self, tokens: Int[Array, "batch time"]) -> Float[Array, "batch time vocabulary"]:
        """Compute the logits of the token after each token."""
        embedding = jnp.asarray(self.embedding[...], self.dtype)
        x = embedding[tokens] * self.embedding.shape[1] ** 0.5
        blocks = jax.tree.map(lambda p: p.astype(self.dtype), nnx.to_pure_dict(nnx.state(self.blocks)))
        if self.unroll is None:
            x = lax.platform_dependent(x, blocks, cpu=partial(self._run, True), default=partial(self._run, False))
        else:
            x = self._run(self.unroll, x, blocks)
        return _product(_norm(x, self.final_gain[...]), embedding.T, dtype=jnp.float32)

    def _run(self, unroll: bool, x: Array, blocks: dict[str, Array]) -> Array:
        """Run all blocks."""
        rotation = _rotation(x.shape[1], blocks["qkv"].shape[-1])

        def block(x: Array, params: dict[str, Array]) -> tuple[Array, None]:
            return _block(x, gathered(params), rotation), None

        if self.remat:
            block = jax.checkpoint(block, prevent_cse=unroll)  # A scan prevents it by itself.
        return lax.scan(block, x, blocks, unroll=unroll)[0]


def _block(x: Array, params: dict[str, Array], rotation: tuple[Array, Array]) -> Array:
    q, k, v = _product(_norm(x, params["attention_gain"]), params["qkv"]).transpose(2, 0, 3, 1, 4)
    attended = _attention(_rotate(q, rotation), _rotate(k, rotation), v)  # [batch, heads, time, head]
    x = x + _product(attended.swapaxes(1, 2), params["out"], axes=2)
    first, *gated = jnp.moveaxis(_product(_norm(x, params["hidden_gain"]), params["up"]), 2, 0)
    hidden = jax.nn.silu(first) * gated[0] if gated else jax.nn.gelu(first)
    return x + _product(hidden, params["down"])


def _product(x: Array, y: Array, axes: int = 1, dtype: jax.typing.DTypeLike | None = None) -> Array:
    """`jnp.tensordot`; on CPUs of matrices, since XLA transposes the operands of gradients of others."""
    whole = partial(jnp.tensordot, axes=axes, preferred_element_type=dtype)

    def of_matrices(x: Array, y: Array) -> Array:
        inputs = math.prod(y.shape[:axes])
        product = whole(x.reshape(-1, inputs), y.reshape(inputs, -1), axes=1)
        return product.reshape(*x.shape[:-axes], *y.shape[axes:])

    return lax.platform_dependent(x, y, cpu=of_matrices, default=whole)


def _attention(q: Array, k: Array, v: Array) -> Array:
    """Causal attention, [batch, heads, time, head].

    `jax.nn.dot_product_attention` leaves it to XLA, too, unless told to use cuDNN. Compiled for a TPU v5e, a network
    with it needs 1.6 times the memory of this one.
    """
    scores = jnp.einsum("bhqk,bhtk->bhqt", q * q.shape[-1] ** -0.5, k, preferred_element_type=jnp.float32)
    scores = jnp.where(np.tri(q.shape[2], dtype=bool), scores, -jnp.inf)
    weights = jnp.exp(scores - lax.stop_gradient(scores.max(-1, keepdims=True)))
    # Dividing after the sum over the values, of which there are fewer than weights, makes the step faster on CPUs.
    values = jnp.einsum("bhqt,bhtk->bhqk", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (values / weights.sum(-1, keepdims=True)).astype(v.dtype)


def _norm(x: Array, gain: Array) -> Array:
    """RMSNorm."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)
    return (y * gain.reshape(1, 1, -1)).astype(x.dtype)


def _rotation(time: int, head: int) -> tuple[Array, Array]:
    """Cosines and sines of the rotary embedding, [1, 1, time, head / 2]."""
    angles = np.arange(time)[None, None, :, None] * 10_000.0 ** (-np.arange(0, head, 2) / head)
    return jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)


def _rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotary position embedding: rotate pairs of entries, half a head apart, by angles proportional to the position."""
    cos, sin = rotation
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
