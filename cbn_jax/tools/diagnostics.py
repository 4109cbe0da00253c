# SPDX-License-Identifier: Apache-2.0
"""Errors of a method's training statistics, measured in your model, layer by layer.

The true statistics of a layer are those of a large batch under the current weights.
``watch`` trains several methods on the same activations. ``reference`` measures the true
statistics in one pass over the large batch. ``errors`` compares the two, layer by layer,
and ``cbn_jax.figures.draw_errors`` draws the errors::

    methods = {"batch": cbn_jax.batch_norm(), "streaming": cbn_jax.streaming_batch_norm()}
    model = Net(norm=functools.partial(Norm, watch(methods, use="streaming")))
    probe = Net(norm=functools.partial(Norm, reference(methods, use="streaming")))

    # a training step with the parameters params, then, before their update:
    variables = {"params": params, "batch_stats": batch_stats}
    _, measured = probe.apply(variables, many_images, mutable=["batch_stats"])
    records.append((step, errors(measured["batch_stats"])))

    draw_errors(records, "errors.png")

In nnx, measure with ``nnx.update(probe, nnx.state(model))``, ``probe(many_images)``,
``errors(probe)``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from cbn_jax.core.batch import batch_moments
from cbn_jax.core.checks import accepted, check_choice
from cbn_jax.core.estimator import Estimator, State, Trait
from cbn_jax.core.named import Name, named_leaves
from cbn_jax.core.running import usable_moments
from cbn_jax.core.statistics import Statistics, statistics_of
from cbn_jax.core.values import factory


class WatchState(NamedTuple):
    """State of ``watch`` and ``reference``.

    Attributes:
      states: the state of each method, by name.
      estimated: the statistics of the last training call of each method, by name, each
        field ``[C]``. Before the first call the mean is 0 and the scale 1.
      truth: statistics of the last reference batch, each field ``[C]``. The scale is 0
        before the first reference batch, and for a feature that was not finite in it or did
        not vary.
    """

    states: dict[str, State]
    estimated: dict[str, Statistics]
    truth: Statistics


class Errors(NamedTuple):
    """Errors of a method's statistics: root mean squares over the features of a layer.

    Attributes:
      mean: of ``(estimated mean − true mean) / true std``, in standard deviations.
      scale: of ``log(estimated std / true std)``; 0.1 is about 10 %.
    """

    mean: float
    scale: float


@factory
def watch(estimators: Mapping[str, Estimator], use: str) -> Estimator:
    """Trains several methods side by side and normalizes by one of them.

    All methods see the same activations and sources, those of a network normalized by
    ``use``. Training therefore runs as with ``use`` alone, and one run compares all
    methods.

    Args:
      estimators: methods with one mean and one scale per feature, by name.
      use: the name of the method whose statistics are returned, in training and inference.

    Returns:
      An Estimator whose state is a ``WatchState``, with the ε of ``use``. Arguments must
      satisfy the requirements of every method: a layer and its parameters, a source, two
      values per feature.

    Raises:
      ValueError: ``use`` is not among the names; what the methods raise.
      TypeError: the state is another method's; what the methods raise.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> from cbn_jax import diagnostics
      >>> methods = {"batch": cbn.batch_norm(), "longer": cbn.streaming_batch_norm(2)}
      >>> estimator = diagnostics.watch(methods, use="longer")
      >>> kernel = jnp.eye(1)
      >>> state = estimator.init(1, cbn.dense, kernel)
      >>> for z in (jnp.array([[0.0], [2.0]]), jnp.array([[3.0], [5.0]])):
      ...     x, source = cbn.run_layer(cbn.dense, kernel, z)
      ...     statistics, state = estimator.train(state, x, source)
      >>> statistics.mean, state.estimated["batch"].mean
      (Array([3.], dtype=float32), Array([4.], dtype=float32))

    Every method treats NaN or inf in its own way. Neither enters ``estimated``.
    """
    check_choice("use", use, estimators)

    def init(features, layer=None, params=None):
        def full(value):
            return jnp.full(features, value, jnp.float32)

        return WatchState(
            {name: e.init(features, layer, params) for name, e in estimators.items()},
            {name: Statistics(full(0.0), full(1.0)) for name in estimators},
            Statistics(full(0.0), full(0.0)),
        )

    def train(state, x, source=None, *, axis_name=None, mask=None):
        state, x = _accept(state, x, mask)
        trained = {
            name: e.train(state.states[name], x, source, axis_name=axis_name, mask=mask)
            for name, e in estimators.items()
        }
        estimated = {
            name: _keep_finite(state.estimated[name], statistics)
            for name, (statistics, _) in trained.items()
        }
        states = {name: new for name, (_, new) in trained.items()}
        return trained[use][0], WatchState(states, estimated, state.truth)

    def infer(state, x, *, mask=None):
        state, x = _accept(state, x, mask)
        return estimators[use].infer(state.states[use], x, mask=mask)

    layered = any("layered" in each.traits for each in estimators.values())
    traits = _LAYERED if layered else frozenset()
    return Estimator(init, train, infer, estimators[use].epsilon, traits)


_LAYERED: frozenset[Trait] = frozenset({"layered"})


@factory
def reference(estimators: Mapping[str, Estimator], use: str) -> Estimator:
    """Measures the true statistics instead of training.

    ``train`` normalizes by the statistics of ``use`` from its last training call, and
    stores the statistics of ``x`` as the truth. Nothing else in the state changes. Run the
    network once in training mode, with a large batch and the parameters of the last
    training call. Every layer then sees the same layers before it as in that call. With the
    parameters after their update, every error would include that update.

    Args:
      estimators: as for ``watch``.
      use: as for ``watch``.

    Returns:
      An Estimator with the state of ``watch``. It needs no source.

    Raises:
      ValueError: ``use`` is not among the names; features that do not fit the state.
      TypeError: ``x`` is not floating point; the state is another method's.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> from cbn_jax import diagnostics
      >>> methods = {"batch": cbn.batch_norm()}
      >>> state = diagnostics.watch(methods, use="batch").init(1)
      >>> x = jnp.array([[0.0], [2.0], [7.0]])
      >>> _, state = diagnostics.reference(methods, use="batch").train(state, x)
      >>> state.truth.mean
      Array([3.], dtype=float32)

    The state ignores NaN or inf in a feature. That feature then has no truth.
    """
    watched = watch(estimators, use)

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        state, x = _accept(state, x, mask)
        x = lax.stop_gradient(x)
        moments = batch_moments(x, axis_name=axis_name, mask=mask)
        varies = usable_moments(moments) & (moments.var > 0)
        truth = Statistics(
            *(
                _where(varies, value, jnp.zeros_like(value))
                for value in statistics_of(moments, watched.epsilon)
            )
        )
        return state.estimated[use], state._replace(truth=truth)

    return dataclasses.replace(watched, train=train)


def errors(tree: Any) -> dict[str, dict[str, Errors]]:
    """The errors of every method in every watched layer.

    The true standard deviation is √(variance + ε) with the ε of the method in use. √ε
    normalizes a feature with a much smaller variance, so a difference that is small
    compared to √ε is a small error. The function leaves out features that do not vary at
    all, and features without a truth.

    Args:
      tree: a pytree with a ``WatchState`` per layer, such as linen's ``batch_stats``, an
        nnx module or its state, or one such state.

    Returns:
      A dict from layer path to method to ``Errors``, sorted by the names of the layers,
      with numbers in names sorted as numbers. An error is NaN if no feature is left, as
      before the first pass with ``reference``.

    Raises:
      ValueError: no watched layer.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> from cbn_jax import diagnostics
      >>> methods = {"batch": cbn.batch_norm()}
      >>> state = diagnostics.watch(methods, use="batch").init(1)
      >>> measure = diagnostics.reference(methods, use="batch").train
      >>> _, state = measure(state, jnp.array([[1.0], [3.0]]))
      >>> layers = diagnostics.errors({"first": state})
      >>> round(layers["first"]["batch"].mean, 2)  # estimated 0 ± 1, true 2 ± 1
      2.0
    """
    layers = _watched(named_leaves(tree))
    if not layers:
        raise ValueError(
            "errors got a tree without a WatchState, expected the state of a model whose "
            "normalizers are watch(...); in linen that is its batch_stats."
        )
    return {
        name: {
            method: _errors(estimated, layers[name].truth)
            for method, estimated in layers[name].estimated.items()
        }
        for name in sorted(layers, key=_order)
    }


def _accept(state: WatchState, x: jax.Array, mask: Any) -> tuple[WatchState, jax.Array]:
    return accepted("watch", state, WatchState, lambda s: s.truth.mean, x, mask)


def _keep_finite(old: Statistics, new: Statistics) -> Statistics:
    new = lax.stop_gradient(new)
    finite = jnp.isfinite(new.mean) & jnp.isfinite(new.inv_std)
    return Statistics(
        _where(finite, new.mean, old.mean), _where(finite, new.inv_std, old.inv_std)
    )


def _where(usable: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(usable, new, old.astype(new.dtype)).astype(jnp.float32)


def _watched(leaves: dict[Name, jax.Array]) -> dict[str, WatchState]:
    """The contents of each layer's ``WatchState``, from the leaves of a tree."""

    def statistics(place):
        return Statistics(leaves[*place, "mean"], leaves[*place, "inv_std"])

    places = [name[:-2] for name in leaves if name[-2:] == ("truth", "mean")]
    layers = {}
    for place in places:
        depth = len(place)
        methods = [
            name[depth + 1]
            for name in leaves
            if name[:depth] == place and name[depth:][::2] == ("estimated", "mean")
        ]
        estimated = {name: statistics((*place, "estimated", name)) for name in methods}
        state = WatchState({}, estimated, statistics((*place, "truth")))
        layers["/".join(place)] = state
    return layers


def _order(name: str) -> list[tuple[str, int, str]]:
    """A sort key that puts Norm_2 before Norm_10."""
    return [(p.rstrip("0123456789"), len(p), p) for p in name.split("/")]


def _errors(estimated: Statistics, truth: Statistics) -> Errors:
    varies = truth.inv_std > 0

    def rms(values):
        return float(jnp.sqrt(jnp.square(values).mean(where=varies)))

    return Errors(
        mean=rms((estimated.mean - truth.mean) * truth.inv_std),
        scale=rms(jnp.log(estimated.inv_std / truth.inv_std)),
    )
