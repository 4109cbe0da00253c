# SPDX-License-Identifier: Apache-2.0
"""Online normalization: normalizes each example by statistics of earlier examples."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.backward import (
    BackwardStatistics,
    Bidirectional,
    Correction,
    Sums,
    attach,
    bidirectional,
)
from cbn_jax.core.batch import instance_moments
from cbn_jax.core.checks import accepted, check_epsilon, check_fraction, in_dtype
from cbn_jax.core.devices import AxisName, of_devices
from cbn_jax.core.moments import Moments
from cbn_jax.core.running import check_values, finite_moments
from cbn_jax.core.statistics import Statistics
from cbn_jax.core.values import factory


class OnlineState(NamedTuple):
    """State of ``online_norm``.

    Attributes:
      mean: ``[C]``, μ, the average of the examples' means, 0 before the first.
      var: ``[C]``, σ², of the values about μ, 1 before the first.
      examples: ``[C]``, the number of examples seen.
    """

    mean: jax.Array
    var: jax.Array
    examples: jax.Array


class _Seen(NamedTuple):
    """Values of each example for the backward pass, ``[examples of all devices, C]``.

    Attributes:
      y: E[y], the mean of its normalized values.
      square: E[y²].
      inv_std: the scale that normalized it.
      usable: whether it has finite values that count.
    """

    y: jax.Array
    square: jax.Array
    inv_std: jax.Array
    usable: jax.Array


@factory
def online_norm(
    forward_decay: float = 0.999, backward_decay: float = 0.99, *, epsilon: float = 1e-5
) -> Bidirectional:
    """Online normalization: normalizes each example by statistics of earlier examples.

    E and Var are over the positions of example t, and a is the forward decay::

        y  = (x − μ) / √(σ² + ε)
        σ² ← a σ² + (1 − a) Var[x] + a (1 − a) (E[x] − μ)²
        μ  ← a μ + (1 − a) E[x]

    Two averages of the backward pass, u and v, keep its gradient orthogonal to 1 and to y
    over time. g is the gradient at y, and b is the backward decay::

        h = g − (1 − b) v y,                      v ← v + E[h y]
        ∂L/∂x = h / √(σ² + ε) − (1 − b) u,        u ← u + E[∂L/∂x]

    The method takes the examples of a batch one after another. With several devices it
    takes them in the order of the devices.

    Use it with one example per step. Activations may grow with depth, because past
    statistics normalize the output of the current weights. The paper adds a guard after
    scale and bias: ``jnp.clip(norm(x), -5, 5)``, or layer scaling, ``nn.RMSNorm`` over a
    whole example.

    Args:
      forward_decay: a in [0, 1), per example.
      backward_decay: b in [0, 1), per example.
      epsilon: added to the variance, inside the root.

    Returns:
      A ``Bidirectional`` whose state is an ``OnlineState``. In training its statistics are
      ``[N, 1, …, 1, C]``. Its ``BackwardStatistics`` have two rows, u and v; the optimizer
      writes them.

    Raises:
      ValueError: an argument out of range; features that do not fit the state; a mask that
        does not fit; backward statistics that an optimizer changed like weights.
      TypeError: ``x`` is not floating point; the state is another method's; training
        without ``at``.

    An example without a value that counts (``mask``), or with NaN or inf in a feature, does
    not change the averages of that feature.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.online_norm(forward_decay=0.5)
      >>> state, backward = estimator.init(1), estimator.init_backward(1)
      >>> x = jnp.array([[4.0], [4.0]])
      >>> statistics, state = estimator.at(backward).train(state, x)
      >>> statistics.mean[:, 0], state.mean  # before each example, and after both
      (Array([0., 2.], dtype=float32), Array([3.], dtype=float32))

    Reference: Vitaliy Chiley, Ilya Sharapov, Atli Kosson, Urs Köster, Ryan Reece, Sofía
    Samaniego de la Fuente, Vishal Subbiah, Michael James, "Online Normalization for
    Training Neural Networks", NeurIPS 2019, arXiv:1905.05894.

    Differs from the paper: the method does not include the guard.
    """
    name = "online_norm"
    check_fraction("forward_decay", forward_decay)
    check_fraction("backward_decay", backward_decay)
    check_epsilon(epsilon)

    def accept(state, x, mask):
        return accepted(name, state, OnlineState, lambda s: s.mean, x, mask)

    def init(features, layer=None, params=None):
        del layer, params
        zero = jnp.zeros(features, jnp.float32)
        return OnlineState(zero, jnp.ones_like(zero), jnp.zeros_like(zero))

    def train(state, x, source=None, *, axis_name=None, mask=None, backward):
        del source
        state, x = accept(state, x, mask)
        check_values(name, x, axis_name, 1)
        state, given = lax.stop_gradient((state, x))
        own = instance_moments(given, mask)
        examples = _of_all_devices(own, axis_name)
        before, usable, after = _follow(state, examples, forward_decay)
        statistics = Statistics(before.mean, lax.rsqrt(before.var + epsilon))

        def rule(backward, sums, seen):
            return _control(backward, sums, seen, backward_decay, axis_name)

        here = jax.tree.map(lambda leaf: _of_this_device(leaf, x, axis_name), statistics)
        seen = _seen(examples, statistics, usable)
        return attach(rule, x, mask, here, own.size, backward, seen), after

    def infer(state, x, *, mask=None):
        state, _ = accept(state, x, mask)
        return Statistics(state.mean, lax.rsqrt(state.var + epsilon))

    return bidirectional(name, init, train, infer, epsilon, rows=2)


def _follow(
    state: OnlineState, examples: Moments, a: float
) -> tuple[OnlineState, jax.Array, OnlineState]:
    """The state before each example, which examples entered, and the state at the end."""

    def step(old, example):
        offset = example.mean - old.mean
        new = OnlineState(
            mean=old.mean + (1.0 - a) * offset,
            var=a * old.var + (1.0 - a) * (example.var + a * jnp.square(offset)),
            examples=old.examples + 1.0,
        )
        usable = finite_moments(example) & jnp.isfinite(new.var)
        return _chosen(usable, new, old), (old, usable)

    start = _like_row(in_dtype(state, examples.mean.dtype), examples)
    after, (before, usable) = lax.scan(step, start, examples)
    after = jax.tree.map(lambda new, old: new.astype(old.dtype), after, state)
    return before, usable, after


def _control(
    backward: BackwardStatistics, sums: Sums, seen: _Seen, b: float, axis_name: AxisName
) -> tuple[Correction, jax.Array]:
    """The control process of the gradient, example by example."""
    size = jnp.maximum(sums.size, 1.0)
    means = _of_all_devices(Correction(sums.g / size, sums.gz / size), axis_name)

    def step(uv, example):
        mean, seen = example
        u, v = (1.0 - b) * uv[0], (1.0 - b) * uv[1]
        change = ((mean.g - v * seen.y) * seen.inv_std - u, mean.gz - v * seen.square)
        new = jax.tree.map(lambda old, more: old + more, uv, change)
        return _chosen(seen.usable, new, uv), Correction(u / seen.inv_std, v)

    uv, used = lax.scan(step, _like_row(tuple(backward.values), seen), (means, seen))
    here = jax.tree.map(lambda leaf: _of_this_device(leaf, sums.g, axis_name), used)
    return here, jnp.stack(uv)


def _seen(examples: Moments, statistics: Statistics, usable: jax.Array) -> _Seen:
    y = (examples.mean - statistics.mean) * statistics.inv_std
    square = examples.var * jnp.square(statistics.inv_std) + jnp.square(y)
    return _Seen(y, square, statistics.inv_std, usable)


def _chosen(usable: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(usable, n, o), new, old)


def _like_row(carry: Any, rows: Any) -> Any:
    """The start of a scan, with the dtype of the rows and their spread over devices."""
    zero = lax.full_like(jax.tree.leaves(rows)[0][0], 0)
    return jax.tree.map(lambda leaf: leaf + zero, carry)


def _of_all_devices(each: Any, axis_name: AxisName) -> Any:
    """Rows ``[N, 1, …, 1, C]`` of this device as ``[examples of all devices, C]``."""
    rows = jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0], leaf.shape[-1]), each)
    rows = of_devices(rows, axis_name)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), rows)


def _of_this_device(rows: jax.Array, x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The rows of the examples of ``x``, as ``[N, 1, …, 1, C]``."""
    if axis_name is not None:
        start = lax.axis_index(axis_name) * x.shape[0]
        rows = lax.dynamic_slice_in_dim(rows, start, x.shape[0])
    return jnp.expand_dims(rows, tuple(range(1, x.ndim - 1)))
