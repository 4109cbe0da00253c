# SPDX-License-Identifier: Apache-2.0
"""Corrected inference: what an example's statistics would have been in training."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._checks import check_activations, check_epsilon, check_state, check_traits
from ._estimator import Estimator, State
from ._moments import AxisName, Moments, align, exchange, instance_moments
from ._running import Averaging, averaging, cumulative, weights
from ._statistics import Statistics

_REFUSED = {
    "corrected": "got a method whose inference is corrected already; correct it once.",
    "per_example": "got a method with statistics per example, expected one mean and one "
    "scale per feature; group statistics see the example alone already.",
    "gated": "got a gated method, expected the gate outside; write "
    "adaptive_batch_norm(corrected_inference(estimator, ...)), or fitted_inference.",
}


def corrected_inference(
    estimator: Estimator, batch_size: float, *, epsilon: float = 1e-5
) -> Estimator:
    """Corrected inference: statistics conditioned on the example, as in training.

    In training an example was one of m that its statistics came from, so these leaned
    towards it. With μ_I, σ²_I the example's own moments over its positions and μ, σ² the
    running ones, the expectation of its training statistics is exactly::

        μ̂ = μ + (μ_I − μ) / m        σ̂² = (1 − 1/m) σ² + σ²_I / m + (1/m)(1 − 1/m)(μ_I − μ)²

    if the others are independent draws. Ordinary inference forgets the second terms; the
    smaller m, the further it is from training. m → ∞ is ordinary inference, m = 1 is
    instance norm, which is what training with single examples was. Training and state are
    those of ``estimator``, so that it may be put around a trained one.

    Expect it to matter at one or two examples, and to matter little from there on; a
    prediction then depends on its own example only, as ever. An example's moments include
    padding: inference takes no mask. The layer cannot be folded into the one before it.

    Args:
      estimator: any method with one mean and one variance per feature.
      batch_size: m, examples behind a training statistic, at least 1: those of one batch on
        all devices that share it; times the window for cross-iteration methods (with
        ``running="window"``), over α for ``diminishing_batch_norm`` (exact for the mean).
      epsilon: that of the estimator.

    Returns:
      An Estimator that differs in ``infer``; its statistics are ``[N, 1, …, 1, C]``.

    Raises:
      ValueError: an argument out of range; an estimator with statistics per example,
        corrected already, or gated.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.corrected_inference(cbn.batch_norm(), batch_size=2)
      >>> state = cbn.running_moments(mean=jnp.array([0.0]), var=jnp.array([1.0]))
      >>> x = jnp.array([[4.0], [0.0]])
      >>> estimator.infer(state, x).mean[:, 0]
      Array([2., 0.], dtype=float32)

    Reference: Lei Zhang, "Two recent advances on normalization methods for deep neural
    network optimization", VCIP 2020, doi:10.1109/VCIP49819.2020.9301751; and Hongwei Yong,
    "Effective and efficient optimization methods for deep learning", PolyU 2022, chapter 3.

    Differs from the papers, whose formulas could not be obtained (the first is an abstract,
    the second describes a linear regression of batch on instance statistics): the formula
    above is derived here from its assumption. ``fitted_inference`` is the regression.
    """
    check_traits("corrected_inference", estimator.traits, _REFUSED)
    check_epsilon(epsilon)
    if not batch_size >= 1:
        raise ValueError(
            f"batch_size is {batch_size!r}, expected the number of examples behind a "
            "training statistic, from 1 on."
        )
    share = 1.0 / batch_size

    def infer(state, x):
        running = estimator.infer(state, x)
        instance = instance_moments(x)
        mean, inv_std = (align(v, x).astype(instance.mean.dtype) for v in running)
        offset = instance.mean - mean
        var = (1.0 - share) * inv_std**-2 + share * (instance.var + epsilon)
        var = var + share * (1.0 - share) * jnp.square(offset)
        return Statistics(mean + share * offset, lax.rsqrt(var))

    return Estimator(
        estimator.init, estimator.train, infer, estimator.traits | {"corrected"}
    )


class Fit(NamedTuple):
    """Averages over examples from which the regression is solved, in running deviations.

    With d = (μ_I − μ)/σ, t = (μ_B − μ)/σ and φ = (1, σ²_I/σ², d²); B is what the training
    statistics said, I the example, μ and σ the running statistics.

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
      state: that of the estimator inside.
      fit: averages for the regression, 0 before the first batch.
      steps: ``[C]``, the number of batches in them.
    """

    state: State
    fit: Fit
    steps: jax.Array


def fitted_inference(
    estimator: Estimator,
    *,
    momentum: float | Averaging = cumulative,
    epsilon: float = 1e-5,
) -> Estimator:
    """Corrected inference with fitted coefficients, for batches that are no random draws.

    Where the examples of a batch resemble each other (crops of one image, frames of one
    video) or where training statistics are more than a batch's, the share of an example in
    them is not 1/m. ``train`` regresses, feature by feature, what the estimator's training
    statistics say on the moments of each example, and ``infer`` predicts by that::

        μ̂ = μ + a (μ_I − μ)        σ̂² = c₀ σ² + c₁ σ²_I + c₂ (μ_I − μ)²

    by least squares, clipped to 0 ≤ a ≤ 1 and c ≥ 0. Independent draws give the
    coefficients of ``corrected_inference``, up to noise. Before the first batch it is
    ordinary inference.

    Fit with final weights, in one pass over training data in training mode that keeps the
    new states and nothing else. A trained state is put in by ``_replace(state=trained)``,
    in a whole model of fresh states by::

        jax.tree.map(
            lambda new, old: new._replace(state=old), fresh, trained,
            is_leaf=lambda node: isinstance(node, FittedState),  # all normalizers are
        )

    Args:
      estimator: any method with one mean and one variance per feature.
      momentum: how the batches of the pass are averaged: ``cumulative``, all alike; or a
        decay, to fit along with training.
      epsilon: that of the estimator.

    Returns:
      An Estimator whose state is a ``FittedState``; its statistics in inference are
      ``[N, 1, …, 1, C]``.

    Raises:
      ValueError: an argument out of range; an estimator with statistics per example,
        corrected already, or gated; and what the estimator raises.
      TypeError: the state is another method's.

    Features that are not finite in a batch, and those without a value that counts, leave
    the fit as it is.

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
    on two quantities of the example instead of one, as its exact expectation asks.
    """
    name = "fitted_inference"
    check_traits(name, estimator.traits, _REFUSED)
    check_epsilon(epsilon)
    average = averaging(momentum)

    def check(state, x):
        check_activations(name, x)
        check_state(name, state, FittedState, lambda s: s.steps, x)

    def init(features, params=None, groups=1):
        def zeros(*shape):
            return jnp.zeros((*shape, features), jnp.float32)

        inside = estimator.init(features, params, groups)
        return FittedState(inside, Fit(zeros(2), zeros(3, 3), zeros(3)), zeros())

    def train(state, x, source=None, *, axis_name=None, mask=None):
        check(state, x)
        state = lax.stop_gradient(state)
        statistics, inside = estimator.train(
            state.state, x, source, axis_name=axis_name, mask=mask
        )
        # Of the batches before: an average that holds this one already leans towards it.
        # Only the first batch, before which there may be none, is compared with its own.
        before, after = (estimator.infer(s, x) for s in (state.state, inside))
        running = jax.tree.map(
            lambda old, new: jnp.where(state.steps > 0, old, new), before, after
        )
        instance = instance_moments(lax.stop_gradient(x), mask)
        seen = _fit(lax.stop_gradient(statistics), running, instance, axis_name)
        seen = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), seen)
        usable = jnp.isfinite(seen.gram).all((0, 1)) & jnp.isfinite(seen.target).all(0)
        usable &= jnp.isfinite(seen.slope).all(0)
        steps = state.steps + usable.astype(jnp.float32)
        alpha = weights(average, jnp.maximum(steps, 1.0))

        def take_in(old, new):
            step = jnp.where(align(usable, new), align(alpha, new) * (new - old), 0.0)
            return old + step

        return statistics, FittedState(
            inside, jax.tree.map(take_in, state.fit, seen), steps
        )

    def infer(state, x):
        check(state, x)
        running = estimator.infer(state.state, x)
        instance = instance_moments(x)
        a, c = _solve(state.fit)
        mean, inv_std, a, *c = (
            align(value, x).astype(instance.mean.dtype) for value in (*running, a, *c)
        )
        offset = instance.mean - mean
        var = c[0] * inv_std**-2 + c[1] * instance.var + c[2] * jnp.square(offset)
        return Statistics(mean + a * offset, lax.rsqrt(jnp.maximum(var, epsilon)))

    return Estimator(init, train, infer, estimator.traits | {"corrected"})


def _fit(
    believed: Statistics, running: Statistics, instance: Moments, axis_name: AxisName
) -> Fit:
    """The averages over one batch; NaN where there was no value."""
    instance = jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), instance)
    running = Statistics(*(value.astype(instance.mean.dtype) for value in running))
    mean, scale = (align(value, instance.mean) for value in running)
    counts = instance.size > 0
    d = jnp.where(counts, (instance.mean - mean) * scale, 0.0)
    spread = jnp.where(counts, instance.var * jnp.square(scale), 0.0)
    t = (believed.mean - running.mean) * running.inv_std
    ratio = jnp.square(running.inv_std / believed.inv_std)
    phi = jnp.stack([counts.astype(d.dtype), spread, jnp.square(d)])
    _, sums = exchange(
        (),
        Fit(
            slope=jnp.stack([jnp.square(d).sum(0), d.sum(0) * t]),
            gram=jnp.einsum("inc,jnc->ijc", phi, phi),
            target=phi.sum(1) * ratio[None],
        ),
        axis_name,
    )
    return jax.tree.map(lambda leaf: leaf / align(sums.gram[0, 0], leaf), sums)


def _solve(fit: Fit) -> tuple[jax.Array, jax.Array]:
    """Slope a ``[C]`` and coefficients c ``[3, C]``.

    A little ridge towards ordinary inference, c = (1, 0, 0), decides what the data leave
    open: a dense layer has no variance within an example.
    """
    square, product = fit.slope
    a = jnp.clip(product / jnp.where(square > 0, square, 1.0), 0.0, 1.0)
    ridge = 1e-4 * jnp.eye(3, dtype=fit.gram.dtype)
    gram = jnp.moveaxis(fit.gram, -1, 0) + ridge[None]
    target = fit.target.T + ridge[:1]
    c = jnp.linalg.solve(gram, target[..., None])[..., 0]
    return a, jnp.maximum(c.T, 0.0)
