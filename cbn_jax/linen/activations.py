# SPDX-License-Identifier: Apache-2.0
"""Linen modules that normalize and activate in one step, or activate after a norm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cbn_jax.core.estimator import Estimator
from cbn_jax.methods.batch_norm import batch_norm
from cbn_jax.methods.evonorm import evonorm_b0, evonorm_s0
from cbn_jax.methods.group_norm import group_norm
from cbn_jax.wrappers.learned import Learned

from .norm import Norm


class EvoNormS0(Norm):
    """EvoNorm-S0 in place of norm and activation; see ``cbn_jax.evonorm_s0``.

    It takes the arguments of ``Norm``, including a layer. Its parameters are ``scale``,
    ``bias`` and ``v``.

    Attributes:
      estimator: group norm with the number of groups.

    Example:
      >>> import flax.linen as nn, jax, jax.numpy as jnp
      >>> from cbn_jax.linen import EvoNormS0
      >>> model = nn.Sequential([nn.Conv(32, (3, 3)), EvoNormS0(use_running_average=False)])
      >>> y, _ = model.init_with_output(jax.random.key(0), jnp.ones((1, 4, 4, 3)))
      >>> y.shape
      (1, 4, 4, 32)
    """

    estimator: Estimator | Learned = group_norm(32)

    def _output(self, x, statistics, affine, mask):
        del mask
        y = evonorm_s0(x, statistics, _v(self, x), *affine)
        return y if self.dtype is None else y.astype(self.dtype)


class EvoNormB0(Norm):
    """EvoNorm-B0 in place of norm and activation; see ``cbn_jax.evonorm_b0``.

    It takes the arguments of ``Norm``, including a layer. Its parameters are ``scale``,
    ``bias`` and ``v``.

    Attributes:
      estimator: the method for the standard deviation of the batch. Use any method with
        statistics per feature, such as ``small_batch_norm(2)`` with a layer.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cbn_jax.linen import EvoNormB0
      >>> model = EvoNormB0(use_running_average=False)
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 4, 4, 8)))
      >>> sorted(variables["params"])
      ['bias', 'scale', 'v']
    """

    estimator: Estimator | Learned = batch_norm(epsilon=1e-3)

    def _output(self, x, statistics, affine, mask):
        epsilon = self.estimator.epsilon
        y = evonorm_b0(x, statistics, _v(self, x), *affine, epsilon=epsilon, mask=mask)
        return y if self.dtype is None else y.astype(self.dtype)


class TLU(nn.Module):
    """The thresholded linear unit ``max(x, τ)``, which follows ``filter_response_norm``.

    Attributes:
      threshold_init: initializer of τ, a parameter ``threshold`` with one number per
        feature.
      param_dtype: dtype of ``threshold``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from cbn_jax.linen import TLU
      >>> TLU().init_with_output(jax.random.key(0), jnp.array([[-1.0, 2.0]]))[0]
      Array([[0., 2.]], dtype=float32)

    Reference: Saurabh Singh, Shankar Krishnan, "Filter Response Normalization Layer", CVPR
    2020, arXiv:1911.09737.
    """

    threshold_init: Callable[..., jax.Array] = nn.initializers.zeros
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """The maximum of each value and the threshold of its feature."""
        shape = (x.shape[-1],)
        threshold = self.param("threshold", self.threshold_init, shape, self.param_dtype)
        return jnp.maximum(x, jnp.broadcast_to(threshold.astype(x.dtype), x.shape))


def _v(module: Norm, x: jax.Array) -> jax.Array:
    return module.param("v", nn.initializers.ones, (x.shape[-1],), module.param_dtype)
