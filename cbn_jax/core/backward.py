# SPDX-License-Identifier: Apache-2.0
"""Averages over time of statistics that only the backward pass computes.

The gradient of batch norm uses two more statistics of a batch. They are as noisy as its
mean and variance. With g the gradient at the normalized value z::

    ∂L/∂x = (g − E[g] − z E[g z]) · inv_std

A ``Bidirectional`` method keeps averages of E[g] and E[g z]. The averages are nodes among
the parameters, because gradients are taken there. Their "gradient" is their next value, and
``cbn_jax.optax.with_backward_statistics`` writes it.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from .checks import in_dtype
from .devices import AxisName, total
from .estimator import Estimator, Infer, Init
from .moments import align, wide
from .statistics import Statistics

WRITE = "write optimizer = cbn_jax.optax.with_backward_statistics(optimizer)"


class BackwardStatistics(NamedTuple):
    """Averages that a ``Bidirectional`` method keeps, a node among the parameters.

    Attributes:
      values: ``[n, C]``, the averages of the method.
      steps: ``[C]``, the number of times that the optimizer has written them.
    """

    values: jax.Array
    steps: jax.Array


class Sums(NamedTuple):
    """Sums of the backward pass over the ``size`` values of a statistic.

    Attributes:
      g: Σ g, with g the gradient at the normalized value z.
      gz: Σ g z.
      size: the number of values.
    """

    g: jax.Array
    gz: jax.Array
    size: jax.Array


class Correction(NamedTuple):
    """The values that replace E[g] and E[g z] in the gradient."""

    g: jax.Array
    gz: jax.Array


# (averages, sums, context) ↦ the correction for this step and the averages' next values
Rule = Callable[[BackwardStatistics, Sums, Any], tuple[Correction, jax.Array]]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bidirectional(Estimator):
    """An estimator that also averages statistics of the backward pass.

    The Flax modules keep the averages in a parameter ``backward``. If you use the
    functions, keep the averages among your parameters::

        backward = estimator.init_backward(features)
        statistics, state = estimator.at(backward).train(state, x)

    Wrap the optimizer in ``cbn_jax.optax.with_backward_statistics``, which writes the
    averages. Differentiate in reverse mode: JAX refuses ``jax.jvp`` and ``jax.hessian``.

    Attributes:
      init_backward: ``features -> BackwardStatistics``, the averages before the first step.
      train_with: ``train`` with an additional argument ``backward``, the averages.
    """

    init_backward: Callable[[int], BackwardStatistics] = dataclasses.field(kw_only=True)
    train_with: Callable[..., tuple[Statistics, Any]] = dataclasses.field(kw_only=True)

    def at(self, backward: BackwardStatistics) -> Estimator:
        """The plain estimator with these averages."""
        train = functools.partial(self.train_with, backward=backward)
        return Estimator(self.init, train, self.infer, self.epsilon, self.traits)


def bidirectional(
    name: str,
    init: Init,
    train: Callable[..., tuple[Statistics, Any]],
    infer: Infer,
    epsilon: float,
    rows: int,
) -> Bidirectional:
    """A method whose ``train`` also takes ``backward``, ``rows`` values per feature."""

    def init_backward(features):
        return BackwardStatistics(
            values=jnp.zeros((rows, features), jnp.float32),
            steps=jnp.zeros(features, jnp.float32),
        )

    def train_with(state, x, source=None, *, axis_name=None, mask=None, backward):
        backward = _accepted(name, backward)
        return train(state, x, source, axis_name=axis_name, mask=mask, backward=backward)

    def without(state, x, source=None, *, axis_name=None, mask=None):
        del state, x, source, axis_name, mask
        raise TypeError(
            f"{name} got no backward statistics in training, expected those in your "
            "parameters; write estimator.at(backward).train(state, x), or pass the "
            "estimator to Norm without a wrapper."
        )

    return Bidirectional(
        init,
        without,
        infer,
        epsilon,
        init_backward=init_backward,
        train_with=train_with,
    )


def attach(
    rule: Rule,
    x: jax.Array,
    mask: jax.Array | None,
    statistics: Statistics,
    size: jax.Array,
    backward: BackwardStatistics,
    context: Any = (),
) -> Statistics:
    """The statistics, as constants, with the gradient that ``rule`` gives to ``x``.

    Args:
      rule: computes the correction and the averages' next values.
      x: activations.
      mask: mask of the activations.
      statistics: normalize the activations.
      size: number of values on this device that share each statistic.
      backward: the averages.
      context: other inputs of the rule.
    """
    constants = lax.stop_gradient((statistics, size, context))
    # These values vary over the devices like x. Sums are then those of this device, under
    # jit, shard_map and pmap alike, and the next values are averaged once, with the
    # gradients.
    statistics, size, context, backward = _spread_like(x, (*constants, backward))
    broken = jnp.where(_is_written(backward.steps), 0.0, jnp.nan)
    broken = lax.stop_gradient(broken)
    mean, inv_std = jax.tree.map(lambda leaf: leaf + align(broken, leaf), statistics)
    # Under vmap a constant mean would count as shared, and its cotangent as a sum.
    never = jnp.zeros((), bool)
    statistics = Statistics(jnp.where(never, inv_std, mean), inv_std)
    return _attached(rule, x, mask, statistics, size, backward, context)


def pooled_means(sums: Sums, axis_name: AxisName) -> Correction:
    """E[g] and E[g z] over the values of all devices."""
    g, gz, size = total(sums, axis_name)
    least = jnp.maximum(size, 1.0)
    return Correction(g / least, gz / least)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attached(rule, x, mask, statistics, size, backward, context):
    del rule, x, mask, size, backward, context
    return statistics


def _forward(rule, x, mask, statistics, size, backward, context):
    del rule
    return statistics, (x, mask, statistics, size, backward, context)


@jax.named_scope("backward_statistics")
def _backward(rule, saved, cotangent):
    """The sums follow from the cotangents of the mean and the scale in normalizing."""
    _warn_without_optimizer()
    x, mask, statistics, size, backward, context = saved
    scale = jnp.where(statistics.inv_std != 0, statistics.inv_std, 1.0)
    sums = Sums(-cotangent.mean / scale, cotangent.inv_std * scale, size)
    correction, values = rule(in_dtype(backward, sums.g.dtype), sums, context)
    gradient = _gradient(x, mask, statistics, correction)
    return gradient, None, None, None, _next(backward, values), None


_attached.defvjp(_forward, _backward)


def _gradient(x, mask, statistics, correction):
    """−(E[g] + z E[g z]) · inv_std at every value that counts."""
    mean, inv_std, g, gz = (align(leaf, x) for leaf in (*statistics, *correction))
    gradient = -(g + (x.astype(wide(x.dtype)) - mean) * inv_std * gz) * inv_std
    if mask is not None:
        gradient = jnp.where(mask, gradient, 0.0)
    return _differentiable_once(gradient.astype(x.dtype))


@jax.custom_jvp
def _differentiable_once(gradient: jax.Array) -> jax.Array:
    return gradient


@_differentiable_once.defjvp
def _refuse(primals, tangents):
    raise ValueError(
        "a method with backward statistics got a second derivative (a gradient penalty, a "
        "Hessian-vector product, MAML), expected a first derivative, because it averages "
        "gradients over batches; write batch_norm(...) or "
        'cross_iteration_batch_norm(gradient="window") instead.'
    )


def _next(backward: BackwardStatistics, values: jax.Array) -> BackwardStatistics:
    """The "gradient" of the averages: their next values, and a weight of one.

    A sum over calls, devices or micro-batches, and any factor of the loss, scale both
    values and weight. The optimizer divides the values by the weight. A weight of zero
    writes nothing.
    """
    finite = jnp.isfinite(values).all(axis=0)
    weight = finite.astype(backward.steps.dtype)
    values = jnp.where(finite, values, 0.0).astype(backward.values.dtype)
    return BackwardStatistics(values, weight)


def is_backward(node: Any) -> bool:
    """Whether a node of a tree holds backward statistics."""
    return isinstance(node, BackwardStatistics)


def written(
    backward: BackwardStatistics, gradient: BackwardStatistics
) -> BackwardStatistics:
    """The averages after a step, from their "gradient"; unchanged if its weight is zero."""
    known = gradient.steps != 0
    values = gradient.values / jnp.where(known, gradient.steps, 1.0)[..., None, :]
    return BackwardStatistics(
        jnp.where(known[..., None, :], values, backward.values),
        backward.steps + known.astype(backward.steps.dtype),
    )


def _accepted(name: str, backward: Any) -> BackwardStatistics:
    if not is_backward(backward):
        raise TypeError(
            f"{name} got backward of type {type(backward).__name__}, expected "
            "BackwardStatistics; make it with estimator.init_backward(features)."
        )
    if not isinstance(backward.steps, Tracer) and not _all_written(backward.steps):
        raise ValueError(
            f"{name} got backward statistics that an optimizer has changed like weights, "
            f"expected averages of gradients; {WRITE}, and restart from fresh backward "
            "statistics."
        )
    return jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), backward)


def _is_written(steps: jax.Array) -> jax.Array:
    """Counts are whole and not negative; an ordinary gradient step breaks that."""
    return (steps >= 0) & (steps == jnp.floor(steps))


def _all_written(steps: jax.Array) -> bool:
    with jax.ensure_compile_time_eval():
        return bool(_is_written(steps).all())


def _spread_like(x: jax.Array, tree: Any) -> Any:
    zero = lax.full_like(x, 0, shape=())
    return jax.tree.map(lambda leaf: leaf + zero.astype(leaf.dtype), tree)


class _Process:
    """Whether this process has made an optimizer that writes backward statistics."""

    has_optimizer = False


def note_optimizer() -> None:
    """Called by ``with_backward_statistics``."""
    _Process.has_optimizer = True


def _warn_without_optimizer() -> None:
    if not _Process.has_optimizer:
        warnings.warn(
            "a model with backward statistics computes gradients, but this process has no "
            f"optimizer that updates the statistics; {WRITE}. Without it, the second step "
            "is NaN.",
            stacklevel=2,
        )
