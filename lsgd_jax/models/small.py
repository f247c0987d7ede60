"""Networks for the embedded data sets."""

import jax
from flax import nnx
from jaxtyping import Array, Float


class Conv1D(nnx.Module):
    """Three strided convolutions and a dense layer, for signals such as MNIST-1D's."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, width: int = 64, rngs: nnx.Rngs) -> None:
        """Make the layers, of `width` channels, for examples of that shape, (length, channels)."""
        length, channels = shape
        self.convolutions: nnx.List = nnx.List([])
        for taps in (5, 3, 3):
            self.convolutions.append(nnx.Conv(channels, width, (taps,), strides=2, rngs=rngs))
            channels, length = width, -(-length // 2)
        self.out = nnx.Linear(length * channels, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch length channels"]) -> Float[Array, "batch classes"]:
        """The logits."""
        for convolution in self.convolutions:
            x = jax.nn.relu(convolution(x))
        return self.out(x.reshape(len(x), -1))


class MLP(nnx.Module):
    """Two hidden layers, for examples of any shape."""

    def __init__(self, shape: tuple[int, ...], classes: int, *, width: int = 64, rngs: nnx.Rngs) -> None:
        """Make the layers, hidden ones of `width` units, for examples of that shape."""
        size = 1
        for side in shape:
            size *= side
        self.hidden = nnx.List([nnx.Linear(size, width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)])
        self.out = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: Float[Array, "batch ..."]) -> Float[Array, "batch classes"]:
        """The logits."""
        x = x.reshape(len(x), -1)
        for layer in self.hidden:
            x = jax.nn.relu(layer(x))
        return self.out(x)
