# SPDX-License-Identifier: Apache-2.0
"""The normalizers to compare, by name."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import cbn_jax
from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    from flax import linen as nn

    from cbn_jax.linen import Norm

from benchmarks.lib.networks import NormFn
from benchmarks.lib.training import OPTIMIZERS

MOMENTUM = 0.99
GROUPS = 8  # of group norm; few, because the networks are narrow
WINDOW = 8  # of cross-iteration, as published

# Their windows hold 32 examples.
WINDOWED = (
    "small_batch_norm",
    "carried_batch_norm",
    "streaming_batch_norm",
    "replay_batch_norm",
    "bidirectional_batch_norm",
    "moving_average_batch_norm",
    "momentum_batch_norm",
)
MakeEstimator = Callable[[int, int], Any]


# Weights of the current batch in diminishing batch norm, as in the paper's table.
ALPHAS = {
    **{f"{alpha:g}": alpha for alpha in (1.0, 0.75, 0.5, 0.25, 0.1, 0.01, 0.001, 0.0)},
    "1/m": cbn_jax.diminishing(1.0),
    "1/m²": cbn_jax.diminishing(2.0),
    # Not in the paper: an average without the share of the initial (0, 1).
    "0.001 debiased": cbn_jax.exponential(0.999),
}


class Method(NamedTuple):
    """A normalizer at a batch size, such as ``batch_norm@32`` or ``batch_norm+adam``."""

    label: str
    name: str
    batch_size: int
    optimizer: str = "sgd"

    def __str__(self) -> str:
        return self.label

    def norm(self, steps: int) -> NormFn:
        """The module factory, for a run of ``steps`` steps."""
        return LAYERS.get(self.name) or estimated(
            self.estimator(steps), KERNELS.get(self.name)
        )

    def estimator(self, steps: int) -> Any:
        """The estimator, or a ``Learned`` whose weight the module learns."""
        return ESTIMATORS[self.name](self.batch_size, steps)

    @property
    def pooled(self) -> int:
        """The number of examples in a training statistic."""
        if self.name.startswith(WINDOWED):
            return max(self.batch_size, 32)
        if self.name.startswith("cross_iteration_batch_norm"):
            return WINDOW * self.batch_size
        return self.batch_size


def estimated(estimator: Any, kernel: Callable | None = None) -> NormFn:
    """The module factory of an estimator, with a change of kernels if given."""

    def norm(layer: nn.Module | None, train: bool) -> nn.Module:
        change = None if layer is None else kernel
        return Norm(estimator, layer, change, use_running_average=not train)

    return norm


class Behind(nn.Module):
    """A layer, and a Flax module after it in the dtype of the layer's output."""

    layer: nn.Module
    make: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        """Layer and module."""
        x = self.layer(z)
        return self.make(dtype=x.dtype)(x)


class _Unnormalized(nn.Module):
    """A learned scale and bias after a layer, as normalizers have."""

    layer: nn.Module

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        x = self.layer(z)
        shape = (1,) * (x.ndim - 1) + x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        bias = self.param("bias", nn.initializers.zeros, shape)
        return x * scale.astype(x.dtype) + bias.astype(x.dtype)


def _group_norm(groups: int) -> NormFn:
    return lambda layer, train: Behind(layer, functools.partial(nn.GroupNorm, groups))


def _flax_batch_norm(layer: nn.Module, train: bool) -> nn.Module:
    make = functools.partial(nn.BatchNorm, not train, momentum=MOMENTUM)
    return Behind(layer, make)


# Modules that need no estimator.
LAYERS: dict[str, NormFn] = {
    "none": lambda layer, train: _Unnormalized(layer),
    "nn.GroupNorm-1": _group_norm(1),
    "nn.GroupNorm": _group_norm(GROUPS),
    "nn.BatchNorm": _flax_batch_norm,
}


def _window(batch_size: int) -> int:
    """The number of iterations that hold 32 examples."""
    return max(1, math.ceil(32 / batch_size))


def _cross_iteration(**options) -> cbn_jax.Estimator:
    return cbn_jax.cross_iteration_batch_norm(WINDOW, momentum=MOMENTUM, **options)


def _carried(batch_size: int, steps: int) -> cbn_jax.Estimator:
    return cbn_jax.carried_batch_norm(_window(batch_size), momentum=MOMENTUM)


def _streaming(samples: int | None) -> MakeEstimator:
    return lambda size, steps: cbn_jax.streaming_batch_norm(
        _window(size), samples=samples, momentum=MOMENTUM
    )


def _replay(samples: int) -> MakeEstimator:
    return lambda size, steps: cbn_jax.replay_batch_norm(
        _window(size), samples=max(samples, size), momentum=MOMENTUM
    )


def _diminishing(alpha: Any) -> MakeEstimator:
    return lambda size, steps: cbn_jax.diminishing_batch_norm(alpha)


