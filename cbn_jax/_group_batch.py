# SPDX-License-Identifier: Apache-2.0
"""Group and batch statistics, mixed by a learned weight."""

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._checks import (
    check_activations,
    check_choice,
    check_count,
    check_epsilon,
    check_state,
    check_unit,
)
from ._estimator import Estimator
from ._moments import (
    AxisName,
    Moments,
    align,
    batch_moments,
    instance_moments,
    pool_examples,
    pool_moments,
    wide,
)
from ._running import (
    Averaging,
    RunningMoments,
    averaging,
    init_running,
    known_moments,
    update_running,
)
from ._statistics import (
    Statistics,
    blend,
    compose,
    identity_where,
    normalize,
    statistics_of,
    std_of,
)

Order = Literal["group_first", "batch_first", "parallel"]


class Batch(NamedTuple):
    """What the batch has to say.

    Attributes:
      statistics: of what the batch normalizer sees; the identity where they are unknown.
      mix: w, the share of the group; 1 where the batch statistics are unknown.
      seen: the moments behind them.
    """

    statistics: Statistics
    mix: jax.Array
    seen: Moments


def group_batch_norm(
    mix: jax.typing.ArrayLike,
    *,
    num_groups: int = 32,
    order: Order = "group_first",
    momentum: float | Averaging = 0.99,
    epsilon: float = 1e-5,
) -> Estimator:
    """Group normalization with batch normalization mixed in, by a learned weight w.

    With G(x) normalized by groups of features within each example, B(x) by batch
    statistics (running ones in inference)::

        group_first    y = w G(x) + (1 − w) B(G(x))
        batch_first    y = w G(B(x)) + (1 − w) B(x)
        parallel       y = w G(x) + (1 − w) B(x)

    w = 1 is group norm (but for batch_first, where G sees B(x)), w = 0 batch norm (for
    group_first that of G(x)). Every order is one affine map of ``x``: feature maps are read
    once for moments and once to be normalized, whatever the order.

    Prefer it to group norm where batches hold a few examples; ``small_batch_norm`` has
    better batch statistics at one or two.

    The weight is learned like any parameter: call the factory where the parameter is
    known, or give a Flax module the factory, ``Norm(group_batch_norm)``, or
    ``Norm(lambda mix: group_batch_norm(mix, num_groups=8))``, which learns a scalar whose
    sigmoid is w, 0.73 at the start as published.

    Args:
      mix: w in [0, 1], a scalar or ``[C]``; may be traced.
      num_groups: groups of neighboring features, a divisor of their number. Groups of two
        values, after narrow dense layers, leave little but signs.
      order: which normalizer sees ``x``.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a rule
        m ↦ α_m such as ``cumulative``.
      epsilon: added to the variances, inside the root.

    Returns:
      An Estimator whose state is a ``RunningMoments``, of what B sees. Its statistics are
      ``[N, 1, …, 1, C]``.

    Raises:
      ValueError: an argument out of range; features that are no multiple of
        ``num_groups``, that do not fit the state, or that leave groups of one value.
      TypeError: ``x`` is not floating point; the state is another method's.

    Features with one value in the whole batch (a single example after a dense layer) have
    no batch statistics: they are normalized by groups alone, as in inference before any
    batch was seen. Under a ``mask``, features without a value use the running statistics
    for B, and an example without a value passes G as it is. NaN or inf makes the output of
    its feature, and of its example's group, NaN; the averages do not take it in.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> x = jnp.array([[1.0, 3.0], [2.0, 6.0]])
      >>> estimator = cbn.group_batch_norm(mix=1.0, num_groups=1)
      >>> statistics, state = estimator.train(estimator.init(features=2), x)
      >>> cbn.normalize(x, statistics).round(2)  # of each example by itself
      Array([[-1.,  1.],
             [-1.,  1.]], dtype=float32)

    Reference: Agus Gunawan, Xu Yin, Kang Zhang, "Understanding and Improving Group
    Normalization", 2022, arXiv:2207.01972.

    Differs from the paper, as far as the authors' code shows: batch statistics over
    examples and positions instead of examples only, running ones in inference, so that a
    prediction does not depend on what else is predicted; biased variances, ε inside the
    root. ``group_norm_plus`` is the layer as published.
    """
    name = "group_batch_norm"
    _check_options(mix, num_groups, order, epsilon)
    average = averaging(momentum)

    def check(state, x):
        check_activations(name, x)
        check_state(name, state, RunningMoments, lambda s: s.mean, x)
        _check_group_size(name, x, num_groups)

    def group(instance):
        moments = _pool_groups(instance, num_groups)
        return identity_where(moments.size == 0, statistics_of(moments, epsilon))

    def batch_of(moments, known, x):
        statistics = statistics_of(moments, epsilon)
        return _batch(statistics, mix, known, moments, x)

    def init(features, params=None, groups=1):
        del params, groups
        _check_divides(name, features, num_groups)
        return init_running(features)

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        check(state, x)
        state = lax.stop_gradient(state)

        def batch(instance):
            moments = pool_examples(instance, axis_name)
            known = moments.size > 1
            seen = moments._replace(size=jnp.where(known, moments.size, 0.0))
            if mask is not None:
                known |= (moments.size == 0) & (state.steps > 0)
                moments = known_moments(moments, state)
            return batch_of(moments, known, x)._replace(seen=seen)

        instance = instance_moments(x, mask)
        statistics, seen = _ORDERS[order](instance, group, batch, _normalized)
        return statistics, update_running(state, seen, average)

    def infer(state, x):
        check(state, x)
        instance = instance_moments(x)
        running = (leaf.astype(instance.mean.dtype) for leaf in state)
        branch = batch_of(Moments(*running), state.steps > 0, x)
        return _ORDERS[order](instance, group, lambda _: branch, _normalized)[0]

    return Estimator(init, train, infer, frozenset({"per_example"}))


