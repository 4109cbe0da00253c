# SPDX-License-Identifier: Apache-2.0
"""Static checks; each error states the input, the expected input and the correction."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def accepted(
    method: str,
    state: Any,
    expected: type,
    per_feature: Callable[[Any], jax.Array],
    x: jax.Array,
    mask: Any,
) -> tuple[Any, jax.Array]:
    """The state in float32 and ``x`` as a JAX array, after the checks of every method.

    Args:
      method: name of the function that the user called.
      state: the state that the user passed.
      expected: the type of the method's states.
      per_feature: a leaf ``[..., C]`` of such a state.
      x: the activations that the user passed.
      mask: the mask that the user passed.
    """
    x = activations(method, x)
    check_state_type(method, state, expected)
    check_features(method, per_feature(state).shape[-1], x)
    check_mask(method, x, mask)
    return in_float32(state), x


def in_float32(state: Any) -> Any:
    """A state in float32, because averages in half precision stop changing."""

    def widened(leaf):
        leaf = jnp.asarray(leaf)
        return leaf if leaf.dtype == jnp.float64 else leaf.astype(jnp.float32)

    return jax.tree.map(widened, state)


def in_dtype(state: Any, dtype: Any) -> Any:
    """A state in the dtype of the statistics, float64 if they are float64."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), state)


def activations(method: str, x: jax.Array) -> jax.Array:
    """``x`` as a JAX array, after a check that it is floating point with features last."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        parts = "jnp.concatenate([x.real, x.imag], axis=-1)"
        complex_valued = jnp.issubdtype(x.dtype, jnp.complexfloating)
        raise TypeError(
            f"{method} got x of dtype {x.dtype}, expected floating point; "
            f"write {parts if complex_valued else 'x.astype(jnp.float32)'}."
        )
    if x.ndim < 2:
        raise ValueError(
            f"{method} got x of shape {x.shape}, expected [..., features] with an axis of "
            "examples; a single example is x[None]."
        )
    return x


def check_features(method: str, features: int, x: jax.Array) -> None:
    """Checks that the state has as many features as ``x``."""
    if x.shape[-1] != features:
        raise ValueError(
            f"{method} got x of shape {x.shape}, expected {features} features last as in "
            f"its state; write estimator.init({x.shape[-1]}, ...) or transpose x."
        )


def check_state_type(method: str, state: Any, expected: type) -> None:
    """Checks that the state belongs to this method."""
    if isinstance(state, expected):
        return
    if hasattr(state, "get_value"):
        write = "write norm.state, which is the whole state."
    else:
        write = (
            "make it with estimator.init(features, layer, params), and pass the result as "
            "the template when you restore a checkpoint."
        )
    raise TypeError(
        f"{method} got a state of type {type(state).__name__}, expected "
        f"{expected.__name__}; {write}"
    )


def check_features_last(method: str, features: int, params: Any) -> None:
    """Checks that every parameter's last axis has one entry (or filter) per feature."""
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise ValueError(
            f"{method} got params={params!r}, expected the parameters of the layer before "
            "the norm; write Norm(estimator, layer=...) and call it with the layer's "
            "input, or write estimator.init(features, layer, params)."
        )
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0 or leaf.shape[-1] != features:
            raise ValueError(
                f"{method} got parameter {jax.tree_util.keystr(path) or 'params'} of "
                f"shape {jnp.shape(leaf)}, expected features last ({features}); "
                "transpose it inside layer_fn."
            )


def check_mask(method: str, x: jax.Array, mask: Any) -> None:
    """Checks that a mask has the axes of ``x``; broadcasting would guess missing ones."""
    if mask is None or jnp.ndim(mask) == 0:
        return
    shape = jnp.shape(mask)
    fits = (each in (1, size) for each, size in zip(shape, x.shape, strict=False))
    if len(shape) != x.ndim or not all(fits):
        raise ValueError(
            f"{method} got a mask of shape {shape} for x of shape {x.shape}, expected the "
            "same number of axes, each of size 1 or of the size in x; "
            f"{_write_mask(shape, x.shape)}"
        )


def check_position_mask(method: str, x: jax.Array, mask: Any) -> None:
    """Checks that a mask treats all features of a position alike."""
    if mask is not None and jnp.ndim(mask) > 0 and jnp.shape(mask)[-1] != 1:
        raise ValueError(
            f"{method} got a mask of shape {jnp.shape(mask)} for x of shape {x.shape}, "
            "expected a last axis of 1, the same mask for all features; write "
            "mask.all(axis=-1, keepdims=True)."
        )


def axes_of(axis: int | Sequence[int], ndim: int) -> list[int]:
    """One axis or several as a list, counted from the front, in their order."""
    return sorted(each % ndim for each in ([axis] if isinstance(axis, int) else axis))


def check_axis(axis: int | Sequence[int], x: jax.Array, layer: str | None) -> None:
    """Checks that the activations have the feature axes; with a layer only the last."""
    ndim = jnp.ndim(x)
    axes = [axis] if isinstance(axis, int) else list(axis)
    if not all(-ndim <= each < ndim for each in axes):
        raise ValueError(
            f"Norm got axis={axis} for activations of shape {jnp.shape(x)}, expected an "
            f"axis from {-ndim} to {ndim - 1}."
        )
    if layer is not None and axes not in ([-1], [ndim - 1]):
        raise ValueError(
            f"Norm got axis={axis} with the layer {layer}, whose features are the last "
            "axis; leave out axis, and pass inputs with channels last."
        )


def _write_mask(shape: tuple[int, ...], of_x: tuple[int, ...]) -> str:
    missing = len(of_x) - len(shape)
    if missing > 0 and shape == of_x[: len(shape)]:
        return f"write mask[{', '.join(['...', *['None'] * missing])}]."
    return f"write a mask of shape {(*of_x[:-1], 1)}."


def check_traits(wrapper: str, traits: frozenset[str], refused: dict[str, str]) -> None:
    """Checks that the wrapper fits this method; ``refused`` maps traits to reasons."""
    for trait in sorted(traits & refused.keys()):
        raise ValueError(f"{wrapper} {refused[trait]}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Checks that a value is one of a few words."""
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}, expected {expected}.")


def check_fraction(name: str, value: float) -> None:
    """Checks that a decay lies in [0, 1)."""
    check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"{name} is {value!r}, expected a decay in [0, 1), the fraction of the average "
            "that each step keeps; PyTorch's momentum=0.1 is 0.9 here."
        )


def check_number(name: str, value: Any) -> None:
    """Checks for a plain number, which can be compared when the estimator is made."""
    if isinstance(value, jax.Array):
        raise TypeError(f"{name} is an array, expected a number; write float({name}).")


def check_unit(name: str, value: Any, meaning: str) -> None:
    """Checks that a number lies in [0, 1]; an array may be traced and is not checked."""
    if isinstance(value, jax.Array) or jnp.ndim(value) > 0:
        return
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value!r}, expected {meaning} in [0, 1].")


def check_epsilon(value: float) -> None:
    """Checks ε, which keeps the root of a zero variance away from zero."""
    if not value > 0.0:
        raise ValueError(f"epsilon is {value!r}, expected a number above 0, such as 1e-5.")


def check_count(name: str, value: int, least: int) -> None:
    """Checks for an int of at least ``least``."""
    check_number(name, value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}, expected an int of at least {least}.")
