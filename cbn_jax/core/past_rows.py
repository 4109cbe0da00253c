# SPDX-License-Identifier: Apache-2.0
"""A few positions of past batches, which show how far the weights have moved."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from .carrying import remember
from .layers import Params
from .patches import Sample, per_row

ROWS = 8
FEW = 64  # inputs of a feature


class PastRows(NamedTuple):
    """Positions of past batches, and the layer's outputs for them in the last step.

    Attributes:
      patches: P, each leaf ``[rows, *leaf.shape[:-1], groups]``.
      x: ⟨P − p, θ⟩ ``[rows, C]``.
    """

    patches: Params
    x: jax.Array


def empty_rows(features: int, params: Params, groups: int, d_mean: Params) -> PastRows:
    """Zeros; ``d_mean`` has the form of one patch."""
    many = _row_count(features, params, groups)

    def rows(leaf):
        return jnp.zeros((many, *leaf.shape), jnp.float32)

    return PastRows(jax.tree.map(rows, d_mean), jnp.zeros((many, features), jnp.float32))


def _row_count(features: int, params: Params, groups: int) -> int:
    """Eight; for many inputs a power of two, at most the features of a group."""
    inputs = sum(leaf.size for leaf in jax.tree.leaves(params)) // features
    if inputs <= FEW:
        return ROWS
    return min(ROWS, 1 << max(1, features // groups).bit_length() - 1)


@jax.named_scope("remember")
def remember_rows(
    usable: jax.Array,
    first: jax.Array,
    steps: jax.Array,
    old: PastRows,
    sample: Sample,
    x: jax.Array,
    masked: bool,
) -> PastRows:
    """The rows under the current parameters: all new at first, then one each step.

    Args:
      usable: features that the batch may change.
      first: whether the window is empty.
      steps: number of steps so far; it chooses the row to replace.
      old: the rows of the last step.
      sample: positions of the batch.
      x: ⟨P − p, θ⟩ of the sample and of the old rows, with the new p.
      masked: whether some positions of the sample may not count.
    """
    n, many = sample.weight.shape[0], len(old.x)
    turn = steps.astype(jnp.int32) & (many - 1)
    write = (jnp.arange(many, dtype=jnp.int32) == turn) | first
    write &= usable[0]
    cycled = _cycled(sample, many, masked)

    def put(new, old):
        return jnp.where(per_row(write[:, None], old), cycled(new).astype(old.dtype), old)

    return PastRows(
        patches=jax.tree.map(put, sample.patches, old.patches),
        x=put(x[:n], remember(usable, x[n:], old.x)),
    )


def _cycled(sample: Sample, many: int, masked: bool) -> Callable[[jax.Array], jax.Array]:
    """A function that takes ``many`` rows of a leaf, repeating the rows that count."""
    n, rows = sample.weight.shape[0], jnp.arange(many)
    if not masked:
        return lambda leaf: leaf[:many] if n == many else leaf[rows % n]
    counts = sample.weight[:, 0] > 0
    which = jnp.argsort(~counts, stable=True)[rows % jnp.maximum(counts.sum(), 1)]
    return lambda leaf: leaf[which]
