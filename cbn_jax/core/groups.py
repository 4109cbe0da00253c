# SPDX-License-Identifier: Apache-2.0
"""Shared by the methods that normalize groups of features within each example."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from .checks import check_choice, check_count, check_epsilon, check_unit
from .moments import Moments, align, pool_moments
from .statistics import Statistics, blend, compose, identity_where

Order = Literal["group_first", "batch_first", "parallel"]
ORDERS = ("group_first", "batch_first", "parallel")
X = TypeVar("X")


class StepCount(NamedTuple):
    """State of a method without any other state.

    Attributes:
      steps: ``[C]``, the number of batches trained on.
    """

    steps: jax.Array


class BatchBranch(NamedTuple):
    """The batch normalizer of a mixed method.

    Attributes:
      statistics: statistics of its input; the identity if they are unknown.
      mix: w, the share of the group normalizer; 1 if the statistics are unknown.
      moments: moments of its input.
    """

    statistics: Statistics
    mix: jax.Array
    moments: Moments


def mixed(
    order: Order,
    x: X,
    group: Callable[[X], Statistics],
    batch: Callable[[X], BatchBranch],
    apply: Callable[[X, Statistics], X],
) -> tuple[Statistics, Moments]:
    """Group statistics G and batch statistics B as one affine map of the activations.

    Args:
      order: "group_first" is w G(x) + (1 − w) B(G(x)), "batch_first" is
        w G(B(x)) + (1 − w) B(x), "parallel" is w G(x) + (1 − w) B(x).
      x: the activations, or their moments.
      group: computes G from its input.
      batch: computes B from its input.
      apply: normalizes ``x``.

    Returns:
      The statistics of the mix, and the moments behind B.
    """
    if order == "group_first":
        g = group(x)
        b = batch(apply(x, g))
        return blend(b.mix, g, compose(g, b.statistics)), b.moments
    b = batch(x)
    if order == "parallel":
        return blend(b.mix, group(x), b.statistics), b.moments
    g = group(apply(x, b.statistics))
    return blend(b.mix, compose(b.statistics, g), b.statistics), b.moments


def branch(
    statistics: Statistics,
    mix: jax.typing.ArrayLike,
    known: jax.Array,
    moments: Moments,
    ndim_like: jax.Array,
) -> BatchBranch:
    """A ``BatchBranch`` with axes like those of ``ndim_like``."""
    known = align(known, ndim_like)
    aligned = Statistics(*(align(value, ndim_like) for value in statistics))
    share = align(jnp.asarray(mix, aligned.mean.dtype), ndim_like)
    share = jnp.where(known, share, 1.0)
    return BatchBranch(identity_where(~known, aligned), share, moments)


def pool_groups(instance: Moments, num_groups: int) -> Moments:
    """Moments of each group of each example, repeated by feature: ``[N, 1, …, 1, C]``."""
    size = instance.mean.shape[-1] // num_groups

    def split(leaf):
        return jnp.moveaxis(leaf.reshape(*leaf.shape[:-1], num_groups, size), -1, 0)

    pooled = pool_moments(jax.tree.map(split, instance))
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, size, axis=-1), pooled)


def check_options(mix: Any, num_groups: int, order: str, epsilon: float) -> None:
    """Checks the arguments that the mixed methods share."""
    check_unit("mix", mix, "the share of the group statistics")
    check_count("num_groups", num_groups, 1)
    check_choice("order", order, ORDERS)
    check_epsilon(epsilon)


def check_divides(method: str, features: int, num_groups: int) -> None:
    """Checks that the features divide into groups of one size."""
    if features % num_groups:
        raise ValueError(
            f"{method} got {features} features and num_groups={num_groups}, expected a "
            f"num_groups that divides {features}; write num_groups=..."
        )


def check_group_size(method: str, x: jax.Array, num_groups: int) -> None:
    """Checks that a group holds two values or more; otherwise every output is zero."""
    if math.prod(x.shape[1:]) == num_groups:
        raise ValueError(
            f"{method} got x of shape {x.shape} and num_groups={num_groups}, which makes "
            "groups of one value, expected at least two; write a smaller num_groups."
        )
