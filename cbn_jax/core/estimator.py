# SPDX-License-Identifier: Apache-2.0
"""The central type of the library: a normalization method estimates statistics."""

import dataclasses
from typing import Any, Literal, Protocol

import jax

from .devices import AxisName
from .layers import Layer, LayerFn, Params
from .source import Source
from .statistics import Statistics
from .values import Value

State = Any  # a NamedTuple of float32 arrays, one type per method
Trait = Literal["per_example", "corrected", "gated", "layered"]


class Init(Protocol):
    def __call__(
        self, features: int, layer: LayerFn | Layer | None = None, params: Params = None
    ) -> State: ...


class Train(Protocol):
    def __call__(
        self,
        state: State,
        x: jax.Array,
        source: Source | None = None,
        *,
        axis_name: AxisName = None,
        mask: jax.Array | None = None,
    ) -> tuple[Statistics, State]: ...


class Infer(Protocol):
    def __call__(
        self, state: State, x: jax.Array, *, mask: jax.Array | None = None
    ) -> Statistics: ...


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Estimator(Value):
    """A normalization method: three pure functions that estimate statistics.

    Batch normalization and related methods differ only in the mean and the scale that
    normalize. An estimator computes these two, and ``normalize`` applies them.
    ``run_layer`` records the layer that made ``x``. The Flax modules carry the state.

    ::

        state = estimator.init(features, layer, params)
        x, source = run_layer(layer, params, inputs)
        statistics, state = estimator.train(state, x, source)   # or:
        statistics = estimator.infer(state, x)
        y = normalize(x, statistics, scale, bias)

    An estimator is a value: ``repr`` is the call that makes it, equal calls make equal
    estimators with equal hashes, and it pickles. It may be a static argument of ``jit``.

    Attributes:
      init: ``(features, layer=None, params=None) -> state``. ``layer`` and ``params`` are
        the arguments of ``run_layer``; methods that look at the layer need them. ``params``
        may be abstract arrays. Every leaf of the state is a float32 array whose shape never
        changes.
      train: ``(state, x, source=None, *, axis_name=None, mask=None) -> (statistics,
        state)``. It returns the statistics for training, and the state that includes this
        batch. Gradients flow through ``statistics``, never through the state.
      infer: ``(state, x, *, mask=None) -> statistics``. It returns no state, so that
        evaluation cannot change one. ``x`` may have no examples.
      epsilon: ε, which keeps the scale finite.
      traits: properties that wrappers and tools use. "per_example": every example has its
        own statistics. "corrected": inference uses the example. "gated": a gate in the
        state may switch normalization off. "layered": the method uses the layer that made
        ``x``.
    """

    init: Init
    train: Train
    infer: Infer
    epsilon: float
    traits: frozenset[Trait] = frozenset()
