# SPDX-License-Identifier: Apache-2.0
"""Gradient centralization for optax: subtracts the mean from gradients of kernels."""

from typing import Literal

import jax

from cbn_jax.core.checks import check_choice
from cbn_jax.core.optional import require

with require("optax", "cbn_jax.optax"):
    from optax import GradientTransformation, stateless


def centralize(kernels: Literal["all", "conv"] = "all") -> GradientTransformation:
    """Gradient centralization: subtracts from every filter's gradient its mean.

    A kernel's gradient becomes ``g − mean(g)``, the mean over all axes but the last. In
    Flax these are the axes from which one output feature is computed. Put ``centralize``
    before the scaling to center gradients, or after it to center updates::

        optax.chain(centralize(), optax.adam(1e-3))                        # the gradient
        optax.chain(optax.add_decayed_weights(1e-4), centralize(), optax.sgd(0.1, 0.9))
        optax.chain(                                                       # the update
            optax.scale_by_adam(), centralize(), optax.scale_by_learning_rate(1e-3)
        )

    The second is the published order for SGD, after weight decay. The third is recommended
    for methods like Adam: only an update without mean keeps the mean of every filter at its
    initial value. The transformation costs one pass over the gradients.

    Args:
      kernels: "all" takes every array with at least two axes. "conv" takes those with at
        least three, and so leaves dense kernels unchanged. Only the number of axes decides.
        Use ``optax.masked`` to exclude arrays that are not kernels with their outputs last.
        These are embeddings, attention's and other ``DenseGeneral`` layers with several
        output axes, and layers stacked by ``nn.scan`` or ``vmap``, whose first axis counts
        layers.

    Returns:
      An ``optax.GradientTransformation`` without state.

    Raises:
      ValueError: another ``kernels``.
      ModuleNotFoundError: on import, without optax.

    Example:
      >>> import jax.numpy as jnp
      >>> from cbn_jax.optax import centralize
      >>> gradient = {"kernel": jnp.array([[1.0, 2.0], [3.0, 6.0]]), "bias": jnp.ones(2)}
      >>> centralize().update(gradient, ())[0]["kernel"]
      Array([[-1., -2.],
             [ 1.,  2.]], dtype=float32)

    Reference: Hongwei Yong, Jianqiang Huang, Xiansheng Hua, Lei Zhang, "Gradient
    Centralization: A New Optimization Technique for Deep Neural Networks", ECCV 2020,
    arXiv:2004.01461.

    Differs from ``optax.centralize``, which takes the mean over all axes but the first, as
    suits kernels of PyTorch's layout. Differs from the authors' code: "conv" includes
    kernels of 1-D convolutions.
    """
    check_choice("kernels", kernels, ("all", "conv"))
    least = 2 if kernels == "all" else 3

    def center(gradient):
        if gradient.ndim < least:
            return gradient
        inputs = tuple(range(gradient.ndim - 1))
        return gradient - gradient.mean(axis=inputs, keepdims=True)

    return stateless(lambda updates, params: jax.tree.map(center, updates))
