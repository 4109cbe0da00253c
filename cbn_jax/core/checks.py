# SPDX-License-Identifier: Apache-2.0
"""Static checks: what came, what was expected, what to write, in one sentence."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def check_activations(method: str, x: jax.Array) -> None:
    """Activations are floating point, features last, and not empty."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(
            f"{method} got x of dtype {x.dtype}, expected floating point; "
            "write x.astype(jnp.float32)."
        )
    if x.ndim < 2 or x.size == 0:
        raise ValueError(
            f"{method} got x of shape {x.shape}, expected [..., features] with at least "
            "one example; a single example is x[None]."
        )


def check_state(
    method: str, state: Any, expected: type, mean: Callable[[Any], jax.Array], x: Any
) -> None:
    """The state is this method's own and has as many features as ``x``."""
    check_state_type(method, state, expected)
    features = mean(state).shape[-1]
    if x.shape[-1] != features:
        raise ValueError(
            f"{method} got x of shape {x.shape}, expected {features} features last as in "
            f"its state; write estimator.init({x.shape[-1]}, ...) or transpose x."
        )


def check_state_type(method: str, state: Any, expected: type) -> None:
    """The state is this method's own."""
    if not isinstance(state, expected):
        raise TypeError(
            f"{method} got a state of type {type(state).__name__}, expected "
            f"{expected.__name__}; make it with estimator.init(features, layer, params), "
            "and give that as the template when you restore a checkpoint."
        )


def check_values(method: str, x: jax.Array, axis_name: Any, mask: Any) -> None:
    """A variance needs two values per feature, here or on the other devices."""
    # With an axis name or a mask the number of values is not known before the run.
    if axis_name is None and mask is None and x.size == x.shape[-1]:
        raise ValueError(
            f"{method} got x of shape {x.shape}, one value per feature in training, "
            "expected at least two; use more examples, axis_name=..., or "
            "small_batch_norm(batch_size=1)."
        )


def check_features_last(method: str, features: int, params: Any) -> None:
    """Every parameter has one entry (or filter) per feature on its last axis."""
    leaves = jax.tree.leaves_with_path(params)
    if not leaves:
        raise ValueError(
            f"{method} got params={params!r}, expected the parameters of the layer "
            "before it; write Norm(estimator, layer=...) and give it the layer's input, or "
            "estimator.init(features, layer, params)."
        )
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0 or leaf.shape[-1] != features:
            raise ValueError(
                f"{method} got parameter {jax.tree_util.keystr(path) or 'params'} of "
                f"shape {jnp.shape(leaf)}, expected features last ({features}); "
                "transpose it inside layer_fn."
            )


def check_mask(method: str, x: jax.Array, mask: Any) -> None:
    """All features of a position count, or none."""
    if mask is not None and jnp.ndim(mask) > 0 and jnp.shape(mask)[-1] != 1:
        raise ValueError(
            f"{method} got a mask of shape {jnp.shape(mask)} for x of shape {x.shape}, "
            "expected a last axis of 1, the same mask for all features; write "
            "mask[..., None]."
        )


def check_traits(wrapper: str, traits: frozenset[str], refused: dict[str, str]) -> None:
    """The wrapper fits this method; ``refused`` gives the reason against it, by trait."""
    for trait in sorted(traits & refused.keys()):
        raise ValueError(f"{wrapper} {refused[trait]}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """One of a few words."""
    if value not in choices:
        expected = " or ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} is {value!r}, expected {expected}.")


def check_fraction(name: str, value: float) -> None:
    """A decay lies in [0, 1)."""
    check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(
            f"{name} is {value!r}, expected a decay in [0, 1), the fraction kept at each "
            "step; PyTorch's momentum=0.1 is 0.9 here."
        )


def check_number(name: str, value: Any) -> None:
    """A plain number, which can be compared when the estimator is made."""
    if isinstance(value, jax.Array):
        raise TypeError(f"{name} is an array, expected a number; write float({name}).")


def check_unit(name: str, value: Any, meaning: str) -> None:
    """A number lies in [0, 1]; an array may be traced and is not looked at."""
    if isinstance(value, jax.Array) or jnp.ndim(value) > 0:
        return
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} is {value!r}, expected {meaning} in [0, 1].")


def check_epsilon(value: float) -> None:
    """ε keeps the root of a zero variance away from zero."""
    if not value > 0.0:
        raise ValueError(f"epsilon is {value!r}, expected a number above 0, such as 1e-5.")


def check_count(name: str, value: int, least: int) -> None:
    """A whole number from ``least`` on."""
    check_number(name, value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(
            f"{name} is {value!r}, expected a whole number from {least} on, an int."
        )
