# SPDX-License-Identifier: Apache-2.0
"""Corrected inference: the expected training statistics of an example."""

import dataclasses

import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import instance_moments
from cbn_jax.core.checks import check_traits
from cbn_jax.core.estimator import Estimator, Trait
from cbn_jax.core.moments import align
from cbn_jax.core.statistics import Statistics
from cbn_jax.core.values import factory

REFUSED = {
    "corrected": "got a method with corrected inference, expected one without; correct it "
    "once.",
    "per_example": "got a method with statistics per example, expected one mean and one "
    "scale per feature; group statistics need no correction.",
    "gated": "got a gated method, expected the gate outside; write "
    "adaptive_batch_norm(corrected_inference(estimator, ...)), or fitted_inference.",
}


_CORRECTED: frozenset[Trait] = frozenset({"corrected"})


@factory
def corrected_inference(estimator: Estimator, examples: float) -> Estimator:
    """Corrected inference: statistics conditioned on the example, as in training.

    In training each example contributes 1/m of the statistics that normalize it, which are
    therefore biased towards it. Let μ_I, σ²_I be the moments of the example over its
    positions, and μ, σ² the running ones. If the other examples are independent draws, the
    expected training statistics are exactly::

        μ̂ = μ + (μ_I − μ) / m        σ̂² = (1 − 1/m) σ² + σ²_I / m + (1/m)(1 − 1/m)(μ_I − μ)²

    Ordinary inference omits the terms in 1/m. The smaller m, the more it differs from
    training. m → ∞ is ordinary inference. m = 1 is instance norm, as training with single
    examples is. Training and state are those of ``estimator``, so that you can wrap a
    trained one.

    The correction is large with one or two examples, and small with more. A prediction
    depends on its own example only. An example without a value that counts (``mask``) gets
    ordinary inference. The layer cannot be folded into the one before it.

    Args:
      estimator: any method with one mean and one variance per feature.
      examples: m, the number of examples in a training statistic, at least 1. Count the
        examples of one batch on all devices that share it. For cross-iteration methods with
        ``running="window"`` multiply by the window. For ``diminishing_batch_norm`` divide
        by α (exact for the mean).

    Returns:
      An Estimator with another ``infer``, whose statistics are ``[N, 1, …, 1, C]``.

    Raises:
      ValueError: an argument out of range; an estimator with statistics per example,
        corrected already, or gated.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.corrected_inference(cbn.batch_norm(), examples=2)
      >>> state = cbn.from_batch_stats(mean=jnp.array([0.0]), var=jnp.array([1.0]))
      >>> x = jnp.array([[4.0], [0.0]])
      >>> estimator.infer(state, x).mean[:, 0]
      Array([2., 0.], dtype=float32)

    Reference: Lei Zhang, "Two recent advances on normalization methods for deep neural
    network optimization", VCIP 2020, doi:10.1109/VCIP49819.2020.9301751; and Hongwei Yong,
    "Effective and efficient optimization methods for deep learning", PolyU 2022, chapter 3.

    Related: Saurabh Singh, Abhinav Shrivastava, "EvalNorm", ICCV 2019, arXiv:1904.06031,
    and Cecilia Summers, Michael J. Dinneen, "Four Things Everyone Should Know to Improve
    Batch Normalization", ICLR 2020, arXiv:1906.03548, mix the same two statistics. The
    former fits the weights online, the latter chooses them on held-out data.

    Differs from the papers, whose formulas could not be obtained: the formula above is
    derived here from its assumption. The first paper is an abstract. The second describes a
    linear regression of batch on instance statistics, which ``fitted_inference`` is.
    """
    check_traits("corrected_inference", estimator.traits, REFUSED)
    if not examples >= 1:
        raise ValueError(
            f"examples is {examples!r}, expected the number of examples of a training "
            "statistic, at least 1."
        )

    def infer(state, x, *, mask=None):
        running = estimator.infer(state, x, mask=mask)
        x = jnp.asarray(x)
        instance = instance_moments(x, mask)
        share = jnp.where(instance.size > 0, 1.0 / examples, 0.0)
        mean, inv_std = (align(v, x).astype(instance.mean.dtype) for v in running)
        offset = instance.mean - mean
        var = (1.0 - share) * inv_std**-2 + share * (instance.var + estimator.epsilon)
        var = var + share * (1.0 - share) * jnp.square(offset)
        return Statistics(mean + share * offset, lax.rsqrt(var))

    traits = estimator.traits | _CORRECTED
    return dataclasses.replace(estimator, infer=infer, traits=traits)
