# SPDX-License-Identifier: Apache-2.0
"""Cross-iteration batch normalization: statistics of the last k iterations."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._checks import (
    check_activations,
    check_count,
    check_epsilon,
    check_features_last,
    check_state,
    check_values,
)
from ._estimator import Estimator
from ._history import History, empty_history, entry_of, prepend, push, transport
from ._moments import batch_moments, pool_moments
from ._running import (
    Averaging,
    RunningMoments,
    averaging,
    init_running,
    known_moments,
    update_running,
)
from ._source import Source
from ._statistics import statistics_of


class CrossIterationState(NamedTuple):
    """State of ``cross_iteration_batch_norm``.

    Attributes:
      running: averages of each iteration's own moments, for inference.
      history: the last ``window − 1`` iterations (one empty slot where that is none).
      slot: scalar, the slot that is overwritten next.
    """

    running: RunningMoments
    history: History
    slot: jax.Array


def cross_iteration_batch_norm(
    window: int = 8,
    *,
    burn_in: int = 0,
    momentum: float | Averaging = 0.99,
    epsilon: float = 1e-5,
) -> Estimator:
    """Cross-iteration batch normalization: statistics of the last k iterations.

    An iteration s steps ago saw other weights, so its moments are first moved to today's,
    along their derivative with respect to the weights θ of the layer that made ``x``:

        μₛ(θₜ) = μₛ + ⟨∂μₛ/∂θ, θₜ − θₛ⟩        νₛ(θₜ) = νₛ + ⟨∂νₛ/∂θ, θₜ − θₛ⟩

    with ν = E[x²]. The window's statistics are the averages of μₛ(θₜ) and of
    max(νₛ(θₜ), μₛ(θₜ)²), the current iteration included. Until the window is full, the
    iterations that exist are averaged.

    Prefer it with 1 to 8 examples per step, when the weights move slowly enough for a
    first-order step across the window; a burn-in bridges the early, fast phase.

    Args:
      window: k ≥ 1, iterations averaged, the current one included. An iteration is a call
        of ``train``; with gradient accumulation the weights stand still in between, and
        the window pools the micro-batches exactly.
      burn_in: number of first iterations that use the current batch alone (plain batch
        norm), while the history already fills.
      momentum: decay of the running averages in [0, 1), the fraction kept; or a rule
        m ↦ α_m such as ``cumulative``.
      epsilon: added to the variance, inside the root.

    Returns:
      An Estimator whose state is a ``CrossIterationState``. ``init`` needs the layer's
      parameters, ``train`` the layer's ``source`` (from ``run_layer``). The state holds
      2 (k − 1) arrays of the size of θ.

    Raises:
      ValueError: an argument out of range; parameters without features last; ``train``
        without a source, or with one of other parameters or another ``axis_name``;
        features or window that do not fit the state.
      TypeError: ``x`` is not floating point; the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> dense = lambda kernel, z: z @ kernel
      >>> kernel = jnp.eye(2)
      >>> estimator = cbn.cross_iteration_batch_norm(window=2)
      >>> state = estimator.init(features=2, params=kernel)
      >>> for z in (jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 4.0]])):
      ...     x, source = cbn.run_layer(dense, kernel, z)
      ...     statistics, state = estimator.train(state, x, source)
      >>> statistics.mean  # of both iterations, one example each
      Array([2., 2.], dtype=float32)

    Reference: Zhuliang Yao, Yue Cao, Shuxin Zheng, Gao Huang, Stephen Lin,
    "Cross-Iteration Batch Normalization", CVPR 2021, arXiv:2002.05712. As there, gradients
    flow through the current iteration's moments only, and the derivative is taken with
    respect to the weights of the same layer only.

    Differs from the paper: the same statistics are computed in central form,
    ``σ²ₛ(θₜ) = max(σ²ₛ + ⟨∂σ²ₛ/∂θ, Δθ⟩ − ⟨∂μₛ/∂θ, Δθ⟩², 0)``, in which nothing cancels at
    large means; iterations count by their number of values, which is the paper's plain
    average wherever all batches have one size; a bias is compensated like a kernel. From
    the authors' released layer: a negative variance is floored, not dropped; ε stands
    inside the root; variances are biased; the history fills during burn-in.

    NaN or inf makes the output of its own step NaN and is kept out of the state.
    """
    name = "cross_iteration_batch_norm"
    check_count("window", window, 1)
    check_count("burn_in", burn_in, 0)
    check_epsilon(epsilon)
    average = averaging(momentum)
    # Checkpointers refuse arrays of size zero: a window of 1 keeps one slot, left empty.
    slots = max(window - 1, 1)

    def check(state, x):
        check_activations(name, x)
        check_state(name, state, CrossIterationState, lambda s: s.running.mean, x)
        if state.history.mean.shape[0] != slots:
            raise ValueError(
                f"{name}(window={window}) got a state with {state.history.mean.shape[0]} "
                f"past iterations, expected {slots}; make it with "
                f"cross_iteration_batch_norm(window={window}).init(features, params)."
            )

    def init(features, params=None):
        check_features_last(name, features, params)
        return CrossIterationState(
            running=init_running(features),
            history=empty_history(slots, features, params),
            slot=jnp.zeros((), jnp.float32),
        )

    def train(state, x, source=None, *, axis_name=None, mask=None):
        check(state, x)
        source = _checked_source(name, state.history, source, axis_name)
        if window == 1 or burn_in > 0:
            check_values(name, x, axis_name, mask)
        state = lax.stop_gradient(state)
        moments = batch_moments(x, axis_name=axis_name, mask=mask)
        past = transport(state.history, source.params, moments.mean.dtype)
        in_use = (state.running.steps >= burn_in) & (window > 1)
        past = past._replace(size=jnp.where(in_use[None], past.size, 0.0))
        pooled = pool_moments(prepend(moments, past))
        if mask is not None:
            pooled = known_moments(pooled, state.running)
        entry = entry_of(lax.stop_gradient(moments), lax.stop_gradient(x), source, mask)
        return statistics_of(pooled, epsilon), CrossIterationState(
            running=update_running(state.running, moments, average),
            history=push(state.history, entry, state.slot),
            slot=(state.slot + 1) % slots,
        )

    def infer(state, x):
        check(state, x)
        return statistics_of(state.running, epsilon)

    return Estimator(init, train, infer)


def _checked_source(
    name: str, history: History, source: Source | None, axis_name: Any
) -> Source:
    """The source, if it is one and fits."""
    if source is None:
        raise ValueError(
            f"{name} got source=None, expected the layer that made x; take both from "
            "x, source = run_layer(layer_fn, params, inputs), or give the Flax module its "
            "layer: Norm(estimator, layer=...)."
        )
    if source.axis_name != axis_name:
        raise ValueError(
            f"{name} got axis_name={axis_name!r} and a source with "
            f"axis_name={source.axis_name!r}, expected one and the same; give it to "
            "run_layer and to train."
        )
    came = [leaf.shape for leaf in jax.tree.leaves(source.params)]
    expected = [leaf.shape[1:] for leaf in jax.tree.leaves(history.d_mean)]
    if came != expected:
        raise ValueError(
            f"{name} got a source with parameters of shapes {came}, expected {expected} as "
            "in its state; write estimator.init(features, params) with this layer's "
            "parameters."
        )
    return source
