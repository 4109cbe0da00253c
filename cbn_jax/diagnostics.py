# SPDX-License-Identifier: Apache-2.0
"""How far the statistics that methods believe are from the truth, in a model of yours.

Here the truth for a layer is what a large batch says under today's weights: its moments.
``watch`` trains several methods on the same activations, ``reference`` measures the truth
in one pass over the large batch, ``errors`` compares them layer by layer, ``draw`` draws::

    methods = {"batch": cbn_jax.batch_norm(), "streaming": cbn_jax.streaming_batch_norm()}
    model = Net(norm=functools.partial(Norm, watch(methods, use="streaming")))
    probe = Net(norm=functools.partial(Norm, reference(methods, use="streaming")))

    # a training step with the parameters params, then, before their update:
    variables = {"params": params, "batch_stats": batch_stats}
    _, measured = probe.apply(variables, many_images, mutable=["batch_stats"])
    records.append((step, errors(measured["batch_stats"])))

    draw(records, "errors.png")

In nnx the measurement is ``nnx.update(probe, nnx.state(model))``, ``probe(many_images)``,
``errors(probe)``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._checks import check_activations, check_choice, check_epsilon, check_state
from ._estimator import Estimator, State
from ._figure import COLORS, styled
from ._moments import Moments, batch_moments
from ._running import usable_moments
from ._statistics import Statistics


class WatchState(NamedTuple):
    """State of ``watch`` and ``reference``.

    Attributes:
      states: by method, the state of each.
      believed: by method, the statistics of its last training call, each field ``[C]``;
        mean 0 and scale 1 before the first.
      truth: moments of the last reference batch, each field ``[C]``; 0 before the first,
        and for a feature that was not finite in it.
    """

    states: dict[str, State]
    believed: dict[str, Statistics]
    truth: Moments


class Errors(NamedTuple):
    """How far a method's statistics are from the truth, RMS over the features of a layer.

    Attributes:
      mean: of ``(believed mean − true mean) / true std``, in standard deviations.
      scale: of ``log(believed std / true std)``; 0.1 is about 10 %.
    """

    mean: float
    scale: float


def watch(estimators: Mapping[str, Estimator], use: str) -> Estimator:
    """Trains several methods side by side and normalizes by one of them.

    All see the same activations and sources, those of a network that is normalized by
    ``use``; so they are compared on one and the same course of training, which is the one
    of ``use`` alone.

    Args:
      estimators: by name, methods with one mean and one scale per feature.
      use: the name of the one whose statistics are returned, in training and inference.

    Returns:
      An Estimator whose state is a ``WatchState``. What an argument must be to suit all
      the methods is asked of it: parameters, a source with patches, two values per feature.

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
      >>> state = estimator.init(1, kernel)
      >>> for z in (jnp.array([[0.0], [2.0]]), jnp.array([[3.0], [5.0]])):
      ...     x, source = cbn.run_layer(cbn.dense, kernel, z)
      ...     statistics, state = estimator.train(state, x, source)
      >>> statistics.mean, state.believed["batch"].mean
      (Array([3.], dtype=float32), Array([4.], dtype=float32))

    NaN or inf is treated by every method in its own way; it stays out of ``believed``.
    """
    check_choice("use", use, estimators)

    def init(features, params=None, groups=1):
        def full(value):
            return jnp.full(features, value, jnp.float32)

        return WatchState(
            {name: e.init(features, params, groups) for name, e in estimators.items()},
            {name: Statistics(full(0.0), full(1.0)) for name in estimators},
            Moments(full(0.0), full(0.0), full(0.0)),
        )

    def train(state, x, source=None, *, axis_name=None, mask=None):
        _check(state, x)
        trained = {
            name: e.train(state.states[name], x, source, axis_name=axis_name, mask=mask)
            for name, e in estimators.items()
        }
        believed = {
            name: _remember(state.believed[name], statistics)
            for name, (statistics, _) in trained.items()
        }
        states = {name: new for name, (_, new) in trained.items()}
        return trained[use][0], WatchState(states, believed, state.truth)

    def infer(state, x):
        _check(state, x)
        return estimators[use].infer(state.states[use], x)

    return Estimator(init, train, infer)


def reference(estimators: Mapping[str, Estimator], use: str) -> Estimator:
    """Measures the truth instead of training.

    ``train`` normalizes by what ``use`` believed in its last training call, and notes the
    moments of ``x`` as the truth; nothing else in the state changes. So one pass of the
    network in training mode, over a large batch and with the parameters of the last
    training call, measures every layer behind the same layers as in that call. With the
    parameters after their update, every error contains that update.

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

    NaN or inf in a feature stays out of the state; that feature then has no truth.
    """
    watched = watch(estimators, use)

    def train(state, x, source=None, *, axis_name=None, mask=None):
        del source
        _check(state, x)
        x = lax.stop_gradient(x)
        moments = batch_moments(x, axis_name=axis_name, mask=mask)
        usable = usable_moments(moments)
        truth = Moments(*(_where(usable, new, jnp.zeros_like(new)) for new in moments))
        return state.believed[use], state._replace(truth=truth)

    return watched._replace(train=train)


def errors(tree: Any, *, epsilon: float = 1e-5) -> dict[str, dict[str, Errors]]:
    """The errors of every method in every watched layer.

    The true standard deviation is √(variance + ε), as the methods' own: a feature that
    hardly varies is normalized by √ε, and what is small beside √ε is a small error. A
    feature that does not vary at all is left out, and so is one without a truth.

    Args:
      tree: a pytree with a ``WatchState`` per layer, such as linen's ``batch_stats``, an
        nnx module or its state, or one such state.
      epsilon: ε of the methods.

    Returns:
      Layer path ↦ method ↦ ``Errors``, the layers in the order of their names, numbers as
      numbers; NaN where no feature is left, as before the first pass with ``reference``.

    Raises:
      ValueError: no watched layer; ``epsilon`` is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> import cbn_jax as cbn
      >>> from cbn_jax import diagnostics
      >>> methods = {"batch": cbn.batch_norm()}
      >>> state = diagnostics.watch(methods, use="batch").init(1)
      >>> measure = diagnostics.reference(methods, use="batch").train
      >>> _, state = measure(state, jnp.array([[1.0], [3.0]]))
      >>> layers = diagnostics.errors({"first": {"state": state}})
      >>> round(layers["first"]["batch"].mean, 2)  # believed 0 ± 1, true 2 ± 1
      2.0
    """
    check_epsilon(epsilon)
    nodes = jax.tree.leaves_with_path(tree, is_leaf=_is_watched)
    layers = {_name(path): node for path, node in nodes if _is_watched(node)}
    if not layers:
        raise ValueError(
            "errors got a tree without a WatchState, expected the state of a model whose "
            "normalizers are watch(...); in linen that is its batch_stats."
        )
    return {
        name: {
            method: _errors(believed, layers[name].truth, epsilon)
            for method, believed in layers[name].believed.items()
        }
        for name in sorted(layers, key=_order)
    }


def draw(
    records: Sequence[tuple[int, Mapping[str, Mapping[str, Errors]]]],
    path: str | Path | None = None,
    *,
    layers: Sequence[str] | None = None,
) -> Any:
    """Draws the errors over a course of training: a column per layer, a line per method.

    Args:
      records: ``(step, errors(...))``, in the order of the steps, at least one.
      path: where to write the figure, with the ending of an image format; None for nowhere.
      layers: paths of the layers to draw; None for the first, the middle and the last.

    Returns:
      The matplotlib figure, which a notebook shows.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      ValueError: no records; a layer that is not in them.

    Example:
      >>> from cbn_jax import diagnostics
      >>> measured = {"first": {"batch": diagnostics.Errors(mean=0.7, scale=0.9)}}
      >>> figure = diagnostics.draw([(1, measured), (2, measured)])
      >>> [axes.get_title() for axes in figure.axes]
      ['first', '']
    """
    if not records:
        raise ValueError("draw got no records, expected [(step, errors(...)), ...].")
    layers = _chosen(list(records[0][1]), layers)
    with styled("cbn_jax.diagnostics.draw") as new_figure:
        figure = new_figure((1.2 + 2.6 * len(layers), 5.2))
        grid = _empty_grid(figure, layers)
        for axes, kind in zip(grid, Errors._fields, strict=True):
            for axis, layer in zip(axes, layers, strict=True):
                _plot(axis, records, layer, kind)
        lines, labels = grid[0][0].get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=len(labels))
        if path is not None:
            figure.savefig(path)
    return figure


def _check(state: WatchState, x: jax.Array) -> None:
    check_activations("watch", x)
    check_state("watch", state, WatchState, lambda s: s.truth.mean, x)


def _remember(old: Statistics, new: Statistics) -> Statistics:
    new = lax.stop_gradient(new)
    finite = jnp.isfinite(new.mean) & jnp.isfinite(new.inv_std)
    return Statistics(
        _where(finite, new.mean, old.mean), _where(finite, new.inv_std, old.inv_std)
    )


def _where(usable: jax.Array, new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(usable, new, old.astype(new.dtype)).astype(jnp.float32)


def _is_watched(node: Any) -> bool:
    return isinstance(node, WatchState)


def _name(path: Any) -> str:
    """Where the layer is: the path without what every Flax module adds to it."""
    path = jax.tree_util.keystr(path, simple=True, separator="/")
    return path.removesuffix("/value").removesuffix("/state")


def _order(name: str) -> list[tuple[str, int, str]]:
    """Norm_2 before Norm_10."""
    return [(p.rstrip("0123456789"), len(p), p) for p in name.split("/")]


def _errors(believed: Statistics, truth: Moments, epsilon: float) -> Errors:
    std = jnp.sqrt(truth.var + epsilon)
    varies = truth.var > 0

    def rms(values):
        return float(jnp.sqrt(jnp.square(values).mean(where=varies)))

    return Errors(
        mean=rms((believed.mean - truth.mean) / std),
        scale=rms(jnp.log(believed.inv_std * std)),
    )


def _chosen(names: list[str], layers: Sequence[str] | None) -> list[str]:
    """The layers to draw."""
    if layers is None:
        return list(dict.fromkeys((names[0], names[(len(names) - 1) // 2], names[-1])))
    for layer in layers:
        check_choice("layer", layer, names)
    return list(layers)


def _empty_grid(figure: Any, layers: Sequence[str]) -> Any:
    """Axes ``[2, layers]``, labelled."""
    grid = figure.subplots(2, len(layers), sharex=True, sharey="row", squeeze=False)
    for axis, layer in zip(grid[0], layers, strict=True):
        axis.set_title(layer)
    grid[0][0].set_ylabel("error of the mean\n(standard deviations)")
    grid[1][0].set_ylabel("error of the scale\n(log of the ratio)")
    for axis in grid[1]:
        axis.set_xlabel("training step")
    return grid


def _plot(axis: Any, records: Any, layer: str, kind: str) -> None:
    """One panel."""
    steps = [step for step, _ in records]
    for i, method in enumerate(records[0][1][layer]):
        values = [getattr(measured[layer][method], kind) for _, measured in records]
        # Ever narrower and sparser, so that lines which coincide all remain to be seen.
        look = {"lw": max(2.8 - 0.35 * i, 0.7), "ls": (0, (4, i)) if i else "-"}
        axis.plot(steps, values, color=COLORS[i % len(COLORS)], label=method, **look)
    axis.set_yscale("log")
