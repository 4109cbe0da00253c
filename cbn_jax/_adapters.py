# SPDX-License-Identifier: Apache-2.0
"""Shared by the adapters; there is no arithmetic in an adapter."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .core.checks import check_axis, check_mask
from .core.estimator import Estimator
from .core.layers import Patches, conv_patches
from .core.running import RunningMoments, find_running
from .core.values import is_factory
from .wrappers.learned import Learned


def estimator_of(estimator: Estimator | Learned, mix: Callable[[], Any]) -> Estimator:
    """An estimator unchanged; a ``Learned`` at the sigmoid of ``mix``."""
    if isinstance(estimator, Estimator):
        return estimator
    return estimator.at(jax.nn.sigmoid(mix()))


def check_modules(estimator: Any, layer: Any, module: type) -> None:
    """The estimator is one of ours, and the layer an instance of Flax's ``module``."""
    if not isinstance(estimator, Estimator | Learned):
        if is_factory(estimator):
            name = estimator.__name__
            write = f"Norm({name}(...)), with the function called"
            if "mix" in inspect.signature(estimator).parameters:
                write = f"Norm(cbn_jax.learned({name}, ...)), which learns its mix"
            raise TypeError(
                f"Norm got the function {name}, expected an estimator; write {write}."
            )
        came = f"estimator={_short(estimator)}"
    elif layer is not None and not isinstance(layer, module):
        came = f"layer={_short(layer)}"
    else:
        return
    raise TypeError(
        f"Norm got {came}, expected an estimator and an instance of a Flax module; write "
        "Norm(cbn_jax.small_batch_norm(2), layer=Conv(...)), and num_features=... for a "
        "number of features, in nnx alone."
    )


def _short(value: Any) -> str:
    """The first line of a repr: modules print themselves over many."""
    return repr(value).splitlines()[0]


def with_running(state: Any, moments: RunningMoments) -> Any:
    """A fresh state with the given running moments."""
    found = []

    def put(node):
        found.append(isinstance(node, RunningMoments))
        # A copy for each: a state that holds a buffer twice cannot be donated.
        return jax.tree.map(jnp.copy, moments) if found[-1] else node

    state = jax.tree.map(put, state, is_leaf=lambda n: isinstance(n, RunningMoments))
    if not any(found):
        raise ValueError(
            "from_batch_norm got an estimator without running moments, expected "
            "batch_norm(...), small_batch_norm(...) or another that has them."
        )
    return state


def running_in(state: Any) -> RunningMoments:
    """The one ``RunningMoments`` in a state."""
    found = find_running(state)
    if len(found) != 1:
        raise ValueError(
            f"to_batch_norm got a state of type {type(state).__name__} with {len(found)} "
            "RunningMoments inside, expected one; there is no batch norm with the same "
            "inference."
        )
    return found[0]


def with_kernel(
    params: Any, kernel: Callable[[jax.Array], jax.Array] | None, layer: Any
) -> Any:
    """The parameters of a layer with its kernel as it is used."""
    if kernel is None:
        return params
    if layer is None or "kernel" not in params:
        came = "no layer" if layer is None else f"layer={_short(layer)}, which has none"
        raise ValueError(
            f"Norm got a change of the kernel and {came}, expected a layer with a "
            "parameter kernel; write Norm(estimator, layer=Conv(...), kernel=...)."
        )
    return {**params, "kernel": kernel(params["kernel"])}


def check_backward(module: Any) -> None:
    """Parameters that were made for another method lack the averages."""
    if not module.has_variable("params", "backward"):
        raise ValueError(
            f"Norm got params without backward at {'/'.join(module.path) or 'its root'}, "
            "expected the backward statistics of its method; write params = "
            "cbn_jax.linen.fill_missing(params, model.init(...)['params'])."
        )


def fill_missing(params: Any, fresh: Any) -> Any:
    """Trained parameters, and from ``fresh`` the entries that they lack.

    Parameters trained with another norm lack the backward statistics of methods such as
    ``moving_average_batch_norm``.

    Args:
      params: nested dicts of arrays, such as trained ``variables["params"]``.
      fresh: those of the new model, from its ``init``.

    Returns:
      Nested dicts with all entries of ``fresh``, the values from ``params`` where it has
      them.

    Raises:
      ValueError: ``params`` has an entry that ``fresh`` does not have.

    Example:
      >>> from cbn_jax.linen import fill_missing
      >>> fill_missing({"scale": 2.0}, {"scale": 1.0, "backward": 0.0})
      {'scale': 2.0, 'backward': 0.0}
    """
    if not isinstance(fresh, Mapping) or not isinstance(params, Mapping):
        return params
    unknown = sorted(set(params).difference(fresh))
    if unknown:
        raise ValueError(
            f"fill_missing got {', '.join(unknown)} in params, expected the names of the "
            f"model, {', '.join(sorted(fresh))}; give it the same part of both trees."
        )
    return {
        name: fill_missing(params[name], value) if name in params else value
        for name, value in fresh.items()
    }


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
    """The patches of a Flax convolution, linen or nnx; None where they are not known."""
    zero_padded = conv.padding not in ("CIRCULAR", "REFLECT", "CAUSAL")
    dense_input = conv.input_dilation in (None, 1) or set(conv.input_dilation) == {1}
    if not (zero_padded and dense_input and conv.mask is None):
        return None
    return conv_patches(
        conv.strides or 1, conv.padding, conv.kernel_dilation or 1, conv.feature_group_count
    )


def outputs_last(layer: Any, params: Any) -> Any:
    """The parameters with the outputs of a kernel last, and back again."""
    if not getattr(layer, "transpose_kernel", False):
        return params
    return {**params, "kernel": jnp.swapaxes(params["kernel"], -1, -2)}


def to_last(
    x: jax.Array, mask: jax.Array | None, axis: int, layer: Any
) -> tuple[jax.Array, jax.Array | None, Callable[[jax.Array], jax.Array]]:
    """Moves the feature axis to the end; also gives the way back."""
    check_axis(axis, x, None if layer is None else _short(layer))
    check_mask("Norm", x, mask)
    if axis in (-1, x.ndim - 1):
        return x, mask, lambda y: y
    if mask is not None and jnp.ndim(mask) > 0:
        mask = jnp.moveaxis(jnp.asarray(mask), axis, -1)
    return jnp.moveaxis(x, axis, -1), mask, lambda y: jnp.moveaxis(y, -1, axis)
