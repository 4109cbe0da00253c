# SPDX-License-Identifier: Apache-2.0
"""Corrected inference whose coefficients are fitted to training batches."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import instance_moments
from cbn_jax.core.checks import accepted, check_traits
from cbn_jax.core.devices import AxisName, total
from cbn_jax.core.estimator import Estimator, State, Trait
from cbn_jax.core.moments import Moments, align
from cbn_jax.core.schedules import ScheduleFn, averaging, cumulative, weights
from cbn_jax.core.statistics import Statistics
from cbn_jax.core.values import factory

from .corrected import REFUSED


class Fit(NamedTuple):
    """Averages over examples for the regression, in running standard deviations.

    d is (μ_I − μ)/σ, t is (μ_B − μ)/σ, and φ is (1, σ²_I/σ², d²). B marks the training
    statistics and I those of the example. μ and σ are the running statistics.

    Attributes:
      slope: ``[2, C]``, of d² and d·t.
      gram: ``[3, 3, C]``, of φφᵀ.
      target: ``[3, C]``, of φ·σ²_B/σ².
    """

    slope: jax.Array
    gram: jax.Array
    target: jax.Array


class FittedState(NamedTuple):
    """State of ``fitted_inference``.

    Attributes:
      state: state of the wrapped estimator.
      fit: averages for the regression, 0 before the first batch.
      batches: ``[C]``, the number of batches in them.
    """

    state: State
    fit: Fit
    batches: jax.Array


_CUMULATIVE = cumulative()


_CORRECTED: frozenset[Trait] = frozenset({"corrected"})


@factory
def fitted_inference(
    estimator: Estimator, *, momentum: float | ScheduleFn = _CUMULATIVE
) -> Estimator:
    """Corrected inference with fitted coefficients, for batches that are not random draws.

    The share of an example in its training statistics is not 1/m in two cases: the examples
    of a batch resemble each other (crops of one image, frames of one video), or the
    statistics come from several batches. For each feature, ``train`` regresses the training
    statistics of the estimator on the moments of each example. ``infer`` predicts with the
    coefficients::

        μ̂ = μ + a (μ_I − μ)        σ̂² = c₀ σ² + c₁ σ²_I + c₂ (μ_I − μ)²

    The fit is by least squares, clipped to 0 ≤ a ≤ 1 and c ≥ 0. Independent draws give the
    coefficients of ``corrected_inference``, up to noise. Before the first batch, inference
    is ordinary inference.

    Fit with the final weights: make one pass over training data in training mode, and keep
    only the new states. Put a trained state in with ``_replace(state=trained)``. For the
    states of a whole model write::

        jax.tree.map(
            lambda new, old: new._replace(state=old), fresh, trained,
            is_leaf=lambda node: isinstance(node, FittedState),  # all normalizers are
        )

    Args:
      estimator: any method with one mean and one variance per feature.
      momentum: decay of the averages in [0, 1), to fit during training; or a schedule
        m ↦ α_m. ``cumulative()`` gives all batches of the pass the same weight.

    Returns:
      An Estimator whose state is a ``FittedState``; its statistics in inference are
      ``[N, 1, …, 1, C]``.

    Raises:
      ValueError: an argument out of range; an estimator with statistics per example,
        corrected already, or gated; and what the estimator raises.
      TypeError: the state is another method's.

    If the estimator's averages skip a batch for a feature (not finite, fewer than two
    values), the fit of that feature skips it too. An example without a value that counts
    (``mask``) gets ordinary inference.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.fitted_inference(cbn.batch_norm())
      >>> state = estimator.init(features=1)
      >>> for x in (jnp.array([[1.0], [3.0]]), jnp.array([[2.0], [4.0]])):
      ...     _, state = estimator.train(state, x)
      >>> estimator.infer(state, x).mean.shape
      (2, 1)

    Reference: Hongwei Yong, "Effective and efficient optimization methods for deep
    learning", PolyU 2022, chapter 3 (batch statistics regression).

    Differs from the thesis, whose formulas could not be obtained: the variance is regressed
    on two quantities of the example instead of one, because its exact expectation has both.
    """
    name = "fitted_inference"
    check_traits(name, estimator.traits, REFUSED)
    average = averaging(momentum)

    def accept(state, x, mask):
        return accepted(name, state, FittedState, lambda s: s.batches, x, mask)

    def init(features, layer=None, params=None):
        def zeros(*shape):
            return jnp.zeros((*shape, features), jnp.float32)

        inside = estimator.init(features, layer, params)
        return FittedState(inside, Fit(zeros(2), zeros(3, 3), zeros(3)), zeros())

    def train(state, x, source=None, *, axis_name=None, mask=None):
        state, x = accept(state, x, mask)
        state = lax.stop_gradient(state)
        statistics, inside = estimator.train(
            state.state, x, source, axis_name=axis_name, mask=mask
        )
        # The running statistics are those before this batch. An average that includes the
        # batch is biased towards it. Only the first batch is compared with its own, because
        # there may be no earlier batch.
        before, after = (estimator.infer(s, x, mask=mask) for s in (state.state, inside))
        running = jax.tree.map(
            lambda old, new: jnp.where(state.batches > 0, old, new), before, after
        )
        instance = instance_moments(lax.stop_gradient(x), mask)
        seen = _fit(lax.stop_gradient(statistics), running, instance, axis_name)
        taken = _taken(state.state, inside)
        return statistics, _averaged(state, seen, taken, average)._replace(state=inside)

    def infer(state, x, *, mask=None):
        state, x = accept(state, x, mask)
        running = estimator.infer(state.state, x, mask=mask)
        instance = instance_moments(x, mask)
        a, c = _solve(state.fit)
        mean, inv_std, a, *c = (
            align(value, x).astype(instance.mean.dtype) for value in (*running, a, *c)
        )
        known = instance.size > 0
        a, *c = (
            jnp.where(known, fitted, ordinary)
            for fitted, ordinary in zip((a, *c), (0.0, 1.0, 0.0, 0.0), strict=True)
        )
        offset = instance.mean - mean
        var = c[0] * inv_std**-2 + c[1] * instance.var + c[2] * jnp.square(offset)
        return Statistics(mean + a * offset, lax.rsqrt(jnp.maximum(var, estimator.epsilon)))

    traits = estimator.traits | _CORRECTED
    return Estimator(init, train, infer, estimator.epsilon, traits)


def _fit(
    training: Statistics, running: Statistics, instance: Moments, axis_name: AxisName
) -> Fit:
    """The averages over one batch; NaN if there was no value."""
    instance = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), instance)
    running = Statistics(*(value.astype(instance.mean.dtype) for value in running))
    mean, scale = (align(value, instance.mean) for value in running)
    counts = instance.size > 0
    d = jnp.where(counts, (instance.mean - mean) * scale, 0.0)
    spread = jnp.where(counts, instance.var * jnp.square(scale), 0.0)
    t = (training.mean - running.mean) * running.inv_std
    ratio = jnp.square(running.inv_std / training.inv_std)
    phi = jnp.stack([counts.astype(d.dtype), spread, jnp.square(d)])
    fit = Fit(
        slope=jnp.stack([jnp.square(d).sum(0), d.sum(0) * t]),
        gram=jnp.einsum("inc,jnc->ijc", phi, phi, precision="highest"),
        target=phi.sum(1) * ratio[None],
    )
    sums = total(fit, axis_name)
    return jax.tree.map(lambda leaf: leaf / align(sums.gram[0, 0], leaf), sums)


def _taken(before: State, after: State) -> jax.Array | bool:
    """Features whose averages include the batch; others have no statistics of it."""
    before, after = _inside(before), _inside(after)
    return after.steps > before.steps if hasattr(after, "steps") else True


def _inside(state: State) -> State:
    """The innermost state, inside of wrappers, which counts the batches."""
    while hasattr(state, "state"):
        state = state.state
    return getattr(state, "running", state)


def _averaged(
    state: FittedState, seen: Fit, taken: jax.Array | bool, average: ScheduleFn
) -> FittedState:
    """The averages with one more batch; features that are not finite keep theirs."""
    seen = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), seen)
    usable = taken & jnp.isfinite(seen.gram).all((0, 1)) & jnp.isfinite(seen.target).all(0)
    usable &= jnp.isfinite(seen.slope).all(0)
    batches = state.batches + usable.astype(jnp.float32)
    alpha = weights(average, jnp.maximum(batches, 1.0))

    def blend(old, new):
        return old + jnp.where(align(usable, new), align(alpha, new) * (new - old), 0.0)

    return state._replace(fit=jax.tree.map(blend, state.fit, seen), batches=batches)


def _solve(fit: Fit) -> tuple[jax.Array, jax.Array]:
    """Slope a ``[C]`` and coefficients c ``[3, C]``.

    A small ridge towards ordinary inference, c = (1, 0, 0), determines coefficients that
    the data leave open. For example, a dense layer has no variance within an example.
    """
    square, product = fit.slope
    a = jnp.clip(product / jnp.where(square > 0, square, 1.0), 0.0, 1.0)
    ridge = 1e-4 * jnp.eye(3, dtype=fit.gram.dtype)
    gram = jnp.moveaxis(fit.gram, -1, 0) + ridge[None]
    target = fit.target.T + ridge[:1]
    # The system is solved with unit diagonals, because the matrix holds fourth powers of
    # large deviations.
    unit = lax.rsqrt(jnp.diagonal(gram, axis1=1, axis2=2))
    gram = (
        gram * unit[:, :, None] * unit[:, None, :]
        + 1e-6 * jnp.eye(3, dtype=gram.dtype)[None]
    )
    c = unit * jnp.linalg.solve(gram, (unit * target)[..., None])[..., 0]
    return a, jnp.maximum(c.T, 0.0)
