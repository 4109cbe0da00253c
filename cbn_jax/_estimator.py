# SPDX-License-Identifier: Apache-2.0
"""The one noun of the library: a normalization method is an estimator of statistics."""

from typing import Any, NamedTuple, Protocol

import jax

from ._moments import AxisName
from ._source import Source
from ._statistics import Statistics

State = Any  # a NamedTuple of float32 arrays, one type per method


class Init(Protocol):
    def __call__(self, features: int, params: Any = None, groups: int = 1) -> State: ...


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
    def __call__(self, state: State, x: jax.Array) -> Statistics: ...


class Estimator(NamedTuple):
    """A normalization method: three pure functions that say which statistics to believe.

    Batch normalization and its relatives differ only in the mean and the scale by which
    they normalize. An estimator decides those; ``normalize`` applies them, ``run_layer``
    says where ``x`` came from, and the Flax modules carry the state.

    ::

        state = estimator.init(features, params)
        x, source = run_layer(layer, params, inputs)
        statistics, state = estimator.train(state, x, source)   # or:
        statistics = estimator.infer(state, x)
        y = normalize(x, statistics, scale, bias)

    Attributes:
      init: ``(features, params=None, groups=1) -> state``. ``params`` are those of the
        layer before the normalizer and ``groups`` its feature groups, for methods that
        look at them; shapes suffice, so abstract arrays do. Every leaf of the state is a
        float32 array whose shape never changes.
      train: ``(state, x, source=None, *, axis_name=None, mask=None) -> (statistics,
        state)``. Statistics to train with, and the state that has seen this batch.
        Gradients flow through ``statistics``, never through the state.
      infer: ``(state, x) -> statistics``. It returns no state, so that evaluation cannot
        change one.
      traits: what wrappers must know about the method, such as ``"per_example"``; they
        refuse what makes no sense.
    """

    init: Init
    train: Train
    infer: Infer
    traits: frozenset[str] = frozenset()
