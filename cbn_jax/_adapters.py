# SPDX-License-Identifier: Apache-2.0
"""Functions that the adapters share; an adapter has no arithmetic of its own."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .core.checks import axes_of, check_axis, check_mask
from .core.estimator import Estimator
from .core.layers import Layer, LayerFn, masked_kernel
from .core.linear import why_not_linear
from .core.named import find_running, named_leaves, put_running, to_dict
from .core.running import RunningMoments
from .core.values import is_factory
from .core.windows import conv_patches, dense_patches
from .wrappers.learned import Learned

Kernel = Callable[[jax.Array], jax.Array]


def estimator_of(estimator: Estimator | Learned, mix: Callable[[], Any]) -> Estimator:
    """An estimator unchanged; for a ``Learned`` its estimator at the sigmoid of ``mix``."""
    if isinstance(estimator, Estimator):
        return estimator
    return estimator.at(jax.nn.sigmoid(mix()))


def check_modules(estimator: Any, layer: Any, module: type) -> None:
    """Checks that the estimator is one of ours, and the layer an instance of ``module``."""
    if not isinstance(estimator, Estimator | Learned):
        if is_factory(estimator):
            name = estimator.__name__
            write = f"Norm({name}(...)), with the function called"
            if "mix" in inspect.signature(estimator).parameters:
                write = f"Norm(cbn_jax.learned({name}, ...)), which learns its mix"
            raise TypeError(
                f"Norm got the function {name}, expected an estimator; write {write}."
            )
        raise TypeError(
            f"Norm got estimator={short(estimator)}, expected an estimator; write "
            "Norm(cbn_jax.small_batch_norm(2), layer=Conv(...))."
        )
    if layer is not None and not isinstance(layer, module):
        raise TypeError(
            f"Norm got layer={short(layer)}, expected an instance of a Flax module; write "
            "Norm(estimator, layer=Conv(...)), or num_features=... in nnx for a norm "
            "without a layer."
        )


def short(value: Any) -> str:
    """The first line of a repr, because the repr of a module has many lines."""
    return repr(value).splitlines()[0]


def with_running(state: Any, moments: RunningMoments) -> Any:
    """A fresh state with the given running moments."""
    places = find_running(state)
    if not places:
        raise ValueError(
            "from_batch_norm got an estimator without running moments, expected "
            "batch_norm(...), small_batch_norm(...) or another that has them."
        )
    # Each field needs a copy: a state that holds a buffer twice cannot be donated.
    return put_running(state, {place: jax.tree.map(jnp.copy, moments) for place in places})


def running_in(state: Any) -> RunningMoments:
    """The only ``RunningMoments`` in a state."""
    found = list(find_running(state).values())
    if len(found) != 1:
        raise ValueError(
            f"to_batch_norm got a state ({', '.join(to_dict(state))}) with {len(found)} "
            "pairs of running averages, expected one pair; no batch norm has the same "
            "inference."
        )
    return found[0]


def feature_shape(x: jax.Array, axis: int | Sequence[int]) -> tuple[int, ...]:
    """The sizes of the feature axes."""
    return tuple(x.shape[each] for each in axes_of(axis, x.ndim))


def form_of(estimator: Estimator, features: int, layer: Any, params: Any) -> Any:
    """The state of an estimator without its values."""
    return jax.eval_shape(lambda params: estimator.init(features, layer, params), params)


def check_stats(where: str, estimator: Any, stats: Any, form: Any, write: str) -> None:
    """Checks that the stored state belongs to this estimator and this layer."""
    came, expected = named_leaves(stats), named_leaves(to_dict(form))
    if set(came) != set(expected):
        names = sorted({name[0] for name in came}), sorted({name[0] for name in expected})
        came, expected = (", ".join(each) or "nothing" for each in names)
    else:
        wrong = [name for name in came if jnp.shape(came[name]) != expected[name].shape]
        if not wrong:
            return
        name = "/".join(wrong[0])
        came = f"{name} of shape {jnp.shape(came[wrong[0]])}"
        expected = f"shape {expected[wrong[0]].shape}"
    raise ValueError(
        f"Norm got the state of another method or layer at {where}, with {came}, expected "
        f"{expected} for {estimator!r}; {write}"
    )


def used_params(layer: Any, params: Any, kernel: Kernel | None, mask: Any = None) -> Any:
    """The parameters as the layer uses them: outputs last, changed and masked."""
    params = outputs_last(layer, params)
    if kernel is None and mask is None:
        return params
    if "kernel" not in params:
        raise ValueError(
            f"Norm got kernel=... with layer={short(layer)}, which has no kernel, expected "
            "a layer with a parameter kernel; write Norm(estimator, layer=Conv(...), "
            "kernel=...)."
        )
    used = params["kernel"] if kernel is None else kernel(params["kernel"])
    if mask is not None:
        mask = outputs_last(layer, {"kernel": jnp.asarray(mask)})["kernel"]
        used = masked_kernel(used, mask)
    return {**params, "kernel": used}


def changed_params(layer: Any, params: Any, kernel: Kernel) -> Any:
    """The parameters with which a layer uses a changed kernel."""

    def changed(leaf):
        last = outputs_last(layer, {"kernel": leaf})["kernel"]
        return outputs_last(layer, {"kernel": kernel(last)})["kernel"]

    # A metadata box is a tree of one leaf.
    return {**params, "kernel": jax.tree.map(changed, params["kernel"])}


class LayerError(ValueError):
    """A layer that is not linear in its parameters."""

    def __init__(self, name: str, reason: str):
        super().__init__(
            f"Norm got the layer {name}, which {reason}, expected a layer that is linear "
            "in its parameters; write Norm(estimator, Conv(...), kernel=...) for a change "
            "of the kernel, and put activations after the norm."
        )
        self.reason = reason


def known_layer(layer: Any, apply: LayerFn) -> Layer:
    """A Flax Dense, Linear, Conv or ConvTranspose: all features have the same patches."""
    if not hasattr(layer, "kernel_size"):
        return Layer(apply, dense_patches)
    if hasattr(layer, "feature_group_count"):
        groups = layer.feature_group_count
        patches = conv_patches(
            layer.strides or 1,
            layer.padding,
            layer.kernel_dilation or 1,
            groups,
            layer.input_dilation or 1,
        )
        return Layer(apply, patches, groups)
    return Layer(apply)


def unknown_layer(name: str, apply: LayerFn, params: Any, inputs: Any) -> Layer:
    """Any other linear layer: each feature may have its own patches."""
    reason = why_not_linear(apply, params, inputs)
    if reason is not None:
        raise LayerError(name, reason)
    return Layer(apply, groups=jax.tree.leaves(params)[0].shape[-1])


def check_backward(module: Any) -> None:
    """Refuses parameters of another method, which lack the averages."""
    if not module.has_variable("params", "backward"):
        raise ValueError(
            f"Norm at {'/'.join(module.path) or 'the root'} got params without backward, "
            "expected the backward statistics of its method; write params = "
            "cbn_jax.linen.fill_missing(params, model.init(...)['params'])."
        )


def fill_missing(params: Any, fresh: Any) -> Any:
    """Adds missing entries of ``fresh`` to trained parameters.

    Parameters trained with another norm lack the backward statistics of methods such as
    ``moving_average_batch_norm``.

    Args:
      params: nested dicts of arrays, such as trained ``variables["params"]``.
      fresh: the parameters of the new model, from its ``init``.

    Returns:
      Nested dicts with all entries of ``fresh``. Values come from ``params`` if it has
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
            f"fill_missing got {', '.join(unknown)} in params, expected the names in "
            f"fresh, {', '.join(sorted(fresh))}; pass the same part of both trees."
        )
    return {
        name: fill_missing(params[name], value) if name in params else value
        for name, value in fresh.items()
    }


