# SPDX-License-Identifier: Apache-2.0
"""Small networks, written once for every normalizer.

``norm(layer=..., train=...)`` makes the module that runs a layer and normalizes its output.
A method that also activates has ``norm.active(layer=..., train=...)`` in place of norm and
ReLU. Layers compute in ``dtype``, as in ``nn.Dense``. Parameters and logits are always
float32.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    from flax import linen as nn

NormFn = Callable[..., nn.Module]


def active(norm: NormFn, layer: nn.Module, train: bool) -> Callable[[jax.Array], jax.Array]:
    """Layer, norm and ReLU, or the method's replacement of norm and ReLU."""
    make: NormFn | None = getattr(norm, "active", None)
    if make is not None:
        return make(layer=layer, train=train)
    normalized = norm(layer=layer, train=train)
    return lambda z: nn.relu(normalized(z))


class MLP(nn.Module):
    """Normalized dense layers of one width."""

    norm: NormFn
    classes: int
    width: int = 128
    depth: int = 3
    normalize_last: bool = False  # after the activation; for methods without a source
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits ``[N, classes]``."""
        z = images.reshape(len(images), -1)
        for _ in range(self.depth):
            layer = nn.Dense(self.width, self.normalize_last, self.dtype)
            if self.normalize_last:
                z = self.norm(layer=None, train=train)(nn.relu(layer(z)))
            else:
                z = active(self.norm, layer, train)(z)
        return _logits(self, z)


class ResidualCNN(nn.Module):
    """A stem and residual blocks of two 3x3 convolutions; stages halve the image."""

    norm: NormFn
    classes: int
    width: int = 16
    stages: int = 3
    blocks: int = 1
    stem_stride: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits ``[N, classes]``."""

        def layer(features: int, size: int = 3, stride: int = 1) -> nn.Module:
            return nn.Conv(features, (size, size), stride, use_bias=False, dtype=self.dtype)

        def conv(*options: int):
            return self.norm(layer=layer(*options), train=train)

        z = active(self.norm, layer(self.width, 3, self.stem_stride), train)(images)
        for stage, block in itertools.product(range(self.stages), range(self.blocks)):
            features = self.width * 2**stage
            stride = 2 if stage > 0 and block == 0 else 1
            shortcut = z if stride == 1 else conv(features, 1, stride)(z)
            z = active(self.norm, layer(features, 3, stride), train)(z)
            z = nn.relu(shortcut + conv(features)(z))
        return _logits(self, z.mean((1, 2)))


class UNet(nn.Module):
    """Predicts a class for every position: strides down, transposed convolutions up.

    On the way up, each level adds its activations from the way down.
    """

    norm: NormFn
    classes: int
    width: int = 16
    levels: int = 3
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits ``[N, *space, classes]``; sides divide by 2 ** (levels − 1)."""
        rank = images.ndim - 2

        def conv(features: int, stride: int = 1):
            size, strides = (3,) * rank, (stride,) * rank
            layer = nn.Conv(features, size, strides, use_bias=False, dtype=self.dtype)
            return active(self.norm, layer, train)

        def up(features: int):
            sides = (2,) * rank
            layer = nn.ConvTranspose(
                features, sides, sides, use_bias=False, dtype=self.dtype
            )
            return active(self.norm, layer, train)

        z, left = conv(self.width)(images), []
        for level in range(1, self.levels):
            left.append(z)
            z = conv(self.width * 2**level)(conv(self.width * 2**level, 2)(z))
        for level in reversed(range(self.levels - 1)):
            z = up(self.width * 2**level)(z) + left[level]
            z = conv(self.width * 2**level)(z)
        return _logits(self, z)


class PreActivation(nn.Module):
    """Residual blocks that normalize the sum, so that norms have no layer before them."""

    norm: NormFn
    classes: int
    width: int = 16
    stages: int = 3
    blocks: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits ``[N, classes]``."""

        def active(z: jax.Array) -> jax.Array:
            return nn.relu(self.norm(layer=None, train=train)(z))

        def conv(features: int, size: int = 3, stride: int = 1):
            return nn.Conv(features, (size, size), stride, use_bias=False, dtype=self.dtype)

        z = conv(self.width)(images)
        for stage, block in itertools.product(range(self.stages), range(self.blocks)):
            features = self.width * 2**stage
            stride = 2 if stage > 0 and block == 0 else 1
            y = active(z)
            shortcut = z if stride == 1 else conv(features, 1, stride)(y)
            z = shortcut + conv(features)(active(conv(features, 3, stride)(y)))
        return _logits(self, active(z).mean((1, 2)))


class BottleneckResNet(nn.Module):
    """A stem for large images and bottleneck blocks: the standard ResNet-50."""

    norm: NormFn
    classes: int
    width: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    dtype: Any = None

    @nn.compact
    def __call__(self, images: jax.Array, train: bool) -> jax.Array:
        """Logits ``[N, classes]``."""

        def conv(features: int, size: int = 1, stride: int = 1):
            layer = nn.Conv(
                features, (size, size), stride, use_bias=False, dtype=self.dtype
            )
            return self.norm(layer=layer, train=train)

        z = nn.relu(conv(self.width, 7, 2)(images))
        z = nn.max_pool(z, (3, 3), (2, 2), "SAME")
        for stage, blocks in enumerate(self.blocks):
            for block in range(blocks):
                features = self.width * 2**stage
                stride = 2 if stage > 0 and block == 0 else 1
                shortcut = z if block else conv(4 * features, 1, stride)(z)
                z = nn.relu(conv(features)(z))
                z = nn.relu(conv(features, 3, stride)(z))
                z = nn.relu(shortcut + conv(4 * features)(z))
        return _logits(self, z.mean((1, 2)))


def _logits(network: nn.Module, z: jax.Array) -> jax.Array:
    return nn.Dense(network.classes, dtype=network.dtype)(z).astype(jnp.float32)


NETWORKS = {
    "mlp": MLP,
    "cnn": ResidualCNN,
    "cnn_halved": functools.partial(ResidualCNN, stem_stride=2),  # for 28x28
    "mlp300": functools.partial(MLP, width=300, depth=2),
    "mlp300_normalized_last": functools.partial(
        MLP, width=300, depth=2, normalize_last=True
    ),
    "resnet20": functools.partial(ResidualCNN, blocks=3),
    "unet": UNet,
    "deep": functools.partial(ResidualCNN, width=16, stages=4, blocks=2),
    "preactivation": PreActivation,
    "stage": functools.partial(ResidualCNN, width=64, stages=1, blocks=2),
    "resnet18": functools.partial(ResidualCNN, width=64, stages=4, blocks=2),
    "resnet50": BottleneckResNet,
}
