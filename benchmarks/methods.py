# SPDX-License-Identifier: Apache-2.0
"""The normalizers that are compared, by name."""

from collections.abc import Callable
from typing import NamedTuple

import jax

import cbn_jax

from ._optional import needed_for

with needed_for("benchmarks"):
    from flax import linen as nn

    from cbn_jax.linen import Norm

from .networks import NormFn

MOMENTUM = 0.99


class Method(NamedTuple):
    """A normalizer at a batch size, such as ``batch_norm@32``."""

    name: str
    batch_size: int

    def norm(self, steps: int) -> NormFn:
        """The module factory, for a run of so many steps."""
        return METHODS[self.name](steps)


def _estimator(estimator: cbn_jax.Estimator) -> NormFn:
    def norm(layer: nn.Module, train: bool) -> nn.Module:
        return Norm(estimator, layer=layer, use_running_average=not train)

    return norm


class _GroupNorm(nn.Module):
    """Flax's group norm behind a layer; 8 groups, as the networks are narrow."""

    layer: nn.Module

    @nn.compact
    def __call__(self, z: jax.Array) -> jax.Array:
        return nn.GroupNorm(num_groups=8)(self.layer(z))


def _group_norm(layer: nn.Module, train: bool) -> nn.Module:
    del train
    return _GroupNorm(layer)


def _cross_iteration(burn_in: int) -> NormFn:
    return _estimator(
        cbn_jax.cross_iteration_batch_norm(window=8, burn_in=burn_in, momentum=MOMENTUM)
    )


# Each takes the number of steps of the run.
METHODS: dict[str, Callable[[int], NormFn]] = {
    "batch_norm": lambda steps: _estimator(cbn_jax.batch_norm(MOMENTUM)),
    "group_norm": lambda steps: _group_norm,
    "cross_iteration": lambda steps: _cross_iteration(burn_in=0),
    # Plain batch norm for the first 40 %, while the weights move fast.
    "cross_iteration_burn_in": lambda steps: _cross_iteration(burn_in=2 * steps // 5),
}


def parse(text: str, batch_size: int) -> Method:
    """``name`` or ``name@batch_size``."""
    name, _, size = text.partition("@")
    if name not in METHODS or not (size or "1").isdigit() or size == "0":
        raise ValueError(
            f"method {text!r} is unknown; known are {', '.join(METHODS)}, each also with a "
            "batch size of its own, as in batch_norm@32."
        )
    return Method(name, int(size) if size else batch_size)