class GroupNormPlusState(NamedTuple):
    """State of ``group_norm_plus``, which remembers nothing.

    Attributes:
      steps: ``[C]``, the number of batches trained on.
    """

    steps: jax.Array


def group_norm_plus(
    mix: jax.typing.ArrayLike,
    *,
    num_groups: int = 32,
    order: Order = "group_first",
    epsilon: float = 1e-5,
) -> Estimator:
    """Group norm plus, with the conventions of the published code.

    As ``group_batch_norm``, but that B normalizes over the examples of a batch only, place
    by place; deviations are taken by n − 1, with ε added to them; and inference uses the
    statistics of the batch that is predicted. So a prediction depends on what else is
    predicted, and training batches hold two examples or more. For comparisons; else take
    ``group_batch_norm``.

    Args:
      mix: w in [0, 1], a scalar or ``[C]``; may be traced.
      num_groups: groups of neighboring features, a divisor of their number. Groups of two
        values, after narrow dense layers, leave little but signs.
      order: which normalizer sees ``x``.
      epsilon: added to the standard deviations.

    Returns:
      An Estimator whose state is a ``GroupNormPlusState``. Its statistics have the shape
      of ``x``.

    Raises:
      ValueError: an argument out of range; features that are no multiple of
        ``num_groups``, that do not fit the state, or that leave groups of one value;
        ``train`` with a single example.
      TypeError: ``x`` is not floating point; the state is another method's.

    A place with fewer than two values, by a ``mask`` or in inference for a single example,
    is normalized by groups alone. An example without a value passes G as it is.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> x = jnp.array([[1.0, 3.0], [2.0, 6.0]])
      >>> estimator = cbn.group_norm_plus(mix=0.0, num_groups=1, order="parallel")
      >>> statistics, state = estimator.train(estimator.init(features=2), x)
      >>> cbn.normalize(x, statistics).round(2)  # of each place by itself
      Array([[-0.71, -0.71],
             [ 0.71,  0.71]], dtype=float32)

    Reference: as for ``group_batch_norm``; the conventions are those of the first author's
    code, agusgun/CS-570-Project on GitHub.

    Differs from that code: a single example is an error in training and normalized by
    groups in inference, instead of NaN; a place that does not vary has finite gradients.
    """
    name = "group_norm_plus"
    _check_options(mix, num_groups, order, epsilon)

    def check(state, x):
        check_activations(name, x)
        check_state(name, state, GroupNormPlusState, lambda s: s.steps, x)
        _check_group_size(name, x, num_groups)

    def check_examples(x, axis_name):
        if len(x) == 1 and axis_name is None:
            raise ValueError(
                f"{name} got x of shape {x.shape}, expected two examples or more, as it "
                "normalizes over examples; write group_batch_norm(...) instead."
            )

    def statistics_between(x, axis_name, mask):
        if mask is not None:  # what does not count is 0 times NaN in gradients
            x = jnp.where(mask, x, 0.0)

        def statistics_by(moments):
            # By n − 1, as in torch.std.
            var = moments.var * moments.size / jnp.maximum(moments.size - 1.0, 1.0)
            return Statistics(moments.mean, 1.0 / (std_of(var) + epsilon))

        def group(x):
            moments = _pool_groups(instance_moments(x, mask), num_groups)
            return identity_where(moments.size == 0, statistics_by(moments))

        def batch(x):
            moments = _place_moments(x, axis_name, mask)
            return _batch(statistics_by(moments), mix, moments.size > 1, moments, x)

        return _ORDERS[order](x, group, batch, normalize)[0]

    def init(features, params=None, groups=1):
        del params, groups
        _check_divides(name, features, num_groups)
        return GroupNormPlusState(jnp.zeros(features, jnp.float32))

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        check(state, x)
        check_examples(x, axis_name)
        x = x.astype(wide(x.dtype))
        statistics = statistics_between(x, axis_name, mask)
        return statistics, GroupNormPlusState(lax.stop_gradient(state.steps) + 1.0)

    def infer(state, x):
        check(state, x)
        return statistics_between(x.astype(wide(x.dtype)), None, None)

    return Estimator(init, train, infer, frozenset({"per_example"}))


