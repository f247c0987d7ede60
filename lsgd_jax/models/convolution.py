"""Convolution that is fast on a CPU: standalone, inside loops, and with per-worker kernels.

On a CPU, XLA uses its fast kernel for a convolution only if the operands are channels last. It transposes them in the
main computation of a program, but not in the body of a loop. There, the gradients of a convolution, which come in
another layout, take an order of magnitude longer; where they are fast, a matrix product is still faster. `jax.vmap`
over kernels makes a grouped convolution, which has no fast kernel at all.

Therefore, gradients here are matrix products or channels-last convolutions, and `jax.vmap` makes one convolution per
worker. A matrix product is over the receptive fields of a few examples at a time, which stay in a core's cache: writing
those of a whole batch to memory and reading them again takes longer than the product itself. The values are those of
`jax.lax.conv_general_dilated`, up to rounding.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Float

Pads: TypeAlias = tuple[tuple[int, int], ...]
CACHE = 2**20
"""Bytes that a core's cache is taken to hold."""


def convolve(
    x: Float[Array, "batch *in_space in_channels"],
    kernel: Float[Array, "*taps in_channels out_channels"],
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    *,
    dimension_numbers: lax.ConvDimensionNumbers,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    feature_group_count: int = 1,
    **options: Any,
) -> Float[Array, "batch *out_space out_channels"]:
    r"""`jax.lax.conv_general_dilated` for `flax.nnx.Conv(..., conv_general_dilated=convolve)`, fast on a CPU.

    .. math:: y_o = \sum_k x_{o \cdot stride + k - before} \, kernel_k,

    where o is a position of the output, k one of the kernel, and `before` the padding. On other platforms it is JAX's
    own convolution. The platform is the one that the program is lowered for, so a program compiled on a CPU host for
    TPUs also uses JAX's own. With dilations, groups or further options, JAX's own is used everywhere. On a CPU,
    there is no forward-mode derivative.

    Args:
      x: examples, channels last, with one or two spatial axes.
      kernel: kernel with the dtype of `x`.
      strides: stride per spatial axis.
      padding: "SAME", "VALID", or the padding before and after, per spatial axis.
      dimension_numbers: dimension numbers for channels last.
      lhs_dilation: input dilation per spatial axis.
      rhs_dilation: kernel dilation per spatial axis.
      feature_group_count: number of groups.
      **options: further options of `jax.lax.conv_general_dilated`; None if unused.
    """
    stock = partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        **options,
    )
    dilated = any(dilation != 1 for dilation in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    if dilated or feature_group_count != 1 or any(option is not None for option in options.values()):
        return stock(x, kernel)
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:-1], kernel.shape[:-2], strides, padding)
    x, kernel = _varying_like(x, kernel), _varying_like(kernel, x)
    fast = partial(_convolution, tuple(strides), tuple(padding))
    return lax.platform_dependent(x, kernel, cpu=fast, default=stock)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _convolution(strides: tuple[int, ...], pads: Pads, x: Array, kernel: Array) -> Array:
    def output(x: Array, kernel: Array) -> Array:
        if _keeps_size(kernel, strides, pads):
            return _channels_last(x, kernel, pads)

        def fields(x: Array) -> Array:
            return _fields(x, kernel.shape[:-2], strides, pads)

        return _by_chunk(lambda x: fields(x) @ kernel.reshape(-1, kernel.shape[-1]), fields, x)

    return by_worker(output)(x, kernel)


