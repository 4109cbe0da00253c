# SPDX-License-Identifier: Apache-2.0
"""Adaptive batch normalization: normalize only the batches that are heterogeneous."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import batch_moments
from cbn_jax.core.checks import (
    activations,
    check_choice,
    check_mask,
    check_state_type,
    check_traits,
    in_float32,
)
from cbn_jax.core.devices import AxisName
from cbn_jax.core.estimator import Estimator, State, Trait
from cbn_jax.core.moments import pool_moments
from cbn_jax.core.named import Name, map_named, named_leaves
from cbn_jax.core.running import check_values, has_variance
from cbn_jax.core.statistics import identity_where, std_of
from cbn_jax.core.values import factory

Measure = Literal["entries", "channels", "examples"]


class GateState(NamedTuple):
    """State of ``adaptive_batch_norm``.

    Attributes:
      state: state of the wrapped estimator.
      gate: scalar, 1 if the next batch is normalized, else 0. Only ``set_gate`` changes it.
    """

    state: State
    gate: jax.Array


def heterogeneity(
    x: jax.Array,
    measure: Measure = "entries",
    *,
    axis_name: AxisName = None,
    mask: jax.Array | None = None,
) -> jax.Array:
    """The heterogeneity of a batch: one number, by which the gate decides.

    Args:
      x: a batch as it enters the network, ``[N, ..., C]``, floating point.
      measure: "entries" is the standard deviation over all entries. "channels" is that of
        each channel, averaged over the channels. "examples" is that between examples at the
        same position, averaged over positions and channels.
      axis_name: axis or axes of ``shard_map``, ``pmap`` or ``vmap`` over which the batch
        is spread; None under ``jit``.
      mask: True where an entry counts. It has the axes of ``x``, each of size 1 or of the
        size in ``x``.

    Returns:
      A float32 scalar, not negative; NaN for a batch that contains NaN or inf. Channels or
      positions with fewer than two entries are left out.

    Raises:
      ValueError: another measure; ``x`` is empty or has fewer than two axes; a mask that
        does not fit.
      TypeError: ``x`` is not floating point.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> x = jnp.array([[0.0, 4.0], [2.0, 6.0]])
      >>> float(cbn.heterogeneity(x, "channels"))
      1.0
    """
    check_choice("measure", measure, ("entries", "channels", "examples"))
    x = activations("heterogeneity", x)
    check_mask("heterogeneity", x, mask)
    check_values("heterogeneity", x, axis_name, 1)
    if measure == "examples":
        mask = None if mask is None else jnp.broadcast_to(mask, x.shape).reshape(len(x), -1)
        x = x.reshape(len(x), -1)
    moments = batch_moments(x, axis_name=axis_name, mask=mask)
    if measure == "entries":
        moments = pool_moments(jax.tree.map(lambda leaf: leaf[:, None], moments))
    std = std_of(moments.var)  # 0 for fewer than two entries
    several = has_variance(moments).sum(dtype=std.dtype)
    return (std.sum() / jnp.maximum(several, 1.0)).astype(jnp.float32)


def set_gate(tree: Any, open: jax.typing.ArrayLike) -> Any:
    """Opens or closes the gates of all adaptive normalizers in a tree of states.

    Args:
      tree: a pytree with a ``GateState`` per layer: linen's ``batch_stats``,
        ``nnx.state(model)``, or one such state.
      open: True to normalize the next batches, False to pass them unchanged. It may be
        traced and must be the same on all devices.

    Returns:
      The tree with the gates set, everything else unchanged.

    Raises:
      ValueError: no ``GateState`` in the tree; more than one truth value.

    Example:
      >>> import cbn_jax as cbn
      >>> estimator = cbn.adaptive_batch_norm(cbn.batch_norm())
      >>> state = cbn.set_gate({"Norm_0": estimator.init(features=1)}, False)
      >>> float(state["Norm_0"].gate)
      0.0
    """
    gates = find_gates(tree)
    if not gates:
        raise ValueError(
            "set_gate got a tree without a GateState, expected the state of a model whose "
            "normalizers are adaptive_batch_norm(...); in linen that is its batch_stats."
        )
    gate = jnp.asarray(open, dtype=bool)

    def put(name, leaf):
        if name not in gates:
            return leaf
        if gate.ndim > leaf.ndim:
            raise ValueError(
                f"set_gate got open of shape {gate.shape}, expected one truth value; write "
                "set_gate(tree, assessment.selected[batch])."
            )
        return jnp.where(gate, jnp.ones_like(leaf), 0.0)

    return map_named(put, tree)


def find_gates(tree: Any) -> set[Name]:
    """The names of all gates in a tree of states."""
    return {name for name in named_leaves(tree) if name[-1:] == ("gate",)}


_GATED: frozenset[Trait] = frozenset({"gated"})


@factory
def adaptive_batch_norm(
    estimator: Estimator, *, inference: Literal["running", "gated"] = "running"
) -> Estimator:
    """Adaptive batch normalization: normalizes heterogeneous batches only.

    Before training, ``cbn_jax.assessment.assess`` measures every batch and finds a
    threshold. A training step sets the gate of all layers at once. It takes the decision
    from the assessment, or measures the current batch::

        assessment = assess(images for images, _ in batches)
        ...
        batch_stats = set_gate(batch_stats, assessment.gate(images))    # under jit

    If the gate is open, the estimator normalizes the batch. If the gate is closed, the
    batch passes unchanged, except for the learned ``scale`` and ``bias``, and the
    estimator's state ignores it. The gate is an array in the state, so changing it causes
    no new trace. NaN in a batch that passes unchanged stays NaN and reaches the gradients
    of its feature.

    The learned scale applies to normalized and to unchanged batches. Inference by running
    statistics uses it only for normalized ones. In our measurements the method is rarely
    better than normalizing every batch; ``python -m benchmarks.studies.adaptive`` repeats
    them. Use other methods unless homogeneous batches cause your problem.

    Args:
      estimator: any method, wrapped or not.
      inference: "running" always normalizes, by the estimator's inference, so that
        predictions do not depend on the batch. "gated" uses the gate in inference too.

    Returns:
      An Estimator whose state is a ``GateState``. Its gate is open at first.

    Raises:
      ValueError: another ``inference``; an estimator that is gated already; and what the
        estimator raises.
      TypeError: the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> estimator = cbn.adaptive_batch_norm(cbn.batch_norm())
      >>> state = cbn.set_gate(estimator.init(features=1), False)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> statistics, state = estimator.train(state, x)
      >>> cbn.normalize(x, statistics)
      Array([[1.],
             [3.]], dtype=float32)

    Reference: Wael Alsobhi, Tarik Alafif, Alaa Abdel-Hakim, Weiwei Zong, "Adaptive Batch
    Normalization for Training Data with Heterogeneous Features", 2022, arXiv:2211.02050.

    Differs from the paper: only its abstract could be obtained. According to the abstract,
    batches are tested before training. A threshold on the heterogeneity of their features
    separates the batches to normalize from the others. This library defines the measures,
    the threshold, inference and the treatment of the estimator's state.
    """
    name = "adaptive_batch_norm"
    check_traits(
        name,
        estimator.traits,
        {"gated": "got a gated method, expected one without a gate."},
    )
    check_choice("inference", inference, ("running", "gated"))

    def accept(state):
        check_state_type(name, state, GateState)
        return in_float32(state)

    def init(features, layer=None, params=None):
        inside = estimator.init(features, layer, params)
        return GateState(inside, jnp.ones((), jnp.float32))

    def train(state, x, source=None, *, axis_name=None, mask=None):
        state = lax.stop_gradient(accept(state))
        statistics, inside = estimator.train(
            state.state, x, source, axis_name=axis_name, mask=mask
        )
        closed = state.gate == 0

        def keep(new, old):
            return jnp.where(closed, old, new)

        inside = jax.tree.map(keep, inside, state.state)
        return identity_where(closed, statistics), GateState(inside, state.gate)

    def infer(state, x, *, mask=None):
        state = accept(state)
        statistics = estimator.infer(state.state, x, mask=mask)
        if inference == "running":
            return statistics
        return identity_where(state.gate == 0, statistics)

    traits = estimator.traits | _GATED
    return Estimator(init, train, infer, estimator.epsilon, traits)
