# SPDX-License-Identifier: Apache-2.0
"""Smoothness of training with a method, and the effect of noise.

This is the analysis of "Understanding and Improving Group Normalization", after "How Does
Batch Normalization Help Optimization?". The same training runs at several learning rates.
Each step has a band between the least and the greatest loss, and one between the least and
the greatest change of the gradient. Narrow and low bands are good. ::

    bands = {
        name: fan(step, lambda: train_state(estimator), batches, (1e-4, 2e-4, 5e-4))
        for name, estimator in methods.items()
    }
    draw(bands).savefig("landscape.svg")

``perturb`` adds noise after the normalizers of any of these trainings.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.lib import report
from cbn_jax.core.checks import activations, check_count, check_state_type
from cbn_jax.core.estimator import Estimator, State, Trait
from cbn_jax.core.moments import align, wide
from cbn_jax.core.statistics import Statistics
from cbn_jax.core.values import factory
from cbn_jax.tools.figures import styled


class PerturbState(NamedTuple):
    """State of ``perturb``.

    Attributes:
      state: state of the wrapped estimator.
      draws: scalar, the number of batches seen.
      mark: scalar that differs between layers: a sum over the statistics of the last batch.
    """

    state: State
    draws: jax.Array
    mark: jax.Array


class Bands(NamedTuple):
    """One training at several learning rates.

    Attributes:
      loss: ``[rates, steps]``.
      gradient_change: ``[rates, steps − 1]``, norms of the differences between the
        gradients of successive steps.
    """

    loss: np.ndarray
    gradient_change: np.ndarray


_PER_EXAMPLE: frozenset[Trait] = frozenset({"per_example"})


@factory
def perturb(
    estimator: Estimator,
    *,
    mean: float = 0.5,
    std: float = 1.25,
    num_groups: int = 32,
    seed: int = 0,
) -> Estimator:
    """Adds noise to normalized values in training: one draw per example and group.

    The noise is normal with this mean and standard deviation. It is added after normalizing
    and before the learned scale and bias. It changes from step to step and, from the second
    step on, differs between layers. Inference is that of the estimator.

    Args:
      estimator: any method.
      mean: mean of the noise.
      std: standard deviation of the noise, not negative.
      num_groups: groups of neighboring features that share a draw, a divisor of their
        number.
      seed: determines the draws.

    Returns:
      An Estimator whose state is a ``PerturbState``.

    Raises:
      ValueError: a negative ``std``; features that are no multiple of ``num_groups``; and
        what the estimator raises.
      TypeError: the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> from benchmarks.lib.perturbation import perturb
      >>> estimator = perturb(cbn.batch_norm(), mean=2.0, std=0.0, num_groups=1)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> statistics, state = estimator.train(estimator.init(features=1), x)
      >>> cbn.normalize(x, statistics).round(2)
      Array([[1.],
             [3.]], dtype=float32)

    Differs from the authors' code, which adds the noise after scale and bias.
    """
    check_count("num_groups", num_groups, 1)
    if not std >= 0:
        raise ValueError(f"std is {std!r}, expected a standard deviation of at least 0.")

    def init(features, layer=None, params=None):
        if features % num_groups:
            raise ValueError(
                f"perturb got {features} features and num_groups={num_groups}, expected a "
                f"divisor of {features}; write num_groups=..."
            )
        return PerturbState(
            estimator.init(features, layer, params),
            jnp.zeros((), jnp.float32),
            jnp.zeros((), jnp.float32),
        )

    def train(state, x, source=None, *, axis_name=None, mask=None):
        x = activations("perturb", x)
        check_state_type("perturb", state, PerturbState)
        state = lax.stop_gradient(state)
        statistics, inside = estimator.train(
            state.state, x, source, axis_name=axis_name, mask=mask
        )
        key = _key(seed, state.draws, state.mark, axis_name)
        noise = mean + std * jax.random.normal(key, (len(x), num_groups))
        noise = jnp.repeat(noise, x.shape[-1] // num_groups, axis=-1)
        noise = jnp.expand_dims(noise, range(1, x.ndim - 1)).astype(statistics.mean.dtype)
        location, inv_std = (align(value, x) for value in statistics)
        mark = statistics.mean.sum().astype(jnp.float32)
        if axis_name is not None:
            mark = lax.psum(mark, axis_name)
        mark = jnp.where(jnp.isfinite(mark), mark, 0.0)
        # The scale 0 of an overflow makes every value 0, with or without noise.
        location = location - noise / jnp.where(inv_std > 0, inv_std, 1.0)
        return (
            Statistics(location, jnp.broadcast_to(inv_std, location.shape)),
            PerturbState(inside, state.draws + 1.0, lax.stop_gradient(mark)),
        )

    def infer(state, x, *, mask=None):
        check_state_type("perturb", state, PerturbState)
        return estimator.infer(state.state, x, mask=mask)

    traits = estimator.traits | _PER_EXAMPLE
    return Estimator(init, train, infer, estimator.epsilon, traits)


def fan(
    step: Callable[[Any, Any, float], tuple[Any, jax.Array, Any]],
    make_state: Callable[[], Any],
    batches: Iterable[Any],
    learning_rates: Sequence[float],
) -> Bands:
    """Trains once at each learning rate, from the same start and on the same batches.

    Args:
      step: ``(state, batch, learning_rate) -> (state, loss, gradient)``, jitted. The
        gradient is a pytree whose changes are measured, such as that of the last dense
        layer's kernel.
      make_state: makes a new initial state, so that ``step`` may donate it.
      batches: arguments of ``step``. They are iterated once, so that all rates use the
        same.
      learning_rates: at least one.

    Returns:
      ``Bands``.

    Raises:
      ValueError: no learning rates or no batches.

    Example:
      >>> import jax
      >>> from benchmarks.lib.perturbation import fan
      >>> @jax.jit
      ... def step(w, batch, rate):  # of the loss w²
      ...     return w - rate * 2 * w, w**2, 2 * w
      >>> fan(step, lambda: 1.0, range(3), (0.5, 1.0)).loss
      array([[1., 0., 0.],
             [1., 1., 1.]])
    """
    if len(learning_rates) == 0:
        raise ValueError("fan got no learning rates or no batches, expected some of both.")
    states: list[Any] = [make_state() for _ in learning_rates]
    before: list[Any] = [None for _ in learning_rates]
    losses, changes = [], []
    for batch in batches:
        row, change = [], []
        for i, rate in enumerate(learning_rates):
            states[i], loss, gradient = step(states[i], batch, rate)
            row.append(loss)
            if before[i] is not None:
                change.append(_distance(gradient, before[i]))
            before[i] = gradient
        losses.append(row)
        changes.append(change)
    if not losses or not states:
        raise ValueError("fan got no learning rates or no batches, expected some of both.")
    losses, changes = jax.device_get((losses, changes[1:]))
    shape = len(changes), len(states)
    return Bands(
        np.array(losses, np.float64).T, np.array(changes, np.float64).reshape(shape).T
    )


def draw(
    bands: Mapping[str, Bands],
    *,
    smooth: int = 1,
) -> Any:
    """Draws the bands over the rates: one column per method, losses above gradients.

    Args:
      bands: results of ``fan`` by the name of the method; at least one.
      smooth: number of steps over which every curve is averaged before the band is taken.
        Small batches have noisy losses.

    Returns:
      The matplotlib figure, which a notebook shows.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      ValueError: no bands; ``smooth`` longer than they are.

    Example:
      >>> import numpy as np
      >>> from benchmarks.lib.perturbation import Bands, draw
      >>> figure = draw({"batch_norm": Bands(np.ones((2, 5)), np.ones((2, 4)))})
      >>> [axes.get_title() for axes in figure.axes]
      ['batch_norm', '']
    """
    check_count("smooth", smooth, 1)
    if not bands:
        raise ValueError("draw got no bands, expected {name: fan(...), ...}.")
    longest = min(curves.shape[1] for band in bands.values() for curves in band)
    if smooth > longest:
        raise ValueError(
            f"smooth is {smooth!r}, expected at most {longest}, the least number of losses "
            "or changes of the gradient in the bands."
        )
    with styled("benchmarks.lib.perturbation.draw") as new_figure:
        figure = new_figure((1.2 + 2.4 * len(bands), 4.8))
        grid = figure.subplots(2, len(bands), sharex=True, sharey="row", squeeze=False)
        for column, (name, band) in enumerate(bands.items()):
            color = report.look_of(name, column)["color"]
            for row, curves in enumerate(band):  # the first change is that to step 2
                _band(grid[row][column], curves, smooth + row, smooth, color)
            grid[0][column].set_title(name)
            grid[1][column].set_xlabel("training step")
        grid[0][0].set_ylabel("loss")
        grid[1][0].set_ylabel("change of the gradient")
    return figure


def _key(seed: int, steps: jax.Array, mark: jax.Array, axis_name: Any) -> jax.Array:
    """A key that differs between steps, layers (by their marks) and devices."""
    bits = lax.bitcast_convert_type(mark, jnp.uint32)
    key = jax.random.fold_in(jax.random.key(seed), steps.astype(jnp.uint32))
    key = jax.random.fold_in(key, bits)
    if axis_name is not None:
        key = jax.random.fold_in(key, lax.axis_index(axis_name))
    return key


@jax.jit
def _distance(gradient: Any, before: Any) -> jax.Array:
    def squares(a, b):
        return jnp.square((a - b).astype(wide(a.dtype))).sum()

    return jnp.sqrt(sum(jax.tree.leaves(jax.tree.map(squares, gradient, before))))


def _band(axis: Any, curves: np.ndarray, first: int, smooth: int, color: str) -> None:
    kernel = np.ones(smooth) / smooth
    curves = np.stack([np.convolve(curve, kernel, mode="valid") for curve in curves])
    steps = np.arange(curves.shape[1]) + first
    low, high = curves.min(axis=0), curves.max(axis=0)
    axis.fill_between(steps, low, high, color=color, alpha=0.3, lw=0)
    axis.plot(steps, np.median(curves, axis=0), color=color, lw=1)
