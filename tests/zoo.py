"""Models in the styles that people write, and the layer before each batch norm in them."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

EXAMPLES = 2


class Case(NamedTuple):
    """A model.

    Attributes:
      make: makes it; the nnx ones from a seed.
      shape: of an example.
      expected: by path of the batch norm, that of its layer; None for the fallback.
    """

    make: Callable[..., Any]
    shape: tuple[int, ...]
    expected: dict[str, str | None]

    def data(self, key: jax.Array, examples: int = EXAMPLES) -> jax.Array:
        return jax.random.normal(key, (examples, *self.shape))


# Linen.


class ResNetBlock(nn.Module):
    features: int
    conv: Any
    norm: Any
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        y = self.conv(self.features, (3, 3), self.strides)(x)
        y = nn.relu(self.norm()(y))
        y = self.conv(self.features, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)
        if x.shape != y.shape:
            x = self.conv(self.features, (1, 1), self.strides, name="conv_proj")(x)
            x = self.norm(name="norm_proj")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Two factories, as in the examples of Flax."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
        )
        x = conv(8, (3, 3), name="conv_init")(x)
        x = nn.relu(norm(name="bn_init")(x))
        x = ResNetBlock(8, conv, norm)(x)
        x = ResNetBlock(12, conv, norm, strides=(2, 2))(x)
        return nn.Dense(4)(x.mean((1, 2)))


class PreActivation(nn.Module):
    """Norms behind sums."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(8, (3, 3))(x)
        for _ in range(2):
            y = nn.relu(norm()(x))
            y = nn.Conv(8, (3, 3), use_bias=False)(y)
            y = nn.relu(norm()(y))
            x = x + nn.Conv(8, (3, 3), use_bias=False)(y)
        return nn.Dense(4)(nn.relu(norm()(x)).mean((1, 2)))


class DenseNet(nn.Module):
    """Norms of concatenations, and those within a bottleneck."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.Conv(8, (3, 3), use_bias=False)(x)
        for _ in range(2):
            y = nn.Conv(8, (1, 1), use_bias=False)(nn.relu(norm()(x)))
            y = nn.Conv(4, (3, 3), use_bias=False)(nn.relu(norm()(y)))
            x = jnp.concatenate([x, y], axis=-1)
        return nn.Dense(4)(x.mean((1, 2)))


class UNet(nn.Module):
    """Transposed convolutions, and concatenations before convolutions."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        def block(layer, x):
            return nn.relu(nn.BatchNorm(use_running_average=not train)(layer(x)))

        skip = block(nn.Conv(8, (3, 3), use_bias=False, name="down"), x)
        x = nn.max_pool(skip, (2, 2), (2, 2))
        x = block(nn.Conv(12, (3, 3), name="middle"), x)
        x = block(nn.ConvTranspose(8, (2, 2), (2, 2), name="up"), x)
        x = jnp.concatenate([x, skip], axis=-1)
        return nn.Conv(1, (1, 1))(block(nn.Conv(8, (3, 3), name="last"), x))


class MobileBlock(nn.Module):
    """A depthwise convolution, and a gate from pooled features."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        width = x.shape[-1] * 4
        x = nn.relu6(norm(name="expand_bn")(nn.Conv(width, (1, 1), name="expand")(x)))
        depthwise = nn.Conv(width, (3, 3), feature_group_count=width, name="depthwise")
        x = nn.relu6(norm(name="depthwise_bn")(depthwise(x)))
        gate = nn.relu(nn.Dense(2, name="squeeze")(x.mean((1, 2))))
        gate = nn.sigmoid(nn.Dense(width, name="excite")(gate))
        x = x * gate[:, None, None]
        return norm(name="project_bn")(nn.Conv(4, (1, 1), name="project")(x))


class Block(nn.Module):
    """A step of ``nn.scan``."""

    train: bool

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.Conv(x.shape[-1], (3, 3), use_bias=False)(x)
        y = nn.BatchNorm(use_running_average=not self.train)(y)
        y = nn.Conv(x.shape[-1], (3, 3))(nn.relu(y))
        return x + nn.BatchNorm(use_running_average=not self.train)(y), None


class Scanned(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        blocks = nn.scan(
            Block,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = blocks(train, name="blocks")(nn.Conv(8, (1, 1))(x), None)
        return nn.Dense(4)(x.mean((1, 2)))


class Rematerialized(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool = True):
        x = nn.Conv(8, (1, 1))(x)
        x, _ = nn.remat(Block)(train)(x)
        return nn.Dense(4)(x.mean((1, 2)))


class Pyramid(nn.Module):
    """A head that several levels share, with its norm."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        head = nn.Conv(8, (3, 3), name="head")
        norm = nn.BatchNorm(use_running_average=not train, name="norm")
        x = nn.Conv(8, (3, 3), name="stem")(x)
        levels = [x, nn.max_pool(x, (2, 2), (2, 2))]
        pooled = [nn.relu(norm(head(level))).mean((1, 2)) for level in levels]
        return nn.Dense(4)(jnp.concatenate(pooled, axis=-1))


