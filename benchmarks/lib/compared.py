# SPDX-License-Identifier: Apache-2.0
"""The methods of the study of norm batches, with decays that fit the batch size."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax

import cbn_jax
from benchmarks.lib import methods
from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    from flax import linen as nn

    from cbn_jax.linen import TLU, EvoNormS0, Norm

GROUPS = 8  # of group norm; few, because the networks are narrow


def _momentum(size: int) -> float:
    """A decay with which averages cover as many examples at every batch size."""
    return cbn_jax.rescale_decay(0.9, size)


def _window(size: int) -> int:
    return max(1, -(-32 // size))


class Made(NamedTuple):
    """A method in a network: ``norm(layer=..., train=...)`` with a norm and its kernels."""

    estimator: Any
    kernel: Any = None

    def __call__(self, layer: nn.Module, train: bool) -> nn.Module:
        """The module that runs the layer and normalizes."""
        return Norm(self.estimator, layer, self.kernel, use_running_average=not train)


class _Threshold(nn.Module):
    """Filter response norm and its activation."""

    norm: nn.Module

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        return TLU()(self.norm(z))


class FilterResponse(Made):
    """Filter response norm, with the thresholded unit in place of ReLU."""

    def active(self, layer: nn.Module, train: bool) -> nn.Module:
        """Norm and activation."""
        return _Threshold(self(layer, train))


class Evolved(Made):
    """EvoNorm-S0; group norm if no activation follows."""

    def active(self, layer: nn.Module, train: bool) -> nn.Module:
        """Norm and activation in one step."""
        return EvoNormS0(self.estimator, layer, use_running_average=not train)


class Grouped(Made):
    """A method with group norm after it."""

    def __call__(self, layer: nn.Module, train: bool) -> nn.Module:
        """The module that runs the layer and normalizes twice."""
        norm = super().__call__(layer, train)
        return methods.Behind(norm, functools.partial(nn.GroupNorm, GROUPS))


class Precise(Made):
    """A method whose statistics for inference are recomputed after training."""


def _published(size: int) -> Any:
    """Window 8; a single example has no variance of its own to average."""
    running = "batch" if size > 1 else "window"
    momentum = _momentum(size)
    return cbn_jax.cross_iteration_batch_norm(8, running=running, momentum=momentum)


def _streaming(length: int, size: int, steps: int) -> Made:
    """``small_batch_norm`` with a window of another length."""
    window = max(2, length // size)
    return Made(cbn_jax.streaming_batch_norm(window, momentum=_momentum(size)))


@cbn_jax.factory
def constant(estimator: cbn_jax.Estimator) -> cbn_jax.Estimator:
    """A method whose window is a constant: gradients flow through the batch alone."""

    def train(state, x, source, **options):
        fixed = source._replace(params=jax.lax.stop_gradient(source.params))
        return estimator.train(state, x, fixed, **options)

    return dataclasses.replace(estimator, train=train)


def flax_batch_norm(layer: nn.Module, train: bool) -> nn.Module:
    """The norm of the training before fine-tuning, with 32 examples per step."""
    return methods.Behind(layer, functools.partial(nn.BatchNorm, not train, momentum=0.9))


# Name -> (norm batch, steps of the run) -> method.
METHODS: dict[str, Any] = {
    "batch_norm": lambda n, steps: Made(cbn_jax.batch_norm(_momentum(n))),
    "batch_norm-precise": lambda n, steps: Precise(cbn_jax.batch_norm(_momentum(n))),
    "frozen": lambda n, steps: Made(cbn_jax.frozen(cbn_jax.batch_norm(), after=0)),
    "group_norm": lambda n, steps: Made(cbn_jax.group_norm(GROUPS)),
    "group_norm-standardize": lambda n, steps: Made(
        cbn_jax.group_norm(GROUPS), cbn_jax.standardize
    ),
    "batch_renorm": lambda n, steps: Made(
        cbn_jax.batch_renorm(_momentum(n), warmup_steps=max(1, steps // 20))
    ),
    "moving_average_batch_norm": lambda n, steps: Made(
        cbn_jax.moving_average_batch_norm(_window(n)), cbn_jax.center
    ),
    "online_norm": lambda n, steps: Made(cbn_jax.online_norm()),
    "filter_response_norm": lambda n, steps: FilterResponse(cbn_jax.filter_response_norm()),
    "EvoNormS0": lambda n, steps: Evolved(cbn_jax.group_norm(GROUPS)),
    "cross_iteration_batch_norm": lambda n, steps: Made(_published(n)),
    # The same window without compensation: moments of past batches under their own weights.
    "momentum_batch_norm": lambda n, steps: Made(
        cbn_jax.momentum_batch_norm(1 - 1 / _window(n), momentum=_momentum(n))
    ),
    "carried_batch_norm": lambda n, steps: Made(
        cbn_jax.carried_batch_norm(_window(n), momentum=_momentum(n))
    ),
    "small_batch_norm": lambda n, steps: Made(
        cbn_jax.small_batch_norm(n, momentum=_momentum(n))
    ),
    "small_batch_norm-standardize": lambda n, steps: Made(
        cbn_jax.small_batch_norm(n, momentum=_momentum(n)), cbn_jax.standardize
    ),
    "small_batch_norm-group_norm": lambda n, steps: Grouped(
        cbn_jax.small_batch_norm(n, momentum=_momentum(n))
    ),
    "small_batch_norm-standardize-group_norm": lambda n, steps: Grouped(
        cbn_jax.small_batch_norm(n, momentum=_momentum(n)), cbn_jax.standardize
    ),
    "small_batch_norm-constant": lambda n, steps: Made(
        constant(cbn_jax.small_batch_norm(n, momentum=_momentum(n)))
    ),
    # Windows of another length, in examples.
    **{
        f"streaming_batch_norm-{length}": functools.partial(_streaming, length)
        for length in (8, 128)
    },
}

# Methods that take no statistics from a trained batch norm.
WITHOUT_AVERAGES = {"group_norm", "online_norm"}
# Methods with their own kernels or activations cannot replace a trained batch norm.
OTHER_NETWORKS = {
    name
    for name, make in METHODS.items()
    if make(2, 1).kernel is not None or type(make(2, 1)) not in (Made, Precise)
}
# Methods whose statistics are recomputed after training.
PRECISE = {name for name, make in METHODS.items() if type(make(2, 1)) is Precise}