def _group_batch(order: Any) -> MakeEstimator:
    return lambda size, steps: cbn_jax.learned(
        cbn_jax.group_batch_norm, num_groups=GROUPS, order=order, momentum=MOMENTUM
    )


def _moving_average(batch_size: int) -> cbn_jax.Bidirectional:
    return cbn_jax.moving_average_batch_norm(_window(batch_size))


def _averaged(batch_size: int) -> Any:
    """The source of the averages; a single example has no variance of its own."""
    return "batch" if batch_size > 1 else "window"


# Each function takes the batch size and the number of steps of the run.
ESTIMATORS: dict[str, MakeEstimator] = {
    "batch_norm": lambda size, steps: cbn_jax.batch_norm(MOMENTUM),
    "small_batch_norm": lambda size, steps: cbn_jax.small_batch_norm(
        size, momentum=MOMENTUM
    ),
    # As published: window 8, gradients through the current batch.
    "cross_iteration_batch_norm": lambda size, steps: _cross_iteration(
        running=_averaged(size)
    ),
    # Plain batch norm for the first 40 %, while the weights move fast.
    "cross_iteration_batch_norm-burn_in": lambda size, steps: _cross_iteration(
        burn_in=2 * steps // 5, running=_averaged(size)
    ),
    "cross_iteration_batch_norm-gradient": lambda size, steps: _cross_iteration(
        gradient="window", running="window"
    ),
    "cross_iteration_batch_norm-uncompensated": lambda size, steps: _cross_iteration(
        rho=0.0, running="window"
    ),
    **{
        f"diminishing_batch_norm-{name}": _diminishing(alpha)
        for name, alpha in ALPHAS.items()
    },
    "group_batch_norm": _group_batch("group_first"),
    "group_batch_norm-batch_first": _group_batch("batch_first"),
    "group_batch_norm-parallel": _group_batch("parallel"),
    "group_norm": lambda size, steps: cbn_jax.group_norm(GROUPS),
    "group_norm_plus": lambda size, steps: cbn_jax.learned(
        cbn_jax.group_norm_plus, num_groups=GROUPS
    ),
    "group_norm-standardize": lambda size, steps: cbn_jax.group_norm(GROUPS),
    "small_batch_norm-standardize": lambda size, steps: cbn_jax.small_batch_norm(
        size, momentum=MOMENTUM
    ),
    "carried_batch_norm": _carried,
    "carried_batch_norm-standardize": _carried,
    # The published schedule is for 40,000 steps and more.
    "batch_renorm": lambda size, steps: cbn_jax.batch_renorm(
        MOMENTUM, warmup_steps=max(1, steps // 20)
    ),
    "momentum_batch_norm": lambda size, steps: cbn_jax.momentum_batch_norm(
        cbn_jax.matched_noise(size, max(2, steps)), momentum=MOMENTUM
    ),
    # The same window without compensation: past moments unchanged.
    "momentum_batch_norm-window": lambda size, steps: cbn_jax.momentum_batch_norm(
        1.0 - 1.0 / _window(size), momentum=MOMENTUM
    ),
    "bidirectional_batch_norm": lambda size, steps: cbn_jax.bidirectional_batch_norm(
        _window(size), momentum=MOMENTUM
    ),
    "moving_average_batch_norm": lambda size, steps: _moving_average(size),
    "moving_average_batch_norm-center": lambda size, steps: _moving_average(size),
    "filter_response_norm": lambda size, steps: cbn_jax.filter_response_norm(),
    "online_norm": lambda size, steps: cbn_jax.online_norm(),
    "streaming_batch_norm-all": _streaming(None),
    **{f"streaming_batch_norm-{n}": _streaming(n) for n in (4, 8, 16, 32, 64)},
    **{f"replay_batch_norm-{n}": _replay(n) for n in (4, 8, 16, 32)},
}
METHODS = (*ESTIMATORS, *LAYERS)
# Changes of the kernels before the methods.
KERNELS = {
    "group_norm-standardize": cbn_jax.standardize,
    "small_batch_norm-standardize": cbn_jax.standardize,
    "carried_batch_norm-standardize": cbn_jax.standardize,
    "moving_average_batch_norm-center": cbn_jax.center,
}


def parse(text: str, batch_size: int) -> Method:
    """``name``, also ``name+optimizer``, ``name@batch_size`` or both in this order."""
    if batch_size < 1:
        raise ValueError(f"batch size is {batch_size}, expected at least 1.")
    rest, _, size = text.partition("@")
    name, _, optimizer = rest.partition("+")
    optimizer = optimizer or "sgd"
    known = name in METHODS and optimizer in OPTIMIZERS
    if not known or not (size or "1").isdigit() or size == "0":
        raise ValueError(
            f"method {text!r} is unknown; known are {', '.join(METHODS)}, each also with "
            f"an optimizer ({', '.join(OPTIMIZERS)}) and a batch size of its own, as in "
            "batch_norm+adam@32."
        )
    return Method(text, name, int(size) if size else batch_size, optimizer)
