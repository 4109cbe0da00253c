# SPDX-License-Identifier: Apache-2.0
"""The common frame of methods whose window moves with the weights of their layer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .checks import (
    accepted,
    check_features_last,
    check_position_mask,
)
from .devices import AxisName
from .estimator import Estimator, State
from .layers import Layer, check_layer
from .moments import Moments
from .running import (
    check_values,
    independent,
    known_moments,
    restarted,
    several_values,
    update_running,
)
from .schedules import ScheduleFn, averaging
from .source import Source
from .statistics import statistics_of

#: ``(features, params, groups) -> state``.
InitState = Callable[[int, Any, int], State]
#: ``(state, x, source, axis_name, mask) -> (batch, pooled, state)``: moments of the batch
#: alone, moments of the whole window, and the state whose running moments lack both.
Step = Callable[
    [State, jax.Array, Source, AxisName, jax.Array | None], tuple[Moments, Moments, State]
]


def windowed(
    name: str,
    state_type: type,
    init_state: InitState,
    step: Step,
    *,
    momentum: float | ScheduleFn,
    epsilon: float,
    running: str = "window",
    alone: bool = False,
) -> Estimator:
    """An estimator from one step of its window.

    Args:
      name: name of the function that the user called, for errors.
      state_type: type of the states; the first field is ``running``, a ``RunningMoments``.
      init_state: makes the state.
      step: makes one step of the window.
      momentum: decay of the running average, which restarts if it differs from the window.
        Alternatively a schedule, which never restarts.
      epsilon: ε.
      running: the moments averaged for inference, "batch" or "window".
      alone: whether the batch alone supplies the statistics and so needs two values per
        feature.
    """
    average = averaging(momentum)

    def accept(state, x, mask):
        return accepted(name, state, state_type, lambda s: s.running.mean, x, mask)

    def init(features, layer=None, params=None):
        check_features_last(name, features, params)
        return init_state(features, params, _groups_of(name, layer))

    def train(state, x, source=None, *, axis_name=None, mask=None):
        state, x = accept(state, x, mask)
        source = _check_source(name, source)
        _check_form(name, state, init_state, x, source)
        check_position_mask(name, x, mask)
        check_values(name, x, axis_name, 2 if alone else 1)
        state = lax.stop_gradient(state)
        batch, pooled, new = step(state, x, source, axis_name, mask)
        new = lax.stop_gradient(new)
        averages, seen = new.running, batch
        if running == "window":
            seen = pooled if mask is None else _if_any(batch, pooled)
            if not callable(momentum):
                values = independent(x, pooled)
                averages = restarted(averages, pooled, values, epsilon)
        if mask is not None or not several_values(x, axis_name):
            pooled = known_moments(pooled, state.running)
        new = new._replace(running=update_running(averages, seen, average))
        return statistics_of(pooled, epsilon), new

    def infer(state, x, *, mask=None):
        state, x = accept(state, x, mask)
        return statistics_of(state.running, epsilon)

    return Estimator(init, train, infer, epsilon, frozenset({"layered"}))


def _if_any(batch: Moments, pooled: Moments) -> Moments:
    """The window's moments; a step without a value does not change the averages."""
    return pooled._replace(size=jnp.where(batch.size > 0, pooled.size, 0.0))


def _groups_of(name: str, layer: Any) -> int:
    check_layer(name, layer, "estimator.init(features, layer, params)")
    return layer.groups if isinstance(layer, Layer) else 1


def _check_source(name: str, source: Source | None) -> Source:
    """Checks that there is a source."""
    if source is None:
        raise ValueError(
            f"{name} got source=None, expected the source of x; write "
            "x, source = run_layer(layer, params, inputs), or in Flax "
            "Norm(estimator, layer=...)."
        )
    return source


def _check_form(
    name: str, state: State, init_state: InitState, x: jax.Array, source: Source
) -> None:
    """Checks that the state has the shapes that ``init`` makes for this layer."""
    check_features_last(name, x.shape[-1], source.params)
    expected = jax.eval_shape(
        lambda params: init_state(x.shape[-1], params, source.groups), source.params
    )
    came = dict(jax.tree.leaves_with_path(state))
    for path, leaf in jax.tree.leaves_with_path(expected):
        shape = jnp.shape(came[path]) if path in came else None
        if shape != leaf.shape:
            raise ValueError(
                f"{name} got a state with state{jax.tree_util.keystr(path)} of shape "
                f"{shape}, expected {leaf.shape} for this layer; make the state with "
                "estimator.init(features, layer, params), for the same estimator and the "
                "layer and params of run_layer."
            )
