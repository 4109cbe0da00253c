# SPDX-License-Identifier: Apache-2.0
"""Methods with a weight that a Flax module learns."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax

from cbn_jax.core.estimator import Estimator
from cbn_jax.core.values import Value, factory


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Learned(Value):
    """An estimator for each weight in [0, 1]; made by ``learned``.

    Attributes:
      at: ``weight -> estimator``.
      epsilon: ε of those estimators.
    """

    at: Callable[[jax.typing.ArrayLike], Estimator]
    epsilon: float


@factory
def learned(method: Callable[..., Estimator], /, **options: Any) -> Learned:
    """A method whose argument ``mix`` a Flax module learns.

    Give it to ``cbn_jax.linen.Norm`` or ``cbn_jax.nnx.Norm`` in place of an estimator. The
    module then has an additional parameter ``mix``, whose sigmoid is the weight.

    Args:
      method: ``group_batch_norm``, ``group_norm_plus``, or a function of your own with an
        argument ``mix``.
      **options: the other arguments of ``method``.

    Returns:
      A ``Learned``. It is not an estimator, but makes one for each weight.

    Raises:
      TypeError: ``method`` has no argument ``mix``, or not these options.
      ValueError: an option out of range.

    Example:
      >>> import cbn_jax as cbn
      >>> cbn.learned(cbn.group_batch_norm, num_groups=8)
      learned(group_batch_norm, num_groups=8)
    """
    name = getattr(method, "__name__", repr(method))
    if not callable(method) or "mix" not in inspect.signature(method).parameters:
        raise TypeError(
            f"learned got {name}, expected a method with an argument mix; write "
            "learned(group_batch_norm, ...) or learned(group_norm_plus, ...)."
        )

    def at(weight):
        return method(mix=weight, **options)

    return Learned(at, at(0.5).epsilon)
