"""The networks and the training step of `benchmarks.speed.training` in PyTorch, channels last."""

from collections.abc import Callable

import jax
import numpy as np
import torch
from flax import nnx
from torch import nn
from torch.nn import functional

from benchmarks.speed.training import LEARNING_RATE, MOMENTUM, TRANSFORMER, WEIGHT_DECAY
from lsgd_jax.models import transformer


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.extra = stride, outputs - inputs
        self.correction = nn.Sequential(
            *(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()),
            *(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the block's output."""
        shortcut = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return functional.relu(shortcut + self.correction(x))


class TransformerBlock(nn.Module):
    """Attention with rotary position embeddings, and a feed-forward layer, each on a normed residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.hidden_norm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Compute the residual stream after the block."""

        def rotate(x: torch.Tensor) -> torch.Tensor:
            a, b = x.float().chunk(2, -1)
            return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).type_as(x)

        q, k, v = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.hidden_norm(x)), approximate="tanh"))


class Transformer(nn.Module):
    """Decoder-only transformer with tied embeddings; its attention is PyTorch's fused one."""

    def __init__(self, vocabulary: int, *, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.frequencies: torch.Tensor
        self.register_buffer("frequencies", 10_000.0 ** (-torch.arange(0, width // heads, 2) / (width // heads)), False)

    @staticmethod
    def like(model: transformer.Transformer) -> "Transformer":
        """The transformer with the parameters of one of `lsgd_jax.models`, with gelu."""
        values = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
        blocks = values["blocks"]
        depth, width, _, heads, _ = blocks["qkv"].shape
        layers = {
            "attention_norm": blocks["attention_gain"],
            "qkv": blocks["qkv"].reshape(depth, width, -1).swapaxes(1, 2),
            "out": blocks["out"].reshape(depth, width, width).swapaxes(1, 2),
            "hidden_norm": blocks["hidden_gain"],
            "up": blocks["up"].reshape(depth, width, -1).swapaxes(1, 2),
            "down": blocks["down"].swapaxes(1, 2),
        }
        own = Transformer(len(values["embedding"]), width=width, depth=depth, heads=heads)
        weights = {f"blocks.{i}.{name}.weight": x[i] for name, x in layers.items() for i in range(depth)}
        weights |= {"embedding.weight": values["embedding"], "norm.weight": values["final_gain"]}
        own.load_state_dict({name: torch.tensor(x) for name, x in weights.items()})
        return own

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Compute the logits of the token after each token."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        x = self.embedding(tokens) * self.embedding.embedding_dim**0.5
        for block in self.blocks:
            x = block(x, cos, sin)
        return functional.linear(self.norm(x), self.embedding.weight)


def network(name: str, classes: int) -> nn.Module:
    """A network with the layers of that of the same name in `lsgd_jax.models`; CNN7 for images of 28 x 28."""
    if name == "CNN7":
        return nn.Sequential(
            *(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 128, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(128, 64, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 256), nn.ReLU(), nn.Dropout(0.5)),
            nn.Linear(256, classes),
        )
    if name == "ResNet20":
        sizes = ((16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2))
        return nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(BasicBlock(*size) for size in (*sizes, (64, 64, 1), (64, 64, 1))),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)),
        )
    if name == "Transformer":
        return Transformer(classes, **TRANSFORMER)
    from torchvision.models import resnet50

    return resnet50(num_classes=classes)


def torch_program(
    model: nn.Module,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    steps: int = 1,
    dtype: str = "float32",
    mode: str | None = None,
) -> Callable[[], None]:
    """A program that takes some training steps and waits for the last.

    Args:
      model: to train; parameters are float32.
      x: examples, on the device on which to train.
      y: labels.
      steps: how many.
      dtype: of the computation; "bfloat16" is autocast's.
      mode: of `torch.compile` for loss and gradients; None: eager.
    """
    model.to(x.device, memory_format=torch.channels_last)
    on_gpu = x.device.type == "cuda"
    optimizer = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY, fused=on_gpu or None
    )

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            return functional.cross_entropy(model(x).flatten(0, -2), y.flatten())

    compiled = loss if mode is None else torch.compile(loss, mode=mode)

    def run() -> None:
        for _ in range(steps):
            if mode == "reduce-overhead":  # With CUDA graphs.
                torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            compiled(x, y).backward()
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()

    return run