# The three published orders, for whatever can be normalized: activations or their moments.
# ``group`` gives statistics, ``batch`` a Batch, ``apply`` normalizes by statistics.


def _group_first(x, group, batch, apply):
    g = group(x)
    b = batch(apply(x, g))
    return blend(b.mix, g, compose(g, b.statistics)), b.seen


def _batch_first(x, group, batch, apply):
    b = batch(x)
    g = group(apply(x, b.statistics))
    return blend(b.mix, compose(b.statistics, g), b.statistics), b.seen


def _parallel(x, group, batch, apply):
    del apply
    b = batch(x)
    return blend(b.mix, group(x), b.statistics), b.seen


_ORDERS = {
    "group_first": _group_first,
    "batch_first": _batch_first,
    "parallel": _parallel,
}


def _batch(
    statistics: Statistics,
    mix: jax.typing.ArrayLike,
    known: jax.Array,
    seen: Moments,
    x: jax.Array,
) -> Batch:
    """What the batch says, with axes like those of ``x``."""
    known = align(known, x)
    aligned = Statistics(*(align(value, x) for value in statistics))
    share = align(jnp.asarray(mix, aligned.mean.dtype), x)
    return Batch(identity_where(~known, aligned), jnp.where(known, share, 1.0), seen)


def _normalized(moments: Moments, statistics: Statistics) -> Moments:
    """The moments of what is normalized; an overflow stays one, and so out of states."""
    return Moments(
        (moments.mean - statistics.mean) * statistics.inv_std,
        jnp.where(
            statistics.inv_std > 0, moments.var * jnp.square(statistics.inv_std), jnp.inf
        ),
        moments.size,
    )


def _pool_groups(instance: Moments, num_groups: int) -> Moments:
    """Moments of each example's groups, repeated for each feature: ``[N, 1, …, 1, C]``."""

    def split(leaf):
        return jnp.moveaxis(leaf.reshape(*leaf.shape[:-1], num_groups, -1), -1, 0)

    size = instance.mean.shape[-1] // num_groups
    pooled = pool_moments(jax.tree.map(split, instance))
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, size, axis=-1), pooled)


def _place_moments(x: jax.Array, axis_name: AxisName, mask: jax.Array | None) -> Moments:
    """Moments over the examples at each place, ``[1, ..., C]``."""
    if mask is not None:
        mask = jnp.broadcast_to(mask, x.shape).reshape(x.shape[0], -1)
    rows = x.reshape(x.shape[0], -1)
    moments = batch_moments(rows, axis_name=axis_name, mask=mask)
    return jax.tree.map(lambda leaf: leaf.reshape(1, *x.shape[1:]), moments)


def _check_options(mix: Any, num_groups: int, order: str, epsilon: float) -> None:
    check_unit("mix", mix, "the share of the group statistics")
    check_count("num_groups", num_groups, 1)
    check_choice("order", order, _ORDERS)
    check_epsilon(epsilon)


def _check_divides(method: str, features: int, num_groups: int) -> None:
    if features % num_groups:
        raise ValueError(
            f"{method} got {features} features and num_groups={num_groups}, expected a "
            f"divisor of {features}; write num_groups=..."
        )


def _check_group_size(method: str, x: jax.Array, num_groups: int) -> None:
    if math.prod(x.shape[1:]) == num_groups:
        raise ValueError(
            f"{method} got x of shape {x.shape} and num_groups={num_groups}, groups of "
            "one value, which would all become zero; write a smaller num_groups."
        )
