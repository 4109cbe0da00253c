# SPDX-License-Identifier: Apache-2.0
"""What the Flax modules share; there is no arithmetic in an adapter."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from ._estimator import Estimator
from ._layer import Patches, conv_patches
from ._running import RunningMoments, find_running


@contextlib.contextmanager
def require(package: str, module: str) -> Iterator[None]:
    """Says what to install where an optional package is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{module} needs {package}; install it with: "
            f"pip install 'cbn_jax[{package.lower()}]'"
        ) from error


def estimator_of(
    estimator: Estimator | Callable[[jax.Array], Estimator],
    mix: Callable[[], Any],
) -> Estimator:
    """An estimator as it is; a function of a weight is given the sigmoid of ``mix``."""
    if isinstance(estimator, Estimator):
        return estimator
    return estimator(jax.nn.sigmoid(mix()))


def check_modules(estimator: Any, layer: Any, module: type) -> None:
    """The estimator is none of Flax's modules, and the layer is one."""
    if not callable(estimator) and not isinstance(estimator, Estimator):
        came = f"{estimator!r} as its estimator"
    elif isinstance(estimator, module):
        came = f"a module, {type(estimator).__name__}, as its estimator"
    elif layer is not None and not isinstance(layer, module):
        came = f"layer={layer!r}, no module"
    else:
        return
    raise TypeError(
        f"Norm got {came}, expected an estimator and a module that was made, such as "
        "Norm(cbn_jax.small_batch_norm(2), layer=Conv(...)); a number of features is "
        "num_features=..., in nnx alone."
    )


def with_running(state: Any, moments: RunningMoments) -> Any:
    """The state with the moments in their place; everything else must be fresh."""
    found = []

    def put(node):
        found.append(isinstance(node, RunningMoments))
        return moments if found[-1] else node

    state = jax.tree.map(put, state, is_leaf=lambda n: isinstance(n, RunningMoments))
    if not any(found):
        raise ValueError(
            "from_batch_norm got an estimator without running moments, expected "
            "batch_norm(...), small_batch_norm(...) or another that has them."
        )
    return state


def running_in(state: Any) -> RunningMoments:
    """The running moments in a state, for a batch norm with the same inference."""
    found = find_running(state)
    if len(found) != 1:
        raise ValueError(
            f"to_batch_norm got a state of type {type(state).__name__} with {len(found)} "
            "RunningMoments inside, expected one; there is no batch norm with the same "
            "inference."
        )
    return found[0]


def flag_of(constructor: bool | None, call: bool | None) -> bool:
    """``use_running_average`` from constructor or call, whichever gave it."""
    if (constructor is None) == (call is None):
        came = "neither" if call is None else "both"
        raise ValueError(
            f"Norm got use_running_average from {came} of constructor and call, expected "
            "it once; write Norm(..., use_running_average=not train) or "
            "norm(x, use_running_average=not train)."
        )
    return bool(constructor if call is None else call)


def patches_of(conv: Any) -> Patches | None:
    """The windows of a Flax convolution, linen or nnx; None for a kind unknown here."""
    zero_padded = conv.padding not in ("CIRCULAR", "REFLECT", "CAUSAL")
    dense_input = conv.input_dilation in (None, 1) or set(conv.input_dilation) == {1}
    if not (zero_padded and dense_input and conv.mask is None):
        return None
    return conv_patches(
        conv.strides or 1, conv.padding, conv.kernel_dilation or 1, conv.feature_group_count
    )


def to_last(
    x: jax.Array, mask: jax.Array | None, axis: int
) -> tuple[jax.Array, jax.Array | None, Callable[[jax.Array], jax.Array]]:
    """Moves the feature axis to the end; also gives the way back."""
    if axis in (-1, x.ndim - 1):
        return x, mask, lambda y: y
    if mask is not None:
        mask = jnp.moveaxis(jnp.broadcast_to(mask, x.shape), axis, -1)
    return jnp.moveaxis(x, axis, -1), mask, lambda y: jnp.moveaxis(y, -1, axis)
