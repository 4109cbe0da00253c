# SPDX-License-Identifier: Apache-2.0
"""Cross-iteration batch normalization: statistics of the last k iterations."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._checks import (
    check_activations,
    check_choice,
    check_count,
    check_epsilon,
    check_features_last,
    check_mask,
    check_source,
    check_state,
    check_values,
)
from ._estimator import Estimator
from ._history import History, current, empty_history, prepend, push, transport
from ._moments import Moments, pool_moments
from ._running import (
    Averaging,
    RunningMoments,
    averaging,
    init_running,
    known_moments,
    update_running,
)
from ._statistics import statistics_of

BurnIn = Callable[[jax.Array], jax.Array]  # iterations so far -> share of the past in use


class CrossIterationState(NamedTuple):
    """State of ``cross_iteration_batch_norm``.

    Attributes:
      running: averages for inference.
      history: the last ``window`` iterations, the current one included.
      slot: scalar, the slot that is overwritten next.
    """

    running: RunningMoments
    history: History
    slot: jax.Array


def ramp(steps: int) -> BurnIn:
    """A burn-in that lengthens the window bit by bit, from 1 to k in ``steps`` iterations.

    Args:
      steps: iterations until the whole window is in use, at least 1.

    Returns:
      The rule for ``cross_iteration_batch_norm(burn_in=...)``: iterations so far ↦ share
      of the past iterations in use.

    Raises:
      ValueError: ``steps`` is not a whole number from 1 on.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> cbn.ramp(4)(jnp.array([0.0, 1.0, 8.0]))
      Array([0.  , 0.25, 1.  ], dtype=float32)
    """
    check_count("steps", steps, 1)
    return lambda seen: jnp.minimum(seen / steps, 1.0)


def epochs_to_steps(epochs: float, *, examples: int, batch_size: int) -> int:
    """Iterations in so many passes over the data, incomplete batches dropped.

    Papers state burn-ins in epochs, ``burn_in`` counts calls of ``train``.

    Args:
      epochs: passes, 0 or more; a fraction is rounded to whole iterations.
      examples: training examples.
      batch_size: examples per iteration, on all devices together.

    Returns:
      The number of iterations.

    Raises:
      ValueError: a negative number of epochs, or sizes that are not whole numbers from 1.

    Example:
      >>> import cbn_jax as cbn
      >>> cbn.epochs_to_steps(8, examples=1000, batch_size=16)
      496
    """
    check_count("examples", examples, 1)
    check_count("batch_size", batch_size, 1)
    if not epochs >= 0:
        raise ValueError(f"epochs is {epochs!r}, expected a number from 0 on.")
    return round(epochs * (examples // batch_size))


def cross_iteration_batch_norm(
    window: int = 8,
    *,
    burn_in: int | BurnIn = 0,
    rho: float = 1.0,
    guard: Literal["max", "drop"] = "max",
    gradient: Literal["current", "window"] = "current",
    running: Literal["batch", "window"] = "batch",
    momentum: float | Averaging = 0.99,
    epsilon: float = 1e-5,
) -> Estimator:
    """Cross-iteration batch normalization: statistics of the last k iterations.

    An iteration s steps ago saw other weights, so its moments are first moved to today's,
    along their derivative with respect to the weights θ of the layer that made ``x``::

        μₛ(θₜ) = μₛ + ρ ⟨∂μₛ/∂θ, θₜ − θₛ⟩        νₛ(θₜ) = νₛ + ρ ⟨∂νₛ/∂θ, θₜ − θₛ⟩

    with ν = E[x²]. The window's statistics are the averages of μₛ(θₜ) and of
    max(νₛ(θₜ), μₛ(θₜ)²), the current iteration included. Until the window is full, the
    iterations that exist are averaged.

    This is the published method, and the defaults are the publication's. The first-order
    step underestimates the variance by ⟨Δθ, Q Δθ⟩, which grows with the learning rate and
    the window; ``streaming_batch_norm`` has no such bias and less state. Trained from
    scratch, ``gradient="window"`` is worth points.

    Args:
      window: k ≥ 1, iterations averaged, the current one included. An iteration is a call
        of ``train``; with gradient accumulation the weights stand still in between, and
        the window pools the micro-batches exactly.
      burn_in: number of first iterations that use the current batch alone (plain batch
        norm), while the history already fills (``epochs_to_steps`` counts them); or a
        rule such as ``ramp(steps)``.
      rho: strength ρ of the compensation; 0 averages old statistics as they are.
      guard: what happens where a compensated variance is negative: "max" puts it to zero,
        as the paper's max(ν, μ²); "drop" leaves that iteration out of that feature's
        average, as the authors' released layer.
      gradient: "current" differentiates through the current iteration's moments only, as
        published; "window" also through θₜ in the compensation, which makes the gradient
        with respect to θ that of the function that is computed.
      running: where the averages for inference come from, each "batch" (as in the
        released layer) or the whole "window". With few values per feature the batch's
        variance is too small, by 1/n on average, and inference sees another scale than
        training: take "window" there; with one value it is the only choice.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a rule
        m ↦ α_m such as ``cumulative``.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``CrossIterationState``. ``init`` needs the layer's
      parameters, ``train`` the layer's ``source`` (from ``run_layer``). The state holds
      k arrays of the size of θ.

    Raises:
      ValueError: an argument out of range; parameters without features last; ``train``
        without a source, or with one of other parameters or another ``axis_name``;
        features or window that do not fit the state; a mask that differs per feature.
      TypeError: ``x`` is not floating point; the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> kernel = jnp.eye(2)
      >>> estimator = cbn.cross_iteration_batch_norm(window=2, running="window")
      >>> state = estimator.init(features=2, params=kernel)
      >>> for z in (jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0]])):
      ...     x, source = cbn.run_layer(cbn.dense, kernel, z)
      ...     statistics, state = estimator.train(state, x, source)
      >>> statistics.mean  # of both iterations, one example each
      Array([2., 2.], dtype=float32)

    Reference: Zhuliang Yao, Yue Cao, Shuxin Zheng, Gao Huang, Stephen Lin,
    "Cross-Iteration Batch Normalization", CVPR 2021, arXiv:2002.05712. As there, the
    derivative is taken with respect to the weights of the same layer only.

    Differs from the paper: the same statistics are computed in central form,
    ``σ²ₛ(θₜ) = max(σ²ₛ + ⟨∂σ²ₛ/∂θ, Δθ⟩ − ⟨∂μₛ/∂θ, Δθ⟩², 0)``, in which nothing cancels at
    large means; iterations count by their number of values, which is the paper's plain
    average wherever all batches have one size; a bias is compensated like a kernel.

    Differs from the authors' released layer: it drops a negative variance
    (``guard="drop"``), adds ε outside the root, takes variances of the current batch by
    n − 1, and fills its history only after the burn-in. Its two-stage burn-in is
    ``burn_in=steps``, its other one ``ramp(steps)``; its ``buffer_num`` is window − 1.

    NaN or inf makes the output of its own step NaN and is kept out of the state.
    """
    name = "cross_iteration_batch_norm"
    check_count("window", window, 1)
    check_choice("guard", guard, _GUARDS)
    check_choice("gradient", gradient, ("current", "window"))
    check_choice("running", running, ("batch", "window"))
    check_epsilon(epsilon)
    if not callable(burn_in):
        check_count("burn_in", burn_in, 0)
    share_of_past = burn_in if callable(burn_in) else _two_stage(burn_in)
    average = averaging(momentum)

    def check(state, x):
        check_activations(name, x)
        check_state(name, state, CrossIterationState, lambda s: s.running.mean, x)
        if state.history.mean.shape[0] != window:
            raise ValueError(
                f"{name}(window={window}) got a state with {state.history.mean.shape[0]} "
                f"iterations, expected {window}; make it with "
                f"cross_iteration_batch_norm(window={window}).init(features, params)."
            )

    def init(features, params=None, groups=1):
        check_features_last(name, features, params)
        return CrossIterationState(
            running=init_running(features),
            history=empty_history(window, features, params, groups),
            slot=jnp.zeros((), jnp.float32),
        )

    def train(state, x, source=None, *, axis_name=None, mask=None):
        check(state, x)
        source = check_source(name, x, source, state.history.d_mean, axis_name)
        check_mask(name, x, mask)
        if window == 1 or burn_in != 0 or running == "batch":
            check_values(name, x, axis_name, mask)
        state = lax.stop_gradient(state)
        moments, entry = current(x, source, axis_name, mask)
        params = source.params
        if gradient == "current":
            params = lax.stop_gradient(params)
        # Written first and read after: a ring that is still to be read would be copied.
        history = push(state.history, entry, state.slot)
        past = _GUARDS[guard](transport(history, params, rho, moments.mean.dtype))
        age = (state.slot - jnp.arange(window, dtype=state.slot.dtype))[:, None] % window
        # A share a rounding error below a whole slot is that slot.
        reach = jnp.floor((window - 1) * share_of_past(state.running.steps) + 1e-3)[None]
        in_use = (age > 0) & (age <= reach)
        past = past._replace(size=jnp.where(in_use, past.size, 0.0))
        pooled = pool_moments(prepend(moments, past))
        if mask is not None:
            pooled = known_moments(pooled, state.running)
        seen = moments if running == "batch" else pooled._replace(size=moments.size)
        return statistics_of(pooled, epsilon), CrossIterationState(
            running=update_running(state.running, seen, average),
            history=history,
            slot=(state.slot + 1) % window,
        )

    def infer(state, x):
        check(state, x)
        return statistics_of(state.running, epsilon)

    return Estimator(init, train, infer)


def _max(moments: Moments) -> Moments:
    """A negative variance counts as zero: ν = max(ν, μ²)."""
    return moments._replace(var=jnp.maximum(moments.var, 0.0))


def _drop(moments: Moments) -> Moments:
    """A negative variance does not count at all."""
    return _max(moments._replace(size=jnp.where(moments.var < 0.0, 0.0, moments.size)))


_GUARDS = {"max": _max, "drop": _drop}


def _two_stage(burn_in: int) -> BurnIn:
    return lambda seen: (seen >= burn_in).astype(jnp.float32)
