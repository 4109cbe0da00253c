# SPDX-License-Identifier: Apache-2.0
"""Small networks, written once for every normalizer.

``norm(layer=..., train=...)`` makes the module that runs a layer and normalizes it. Layers
compute in ``dtype``, as in ``nn.Dense``; parameters and logits are float32 in any case.
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
                z = nn.relu(self.norm(layer=layer, train=train)(z))
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

        def conv(features: int, size: int = 3, stride: int = 1):
            layer = nn.Conv(
                features, (size, size), stride, use_bias=False, dtype=self.dtype
            )
            return self.norm(layer=layer, train=train)

        z = nn.relu(conv(self.width, stride=self.stem_stride)(images))
        for stage, block in itertools.product(range(self.stages), range(self.blocks)):
            features = self.width * 2**stage
            stride = 2 if stage > 0 and block == 0 else 1
            shortcut = z if stride == 1 else conv(features, 1, stride)(z)
            z = nn.relu(conv(features, 3, stride)(z))
            z = nn.relu(shortcut + conv(features)(z))
        return _logits(self, z.mean((1, 2)))


class PreActivation(nn.Module):
    """Residual blocks that normalize the sum: norms that have no layer before them."""

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
    """A stem for large images and bottleneck blocks, ResNet-50 as it stands."""

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
    "deep": functools.partial(ResidualCNN, width=16, stages=4, blocks=2),
    "preactivation": PreActivation,
    "stage": functools.partial(ResidualCNN, width=64, stages=1, blocks=2),
    "resnet18": functools.partial(ResidualCNN, width=64, stages=4, blocks=2),
    "resnet50": BottleneckResNet,
}