class Dimensions(nn.Module):
    """Convolutions of one or three dimensions, as many as ``x`` has."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool = True):
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, axis_name=self.axis_name
        )
        for _ in range(2):
            x = nn.Conv(8, (3,) * (x.ndim - 2), use_bias=False)(x)
            x = nn.gelu(norm()(x))
        return nn.Dense(4)(x.mean(tuple(range(1, x.ndim - 1))))


IMAGE = (8, 8, 3)
LINEN = {
    "resnet": Case(
        ResNet,
        IMAGE,
        {
            "bn_init": "conv_init",
            "ResNetBlock_0/BatchNorm_0": "ResNetBlock_0/Conv_0",
            "ResNetBlock_0/BatchNorm_1": "ResNetBlock_0/Conv_1",
            "ResNetBlock_1/BatchNorm_0": "ResNetBlock_1/Conv_0",
            "ResNetBlock_1/BatchNorm_1": "ResNetBlock_1/Conv_1",
            "ResNetBlock_1/norm_proj": "ResNetBlock_1/conv_proj",
        },
    ),
    "pre-activation": Case(
        PreActivation,
        IMAGE,
        {
            "BatchNorm_0": "Conv_0",
            "BatchNorm_1": "Conv_1",
            "BatchNorm_2": None,
            "BatchNorm_3": "Conv_3",
            "BatchNorm_4": None,
        },
    ),
    "densenet": Case(
        DenseNet,
        IMAGE,
        {
            "BatchNorm_0": "Conv_0",
            "BatchNorm_1": "Conv_1",
            "BatchNorm_2": None,
            "BatchNorm_3": "Conv_3",
        },
    ),
    "u-net": Case(
        UNet,
        IMAGE,
        {
            "BatchNorm_0": "down",
            "BatchNorm_1": "middle",
            "BatchNorm_2": "up",
            "BatchNorm_3": "last",
        },
    ),
    "mobile": Case(
        MobileBlock,
        IMAGE,
        {
            "expand_bn": "expand",
            "depthwise_bn": "depthwise",
            "project_bn": "project",
        },
    ),
    "scan": Case(
        Scanned,
        IMAGE,
        {
            "blocks/BatchNorm_0": "blocks/Conv_0",
            "blocks/BatchNorm_1": "blocks/Conv_1",
        },
    ),
    "remat": Case(
        Rematerialized,
        IMAGE,
        {
            "CheckpointBlock_0/BatchNorm_0": "CheckpointBlock_0/Conv_0",
            "CheckpointBlock_0/BatchNorm_1": "CheckpointBlock_0/Conv_1",
        },
    ),
    "pyramid": Case(Pyramid, IMAGE, {"norm": "head"}),
    "1-d": Case(Dimensions, (12, 3), {"BatchNorm_0": "Conv_0", "BatchNorm_1": "Conv_1"}),
    "3-d": Case(
        Dimensions, (4, 4, 4, 2), {"BatchNorm_0": "Conv_0", "BatchNorm_1": "Conv_1"}
    ),
}


# Nnx.


class Bottleneck(nnx.Module):
    def __init__(self, inputs, width, outputs, strides=1, *, rngs):
        norm = functools.partial(nnx.BatchNorm, rngs=rngs)
        conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
        self.conv1, self.bn1 = conv(inputs, width, (1, 1)), norm(width)
        self.conv2 = conv(width, width, (3, 3), strides=strides)
        self.bn2 = norm(width)
        self.conv3 = conv(width, outputs, (1, 1))
        self.bn3 = norm(outputs, scale_init=nnx.initializers.zeros_init())
        self.downsample = nnx.data(None)
        if strides != 1 or inputs != outputs:
            shortcut = conv(inputs, outputs, (1, 1), strides=strides)
            self.downsample = nnx.Sequential(shortcut, norm(outputs))

    def __call__(self, x):
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = nnx.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return nnx.relu(y + (x if self.downsample is None else self.downsample(x)))


class NnxResNet(nnx.Module):
    def __init__(self, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.conv1 = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.bn1 = nnx.BatchNorm(8, rngs=rngs)
        blocks = [Bottleneck(8, 4, 8, rngs=rngs), Bottleneck(8, 4, 12, 2, rngs=rngs)]
        self.blocks = nnx.List(blocks)
        self.fc = nnx.Linear(12, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.bn1(self.conv1(x)))
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((1, 2)))


class NnxUNet(nnx.Module):
    def __init__(self, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.down = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.down_bn = nnx.BatchNorm(8, rngs=rngs)
        self.up = nnx.ConvTranspose(8, 6, (2, 2), (2, 2), rngs=rngs)
        self.up_bn = nnx.BatchNorm(6, rngs=rngs)
        self.joined_bn = nnx.BatchNorm(14, rngs=rngs)
        self.last = nnx.Conv(14, 1, (1, 1), rngs=rngs)

    def __call__(self, x):
        skip = nnx.relu(self.down_bn(self.down(x)))
        x = nnx.max_pool(skip, (2, 2), (2, 2))
        x = nnx.relu(self.up_bn(self.up(x)))
        return self.last(self.joined_bn(jnp.concatenate([x, skip], axis=-1)))


class NnxPyramid(nnx.Module):
    def __init__(self, seed: int = 0):
        rngs = nnx.Rngs(seed)
        self.head = nnx.Conv(3, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.last = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        levels = [x, nnx.max_pool(x, (2, 2), (2, 2))]
        pooled = [nnx.relu(self.norm(self.head(level))).mean((1, 2)) for level in levels]
        return self.last(jnp.concatenate(pooled, axis=-1))


class NnxBlock(nnx.Module):
    def __init__(self, features: int, rngs: nnx.Rngs, axis_name: str | None = None):
        self.conv = nnx.Conv(features, features, (3, 3), rngs=rngs)
        self.bn = nnx.BatchNorm(features, axis_name=axis_name, rngs=rngs)

    def __call__(self, x):
        return x + nnx.relu(self.bn(self.conv(x)))


class NnxScanned(nnx.Module):
    """Blocks that ``nnx.vmap`` stacks and ``nnx.scan`` runs."""

    def __init__(self, seed: int = 0):
        rngs, depth = nnx.Rngs(seed), 3

        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs):
            return NnxBlock(8, rngs)

        self.stem = nnx.Conv(3, 8, (1, 1), rngs=rngs)
        self.blocks = stack(rngs)
        self.last = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block, x):
            return block(x)

        return self.last(run(self.blocks, self.stem(x)).mean((1, 2)))


NNX = {
    "resnet": Case(
        NnxResNet,
        IMAGE,
        {
            "bn1": "conv1",
            "blocks/0/bn1": "blocks/0/conv1",
            "blocks/0/bn2": "blocks/0/conv2",
            "blocks/0/bn3": "blocks/0/conv3",
            "blocks/1/bn1": "blocks/1/conv1",
            "blocks/1/bn2": "blocks/1/conv2",
            "blocks/1/bn3": "blocks/1/conv3",
            "blocks/1/downsample/layers/1": "blocks/1/downsample/layers/0",
        },
    ),
    "u-net": Case(NnxUNet, IMAGE, {"down_bn": "down", "up_bn": "up", "joined_bn": None}),
    "pyramid": Case(NnxPyramid, IMAGE, {"norm": "head"}),
    "scan": Case(NnxScanned, IMAGE, {"blocks/bn": "blocks/conv"}),
}
