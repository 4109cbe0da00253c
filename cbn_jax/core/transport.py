# SPDX-License-Identifier: Apache-2.0
"""A streaming window under new weights: its moments, their derivatives and its size.

The symbols are those of ``streaming_batch_norm``.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .carrying import Window, shift_of
from .layers import Params
from .moments import Moments, align
from .past_rows import PastRows
from .patches import Sample, inner, product, pull


class Seen(NamedTuple):
    """Outputs of the layer for patches under the current parameters, as constants.

    Attributes:
      patches: P − p of the sample and of the past rows, then p and E[P] − p.
      x: ⟨·, θ⟩ of those, ``[n + rows + 2, C]``.
      moved: ⟨P − p, Δ⟩ of the past rows, ``[rows, C]``.
      mean: ⟨p, θ⟩.
      of_batch: ⟨E[P] − p, θ⟩.
      shift: ⟨p, Δ⟩.
      var: σ²'.
      var_at: ⟨G, θ⟩.
      spread: E[⟨P − p, Δ⟩²].
    """

    patches: Params
    x: jax.Array
    moved: jax.Array
    mean: jax.Array
    of_batch: jax.Array
    shift: jax.Array
    var: jax.Array
    var_at: jax.Array
    spread: jax.Array


@jax.named_scope("transport")
def run(
    d_mean: Params,
    d_var: Params,
    rows: PastRows,
    old: Window,
    sample: Sample,
    patch: Params,
    params: Params,
) -> Seen:
    """One product with θ for all patches, and one for G."""
    params = lax.stop_gradient(params)

    def beside(sample, past, p, patch):
        return jnp.concatenate([sample - p, past - p, p, patch - p])

    means = jax.tree.map(lambda leaf: leaf[None], (d_mean, patch))
    patches = jax.tree.map(beside, sample.patches, rows.patches, *means)
    x = product(patches, params)
    moved = x[sample.weight.shape[0] : -2] - rows.x
    spread = jnp.square(moved).mean(axis=0)
    var_at = inner(d_var, params)
    var = jnp.maximum(old.var + (var_at - old.var_at) + spread, 0.0)
    mean, of_batch = x[-2], x[-1]
    shift = shift_of(mean, old.mean_at)
    return Seen(patches, x, moved, mean, of_batch, shift, var, var_at, spread)


def past_size(size: jax.Array, batch: Moments, seen: Seen, groups: int) -> jax.Array:
    """The weight of the past: at most as many batches as θ takes to turn by one radian.

    All features of a group share p and have the same weight.
    """
    turn = jnp.minimum(seen.spread, seen.var) / jnp.where(seen.var > 0, seen.var, 1.0)
    turn = turn.reshape(groups, -1).mean(axis=1)  # squared
    turn = jnp.repeat(turn, size.size // groups, total_repeat_length=size.size)
    limit = batch.size * lax.rsqrt(jnp.where(turn > 0, turn, 1.0))
    return jnp.where((turn > 0) & (limit > 0), jnp.minimum(size, limit), size)


def growth(var: jax.Array, last: jax.Array) -> jax.Array:
    """The factor from the last variance to the new one; 1 if either is 0."""
    varies = (last > 0) & (var > 0)
    return jnp.where(varies, var / jnp.where(varies, last, 1.0), 1.0)


@jax.named_scope("derivatives")
def factors(sample: Sample, seen: Seen, share: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Factors of P − p in G, at the sample and at the past rows; and the new ⟨G, θ⟩.

    G ← (1 − a) G + 2 E[a (x − μ) (P − p)] + 2 (1 − a) E[⟨P − p, Δ⟩ (P − p)]
    """
    # The mean of the window including the batch, for these patches.
    offset = seen.x[: sample.weight.shape[0]] - (share * seen.of_batch)[None]
    now = 2.0 * share[None] * sample.weight * offset
    past = (2.0 / len(seen.moved)) * (1.0 - share)[None] * seen.moved
    means = jnp.zeros_like(seen.x[-2:])  # the means do not contribute
    cotangent = jnp.concatenate([now, past, means])
    return cotangent, (1.0 - share) * seen.var_at + (cotangent * seen.x).sum(axis=0)


@jax.named_scope("derivatives")
def derivative(
    usable: jax.Array, share: jax.Array, d_var: Params, seen: Seen, cotangent: jax.Array
) -> Params:
    """The new G."""

    def one(g, more):
        new = align(1.0 - share, g) * g.astype(more.dtype) + more
        fits = align(usable, g) & jnp.isfinite(new)
        return jnp.where(fits, new.astype(g.dtype), g)

    return jax.tree.map(one, d_var, pull(seen.patches, cotangent))
