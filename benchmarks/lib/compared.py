# SPDX-License-Identifier: Apache-2.0
"""The methods of the study of norm batches, with decays that fit the batch size."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

import cbn_jax
from benchmarks.lib import methods
from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    from flax import linen as nn

    from cbn_jax.linen import TLU, EvoNormS0, Norm


def _momentum(size: int) -> float:
    """A decay with which averages cover as many examples at every batch size."""
    return cbn_jax.rescale_decay(0.9, size)


def _window(size: int) -> int:
    return max(1, -(-32 // size))


class Setting(NamedTuple):
    """What a method depends on.

    Attributes:
      norm_batch: examples that are normalized together.
      steps: steps of the run.
      groups: groups of group norm; few, because the networks are narrow.
    """

    norm_batch: int
    steps: int
    groups: int = 8


class Made(NamedTuple):
    """A method in a network, ``norm(layer=..., train=...)``.

    Attributes:
      estimator: the method.
      kernel: the change of the layer's kernel.
      after: makes the norm that follows.
    """

    estimator: Any
    kernel: Any = None
    after: Any = None

    def __call__(self, layer: nn.Module, train: bool) -> nn.Module:
        """The module that runs the layer and normalizes."""
        norm = Norm(self.estimator, layer, self.kernel, use_running_average=not train)
        return norm if self.after is None else methods.Behind(norm, self.after)


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


class Precise(Made):
    """A method whose statistics for inference are recomputed after training."""


def _published(size: int) -> Any:
    """Window 8; a single example has no variance of its own to average."""
    running = "batch" if size > 1 else "window"
    momentum = _momentum(size)
    return cbn_jax.cross_iteration_batch_norm(8, running=running, momentum=momentum)


def _small(each: Setting) -> Any:
    return cbn_jax.small_batch_norm(each.norm_batch, momentum=_momentum(each.norm_batch))


def _streaming(length: int, each: Setting) -> Made:
    """``small_batch_norm`` with a window of another length."""
    window = max(2, length // each.norm_batch)
    momentum = _momentum(each.norm_batch)
    return Made(cbn_jax.streaming_batch_norm(window, momentum=momentum))


def _grouped(each: Setting, kernel: Any = None) -> Made:
    """``small_batch_norm`` with group norm after it."""
    return Made(_small(each), kernel, functools.partial(nn.GroupNorm, each.groups))


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


METHODS: dict[str, Callable[[Setting], Made]] = {
    "batch_norm": lambda s: Made(cbn_jax.batch_norm(_momentum(s.norm_batch))),
    "batch_norm-precise": lambda s: Precise(cbn_jax.batch_norm(_momentum(s.norm_batch))),
    "frozen": lambda s: Made(cbn_jax.frozen(cbn_jax.batch_norm(), after=0)),
    "group_norm": lambda s: Made(cbn_jax.group_norm(s.groups)),
    "group_norm-standardize": lambda s: Made(
        cbn_jax.group_norm(s.groups), cbn_jax.standardize
    ),
    "batch_renorm": lambda s: Made(
        cbn_jax.batch_renorm(_momentum(s.norm_batch), warmup_steps=max(1, s.steps // 20))
    ),
    "moving_average_batch_norm": lambda s: Made(
        cbn_jax.moving_average_batch_norm(_window(s.norm_batch)), cbn_jax.center
    ),
    "online_norm": lambda s: Made(cbn_jax.online_norm()),
    "filter_response_norm": lambda s: FilterResponse(cbn_jax.filter_response_norm()),
    "EvoNormS0": lambda s: Evolved(cbn_jax.group_norm(s.groups)),
    "cross_iteration_batch_norm": lambda s: Made(_published(s.norm_batch)),
    # The same window without compensation: moments of past batches under their own weights.
    "momentum_batch_norm": lambda s: Made(
        cbn_jax.momentum_batch_norm(
            1 - 1 / _window(s.norm_batch), momentum=_momentum(s.norm_batch)
        )
    ),
    "carried_batch_norm": lambda s: Made(
        cbn_jax.carried_batch_norm(_window(s.norm_batch), momentum=_momentum(s.norm_batch))
    ),
    "small_batch_norm": lambda s: Made(_small(s)),
    "small_batch_norm-standardize": lambda s: Made(_small(s), cbn_jax.standardize),
    "small_batch_norm-group_norm": _grouped,
    "small_batch_norm-standardize-group_norm": lambda s: _grouped(s, cbn_jax.standardize),
    "small_batch_norm-constant": lambda s: Made(constant(_small(s))),
    # Windows of another length, in examples.
    **{
        f"streaming_batch_norm-{length}": functools.partial(_streaming, length)
        for length in (8, 128)
    },
}

# Methods that take no statistics from a trained batch norm.
WITHOUT_AVERAGES = {"group_norm", "online_norm"}
# Methods with their own kernels, activations or further norms cannot replace a batch norm
# that was trained.
_MADE = {name: make(Setting(2, 1)) for name, make in METHODS.items()}
OTHER_NETWORKS = {
    name
    for name, made in _MADE.items()
    if made[1:] != (None, None) or hasattr(made, "active")
}
# Methods whose statistics are recomputed after training.
PRECISE = {name for name, made in _MADE.items() if isinstance(made, Precise)}
