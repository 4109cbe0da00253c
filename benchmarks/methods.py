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

    label: str
    name: str
    batch_size: int

    def __str__(self) -> str:
        return self.label

    def norm(self, steps: int) -> NormFn:
        """The module factory, for a run of so many steps."""
        return METHODS[self.name](self.batch_size, steps)


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


def _window(batch_size: int) -> int:
    """As many iterations as hold 32 examples."""
    return max(1, 32 // batch_size)


def _cross_iteration(**options) -> NormFn:
    return _estimator(cbn_jax.cross_iteration_batch_norm(8, momentum=MOMENTUM, **options))


def _streaming(samples: int | None) -> Callable[[int, int], NormFn]:
    return lambda batch_size, steps: _estimator(
        cbn_jax.streaming_batch_norm(
            _window(batch_size), samples=samples, momentum=MOMENTUM
        )
    )


def _replay(samples: int) -> Callable[[int, int], NormFn]:
    return lambda batch_size, steps: _estimator(
        cbn_jax.replay_batch_norm(
            _window(batch_size), samples=max(samples, batch_size), momentum=MOMENTUM
        )
    )


# Each takes the batch size and the number of steps of the run.
METHODS: dict[str, Callable[[int, int], NormFn]] = {
    "batch_norm": lambda size, steps: _estimator(cbn_jax.batch_norm(MOMENTUM)),
    "group_norm": lambda size, steps: _group_norm,
    "small_batch": lambda size, steps: _estimator(
        cbn_jax.small_batch_norm(size, momentum=MOMENTUM)
    ),
    # As published: window 8, gradients through the current batch.
    "cross_iteration": lambda size, steps: _cross_iteration(running=_averaged(size)),
    # Plain batch norm for the first 40 %, while the weights move fast.
    "cross_iteration_burn_in": lambda size, steps: _cross_iteration(
        burn_in=2 * steps // 5, running=_averaged(size)
    ),
    "cross_iteration_gradient": lambda size, steps: _cross_iteration(
        gradient="window", running="window"
    ),
    "naive": lambda size, steps: _cross_iteration(rho=0.0, running="window"),
    "streaming_all": _streaming(None),
    **{f"streaming_{n}": _streaming(n) for n in (4, 8, 16, 32, 64)},
    **{f"replay_{n}": _replay(n) for n in (4, 8, 16, 32)},
}


def _averaged(batch_size: int) -> str:
    """A single example has no variance of its own to average."""
    return "batch" if batch_size > 1 else "window"


def parse(text: str, batch_size: int) -> Method:
    """``name`` or ``name@batch_size``."""
    name, _, size = text.partition("@")
    if name not in METHODS or not (size or "1").isdigit() or size == "0":
        raise ValueError(
            f"method {text!r} is unknown; known are {', '.join(METHODS)}, each also with a "
            "batch size of its own, as in batch_norm@32."
        )
    return Method(text, name, int(size) if size else batch_size)
