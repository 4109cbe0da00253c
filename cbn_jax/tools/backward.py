# SPDX-License-Identifier: Apache-2.0
"""An optimizer that writes the backward statistics of a model."""

from typing import Any

import jax

from cbn_jax.core.backward import is_backward, note_optimizer, written
from cbn_jax.core.optional import require

with require("optax", "cbn_jax.optax"):
    from optax import (
        GradientTransformation,
        GradientTransformationExtraArgs,
        MaskedNode,
        MultiSteps,
        with_extra_args_support,
    )


def with_backward_statistics(
    optimizer: GradientTransformation | MultiSteps,
) -> GradientTransformationExtraArgs:
    """An optimizer that also writes the backward statistics of a model.

    Methods such as ``moving_average_batch_norm`` and ``online_norm`` average statistics
    that only the backward pass computes. The averages are nodes among the parameters, and
    their "gradient" is their next value. This wrapper gives them the update "next
    value − value". The inner optimizer never sees the averages: it does not clip or decay
    them, and keeps no moments of them.

    Make it the outermost wrapper, also around ``optax.chain`` and ``optax.MultiSteps``. It
    changes nothing for parameters without backward statistics.

    Args:
      optimizer: any ``optax.GradientTransformation``, or ``optax.MultiSteps``.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.

    Raises:
      ValueError: ``update`` without ``params``.
      ModuleNotFoundError: on import, without optax.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import cbn_jax as cbn
      >>> estimator = cbn.bidirectional_batch_norm(window=4)
      >>> optimizer = cbn.optax.with_backward_statistics(optax.sgd(0.1))
      >>> x = jnp.array([[1.0], [2.0], [6.0]])
      >>> def loss(params):
      ...     state = estimator.init(features=1)
      ...     statistics, _ = estimator.at(params["backward"]).train(state, x)
      ...     return (params["scale"] * cbn.normalize(x, statistics) ** 2).sum()
      >>> params = {"scale": jnp.ones(()), "backward": estimator.init_backward(1)}
      >>> gradients = jax.grad(loss)(params)
      >>> updates, _ = optimizer.update(gradients, optimizer.init(params), params)
      >>> optax.apply_updates(params, updates)["backward"].values.round(3)  # E[g], E[g z]
      Array([[0.],
             [2.]], dtype=float32)
    """
    if isinstance(optimizer, MultiSteps):
        optimizer = optimizer.gradient_transformation()
    inner = with_extra_args_support(optimizer)
    note_optimizer()

    def init(params):
        return inner.init(_without(params))

    def update(updates, state, params=None, **extra):
        if params is None:
            raise ValueError(
                "with_backward_statistics got no params, expected those of the model; "
                "write optimizer.update(gradients, opt_state, params)."
            )
        others, state = inner.update(_without(updates), state, _without(params), **extra)
        return _joined(updates, params, others), state

    return GradientTransformationExtraArgs(init, update)


def _without(tree: Any) -> Any:
    """The tree without its backward statistics."""
    return jax.tree.map(
        lambda node: MaskedNode() if is_backward(node) else node, tree, is_leaf=is_backward
    )


def _joined(gradients: Any, params: Any, others: Any) -> Any:
    """The inner optimizer's updates, and the changes of the backward statistics."""

    def join(gradient, param, other):
        if not is_backward(gradient):
            return other
        return jax.tree.map(lambda new, old: new - old, written(param, gradient), param)

    return jax.tree.map(join, gradients, params, others, is_leaf=is_backward)
