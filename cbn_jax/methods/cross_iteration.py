# SPDX-License-Identifier: Apache-2.0
"""Cross-iteration batch normalization: statistics of the last k iterations."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.checks import check_choice, check_count, check_epsilon
from cbn_jax.core.estimator import Estimator
from cbn_jax.core.history import (
    History,
    empty_history,
    push,
    this_iteration,
    transport,
)
from cbn_jax.core.moments import Moments, pool_moments, pool_two
from cbn_jax.core.running import RunningMoments, init_running
from cbn_jax.core.schedules import ScheduleFn, check_schedule
from cbn_jax.core.values import factory
from cbn_jax.core.windowed import windowed


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


@factory
def cross_iteration_batch_norm(
    window: int = 8,
    *,
    burn_in: int | ScheduleFn = 0,
    rho: float = 1.0,
    guard: Literal["max", "drop"] = "max",
    gradient: Literal["current", "window"] = "current",
    running: Literal["batch", "window"] = "batch",
    momentum: float | ScheduleFn = 0.99,
    epsilon: float = 1e-5,
) -> Estimator:
    """Cross-iteration batch normalization: statistics of the last k iterations.

    The weights have changed since an iteration s steps ago. The method therefore first
    moves the moments of that iteration to the current weights. It uses their derivative
    with respect to the weights θ of the layer that made ``x``::

        μₛ(θₜ) = μₛ + ρ ⟨∂μₛ/∂θ, θₜ − θₛ⟩        νₛ(θₜ) = νₛ + ρ ⟨∂νₛ/∂θ, θₜ − θₛ⟩

    ν is E[x²]. The statistics of the window are the averages of μₛ(θₜ) and of max(νₛ(θₜ),
    μₛ(θₜ)²) over its iterations, including the current one. Until the window is full, the
    method averages the iterations seen so far.

    This is the published method, with the published defaults. The first-order step
    underestimates the variance by ⟨Δθ, Q Δθ⟩. That error grows with the learning rate and
    the window. ``streaming_batch_norm`` has no such bias and less state. In training from
    scratch, ``gradient="window"`` improves accuracy by percentage points.

    Args:
      window: k ≥ 1, the number of iterations averaged, including the current one. An
        iteration is a call of ``train``. Under gradient accumulation the weights do not
        change between micro-batches, and the window pools these exactly.
      burn_in: number of first iterations that use the current batch alone, as plain batch
        norm does. The history already fills during the burn-in. Alternatively a schedule
        from the number of iterations so far to the share of the past iterations in use,
        such as ``ramp(steps)``. E epochs are ``round(E * (examples // batch_size))``
        iterations.
      rho: strength ρ of the compensation; 0 averages old statistics unchanged.
      guard: treatment of a negative compensated variance. "max" sets it to zero, like the
        paper's max(ν, μ²). "drop" leaves that iteration out of the average of that feature,
        like the authors' released layer.
      gradient: "current" differentiates only through the moments of the current iteration,
        as published. "window" also differentiates through θₜ in the compensation. The
        gradient with respect to θ is then that of the computed function.
      running: source of the averages for inference, either each "batch" (as in the released
        layer) or the whole "window". With n values per feature, the variance of the batch
        is too small by 1/n on average, and the scale in inference differs from training.
        With few values use "window". With one value only "window" works.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a schedule
        m ↦ α_m such as ``cumulative()``. With a decay and ``running="window"``, an average
        restarts if it differs from the window by more than three standard errors.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``CrossIterationState``. ``init`` needs the layer and
      its parameters. ``train`` needs the ``source`` of the layer, from ``run_layer``. The
      state holds k arrays of the size of θ.

    Raises:
      ValueError: an argument out of range; parameters without features last; ``train``
        without a source, or with a state made for another layer or window; a mask that
        differs per feature.
      TypeError: ``x`` is not floating point; the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> kernel = jnp.eye(2)
      >>> estimator = cbn.cross_iteration_batch_norm(window=2, running="window")
      >>> state = estimator.init(2, cbn.dense, kernel)
      >>> for z in (jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0]])):
      ...     x, source = cbn.run_layer(cbn.dense, kernel, z)
      ...     statistics, state = estimator.train(state, x, source)
      >>> statistics.mean  # of both iterations, one example each
      Array([2., 2.], dtype=float32)

    Reference: Zhuliang Yao, Yue Cao, Shuxin Zheng, Gao Huang, Stephen Lin,
    "Cross-Iteration Batch Normalization", CVPR 2021, arXiv:2002.05712. As there, the
    derivative is taken with respect to the weights of the same layer only.

    Differs from the paper: the same statistics are computed in central form, ``σ²ₛ(θₜ) =
    max(σ²ₛ + ⟨∂σ²ₛ/∂θ, Δθ⟩ − ⟨∂μₛ/∂θ, Δθ⟩², 0)``. Nothing cancels in it at large means.
    Iterations are weighted by their number of values, which is the paper's plain average if
    all batches have one size. A bias is compensated like a kernel.

    Differs from the authors' released layer: that layer drops a negative variance
    (``guard="drop"``) and adds ε outside the root. It computes the variance of the current
    batch with n − 1, and fills its history only after the burn-in. Its two-stage burn-in is
    ``burn_in=steps``, its other one ``ramp(steps)``. Its ``buffer_num`` is window − 1.

    NaN or inf makes the output of its own step NaN, and the state skips it. A window of a
    single value has no variance. The running statistics then normalize that step.
    """
    check_count("window", window, 1)
    check_choice("guard", guard, _GUARDS)
    check_choice("gradient", gradient, ("current", "window"))
    check_choice("running", running, ("batch", "window"))
    check_epsilon(epsilon)
    share_of_past = _share_of_past(burn_in)

    def init_state(features, params, groups):
        return CrossIterationState(
            running=init_running(features),
            history=empty_history(window, features, params, groups),
            slot=jnp.zeros((), jnp.float32),
        )

    def step(state, x, source, axis_name, mask):
        batch, iteration = this_iteration(x, source, axis_name, mask, state.running.mean)
        params = source.params
        if gradient == "current":
            params = lax.stop_gradient(params)
        # The step writes the ring first and reads the new ring afterwards. XLA would copy
        # an old ring that is still to be read.
        history = push(state.history, iteration, state.slot)
        past = _GUARDS[guard](transport(history, params, rho, batch.mean.dtype))
        in_use = _in_use(state, window, share_of_past)
        past = past._replace(size=jnp.where(in_use, past.size, 0.0))
        pooled = pool_two(batch, pool_moments(past))
        slot = jnp.where(state.slot + 1 < window, state.slot + 1, 0.0)
        return batch, pooled, state._replace(history=history, slot=slot)

    return windowed(
        "cross_iteration_batch_norm",
        CrossIterationState,
        init_state,
        step,
        momentum=momentum,
        epsilon=epsilon,
        running=running,
        alone=window == 1 or burn_in != 0 or running == "batch",
    )


def _in_use(
    state: CrossIterationState, window: int, share_of_past: ScheduleFn
) -> jax.Array:
    """``[S, C]``, the past slots in use; during a burn-in only the youngest ones."""
    age = (state.slot - jnp.arange(window, dtype=state.slot.dtype))[:, None]
    age = jnp.where(age < 0, age + window, age)
    # A share that is smaller than a whole slot by a rounding error includes that slot.
    reach = jnp.floor((window - 1) * share_of_past(state.running.steps) + 1e-3)[None]
    return (age > 0) & (age <= reach)


def _max(moments: Moments) -> Moments:
    """A negative variance counts as zero: ν = max(ν, μ²)."""
    return moments._replace(var=jnp.maximum(moments.var, 0.0))


def _drop(moments: Moments) -> Moments:
    """A negative variance is left out."""
    return _max(moments._replace(size=jnp.where(moments.var < 0.0, 0.0, moments.size)))


_GUARDS = {"max": _max, "drop": _drop}


def _share_of_past(burn_in: int | ScheduleFn) -> ScheduleFn:
    """A schedule unchanged; a number as that many iterations without the past."""
    check_schedule("burn_in", burn_in)
    if callable(burn_in):
        return burn_in
    check_count("burn_in", burn_in, 0)
    return lambda seen: (seen >= burn_in).astype(jnp.float32)