def flag_of(constructor: bool | None, call: bool | None) -> bool:
    """``use_running_average`` from constructor or call, whichever is given."""
    if (constructor is None) == (call is None):
        came = "neither" if call is None else "both"
        raise ValueError(
            f"Norm got use_running_average from {came} of constructor and call, expected "
            "it from one of them; write Norm(..., use_running_average=not train) or "
            "norm(x, use_running_average=not train)."
        )
    return bool(constructor if call is None else call)


def outputs_last(layer: Any, params: Any) -> Any:
    """The parameters with the outputs of a kernel last, or the reverse."""
    if not getattr(layer, "transpose_kernel", False):
        return params
    return {**params, "kernel": jnp.swapaxes(params["kernel"], -1, -2)}


def to_last(
    x: jax.Array, mask: jax.Array | None, axis: int | Sequence[int], layer: Any
) -> tuple[jax.Array, jax.Array | None, Callable[[jax.Array], jax.Array]]:
    """Moves the feature axes to the end and merges them; also returns the inverse."""
    check_axis(axis, x, None if layer is None else short(layer))
    check_mask("Norm", x, mask)
    axes = axes_of(axis, x.ndim)
    if axes == [x.ndim - 1]:
        return x, mask, lambda y: y
    places = tuple(range(-len(axes), 0))
    shape = tuple(x.shape[each] for each in axes)

    def joined(values, shape):
        values = jnp.moveaxis(values, axes, places)
        values = jnp.broadcast_to(values, (*values.shape[: -len(axes)], *shape))
        return values.reshape(*values.shape[: -len(axes)], -1)

    def back(y):
        return jnp.moveaxis(y.reshape(*y.shape[:-1], *shape), places, axes)

    if mask is not None and jnp.ndim(mask) > 0:
        mask = jnp.asarray(mask)
        ones = all(mask.shape[each] == 1 for each in axes)
        mask = joined(mask, (1,) * len(axes) if ones else shape)
    return joined(x, shape), mask, back
