# SPDX-License-Identifier: Apache-2.0
"""Inference that mixes training statistics with those of the batch to predict."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import batch_moments
from cbn_jax.core.checks import check_number, check_traits
from cbn_jax.core.estimator import Estimator, Trait
from cbn_jax.core.moments import align
from cbn_jax.core.statistics import Statistics
from cbn_jax.core.values import factory

from .corrected import REFUSED

_CORRECTED: frozenset[Trait] = frozenset({"corrected"})


@factory
def mixed_inference(estimator: Estimator, examples: float = 16.0) -> Estimator:
    """Adapts inference to shifted data, by the statistics of the batch to predict.

    n is the number of examples in that batch, and (μ, σ²) are the statistics from
    training::

        w = n / (n + examples)
        mean = (1 − w) μ + w E[x],   var = (1 − w) σ² + w Var[x]

    ``examples=0`` uses the batch alone. The prediction for an example then depends on the
    other examples in its batch. Training is that of the estimator.

    Use it if the data to predict have drifted: other weather, cameras or sites. On data
    like the training data it is worse than plain inference.

    Args:
      estimator: a method with statistics per feature.
      examples: weight of the training statistics as a number of examples, 0 or more.

    Returns:
      An Estimator with the state of ``estimator``.

    Raises:
      ValueError: ``examples`` below 0; an estimator whose inference is corrected already
        or per example, or that is gated.

    Features without a value that counts (``mask``) keep the training statistics.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.mixed_inference(cbn.batch_norm(), examples=2)
      >>> state = cbn.from_batch_stats(mean=jnp.array([0.0]), var=jnp.array([1.0]))
      >>> estimator.infer(state, jnp.array([[3.0], [5.0]])).mean  # half of 0, half of 4
      Array([2.], dtype=float32)

    Reference: Steffen Schneider, Evgenia Rusak, Luisa Eck, Oliver Bringmann, Wieland
    Brendel, Matthias Bethge, "Improving robustness against common corruptions by covariate
    shift adaptation", NeurIPS 2020, arXiv:2006.16971.
    """
    name = "mixed_inference"
    check_traits(name, estimator.traits, REFUSED)
    check_number("examples", examples)
    if not examples >= 0:
        raise ValueError(
            f"examples is {examples!r}, expected a number of examples of at least 0."
        )

    def infer(state, x, *, mask=None):
        running = estimator.infer(state, x, mask=mask)
        batch = batch_moments(x, mask=mask)
        share = x.shape[0] / (x.shape[0] + examples) if x.shape[0] else 0.0
        share = jnp.where(batch.size > 0, share, 0.0).astype(batch.mean.dtype)
        mean, inv_std = (align(v, batch.mean).astype(batch.mean.dtype) for v in running)
        var = (1.0 - share) * inv_std**-2 + share * (batch.var + estimator.epsilon)
        return Statistics(mean + share * (batch.mean - mean), lax.rsqrt(var))

    return dataclasses.replace(estimator, infer=infer, traits=estimator.traits | _CORRECTED)