def _forward(strides: tuple[int, ...], pads: Pads, x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _convolution(strides, pads, x, kernel), (x, kernel)


def _backward(strides: tuple[int, ...], pads: Pads, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    taps, shape = kernel.shape[:-2], x.shape

    def x_gradient(g: Array, kernel: Array) -> Array:
        if _keeps_size(kernel, strides, pads):
            reverse = jnp.flip(kernel, range(len(taps))).swapaxes(-1, -2)
            return _channels_last(g, reverse, [(after, before) for before, after in pads])

        def fields(g: Array) -> Array:
            return jnp.matmul(g, kernel.reshape(-1, kernel.shape[-1]).T, preferred_element_type=_wide(g))

        def gradient(g: Array) -> Array:
            return _spread(fields(g), (len(g), *shape[1:]), taps, strides, pads).astype(g.dtype)

        return _by_chunk(gradient, fields, g)

    def kernel_gradient(x: Array, g: Array) -> Array:
        if not _splits(kernel, strides, pads):
            return _sum_of_products(lambda x, g: (_fields(x, taps, strides, pads), g), x, g).reshape(kernel.shape)
        # Fields of x along one axis, and along the other those of g: less to copy, and a squarer product.
        (height, width), (before, after) = taps, pads[0]

        def fields(x: Array, g: Array) -> tuple[Array, Array]:
            rows = _fields(x, (1, width), strides, ((0, 0), pads[1]))
            return rows, _fields(g, (height, 1), strides, ((after, before), (0, 0)))

        product = _sum_of_products(fields, x, g).reshape(width, x.shape[-1], height, g.shape[-1])
        return jnp.flip(product.transpose(2, 0, 1, 3), 0)

    return by_worker(x_gradient)(g, kernel), by_worker(kernel_gradient)(x, g)


_convolution.defvjp(_forward, _backward)


def _varying_like(y: Array, other: Array) -> Array:
    """Type y as device-varying in `jax.shard_map` if `other` is, so that its gradients are summed."""
    return jnp.where(jnp.ones_like(other, bool, shape=()), y, y)


def _keeps_size(kernel: Array, strides: tuple[int, ...], pads: Pads) -> bool:
    """Return whether the output is as large as x; if smaller, the gradient as a convolution multiplies mostly zeros."""
    return set(strides) == {1} and all(sum(pad) == taps - 1 for pad, taps in zip(pads, kernel.shape, strict=False))


def _splits(kernel: Array, strides: tuple[int, ...], pads: Pads) -> bool:
    """Whether fields of x along one axis and of its gradient along the other are smaller than those along both."""
    if kernel.ndim != 4 or not _keeps_size(kernel, strides, pads):
        return False
    height, width, inputs, outputs = kernel.shape
    return width * inputs + height * outputs < height * width * inputs


def _sum_of_products(fields: Callable[[Array, Array], tuple[Array, Array]], x: Array, g: Array) -> Array:
    """The matrix product of the fields of x and of g along their last axes, summed over all others."""

    def product(x: Array, g: Array) -> Array:
        left, right = (of.reshape(-1, of.shape[-1]) for of in fields(x, g))
        return jnp.matmul(left.T, right, preferred_element_type=_wide(g))

    chunks = _chunks(fields, x, g)
    if len(chunks[0]) == 1:
        return product(x, g).astype(g.dtype)
    left, right = jax.eval_shape(fields, x, g)
    zeros = jnp.zeros_like(g, _wide(g), shape=(left.shape[-1], right.shape[-1]))
    return lax.scan(lambda total, chunk: (total + product(*chunk), None), zeros, chunks)[0].astype(g.dtype)


def _wide(x: Array) -> np.dtype:
    """The dtype in which numbers are summed, which are then rounded once."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _by_chunk(function: Callable[[Array], Array], fields: Callable, examples: Array) -> Array:
    """Apply a function that makes these fields to a chunk of the examples at a time."""
    (chunks,) = _chunks(fields, examples)
    if len(chunks) == 1:
        return function(examples)
    results = lax.map(function, chunks)
    return results.reshape(len(examples), *results.shape[2:])


def _chunks(fields: Callable, *examples: Array) -> list[Array]:
    """Examples in chunks, [chunks, examples, ...], whose fields stay in a core's cache."""
    made, batch = jax.tree.leaves(jax.eval_shape(fields, *examples)), len(examples[0])
    size = sum(of.size * of.dtype.itemsize for of in made)
    chunk = max((n for n in range(1, batch + 1) if batch % n == 0 and n * size <= batch * CACHE), default=1)
    return [x.reshape(batch // chunk, chunk, *x.shape[1:]) for x in examples]


def _channels_last(x: Array, kernel: Array, pads: Sequence[tuple[int, int]]) -> Array:
    space = "HW"[: len(pads)]
    order = (f"N{space}C", f"{space}IO", f"N{space}C")
    return lax.conv_general_dilated(x, kernel, (1,) * len(pads), pads, dimension_numbers=order)


def _fields(x: Array, taps: Sequence[int], strides: Sequence[int], pads: Pads) -> Array:
    """Receptive field of each output in x: [batch, *out_space, taps x in_channels]."""
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*pad, 0) for pad in pads), (0, 0, 0)])
    last = [max(size - taps, -1) for size, taps in zip(x.shape[1:-1], taps, strict=True)]

    def seen_by(tap: tuple[int, ...]) -> Array:
        slices = (slice(start, end + start + 1, stride) for start, end, stride in zip(tap, last, strides, strict=True))
        return x[:, *slices]

    return jnp.concatenate([seen_by(tap) for tap in np.ndindex(*taps)], -1)


def _spread(
    fields: Array, shape: tuple[int, ...], taps: tuple[int, ...], strides: tuple[int, ...], pads: Pads
) -> Array:
    """The transpose of `_fields` for an x of this shape: the fields, summed where they overlap."""
    if set(strides) != {1} or min(min(pad) for pad in pads) < 0:
        # At a point that varies over the workers as the fields do.
        _, transposed = jax.vjp(lambda x: _fields(x, taps, strides, pads), jnp.zeros_like(fields, shape=shape))
        return transposed(fields)[0]
    sizes = [size + sum(pad) for size, pad in zip(shape[1:-1], pads, strict=True)]
    x = jnp.zeros_like(fields, shape=(shape[0], *sizes, shape[-1]))
    for tap, of_tap in zip(np.ndindex(*taps), jnp.split(fields, math.prod(taps), -1), strict=True):
        seen = (slice(start, start + size) for start, size in zip(tap, fields.shape[1:-1], strict=True))
        x = x.at[:, *seen].add(of_tap)  # In place: faster than a sum of arrays of zeros around each.
    return x[:, *(slice(before, before + size) for (before, _), size in zip(pads, shape[1:-1], strict=True))]


def by_worker(function: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """Wrap a function so that `jax.vmap` makes one call per worker."""
    call = custom_vmap(function)

    @call.def_vmap
    def calls(workers: int, batched: Sequence[bool], *operands: Array) -> tuple[Array, bool]:
        def of(worker: int) -> Array:
            return call(*(x[worker] if own else x for x, own in zip(operands, batched, strict=True)))

        return jnp.stack([of(worker) for worker in range(workers)]), True

    return call
