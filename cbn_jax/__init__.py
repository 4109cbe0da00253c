# SPDX-License-Identifier: Apache-2.0
"""cbn_jax: normalization for small batches, in JAX and Flax.

A method is an ``Estimator``: pure functions ``init``, ``train`` and ``infer`` that say
which statistics to believe. Three more functions do the rest::

    estimator = small_batch_norm(batch_size=2)
    state = estimator.init(features, params)
    x, source = run_layer(layer, params, inputs)
    statistics, state = estimator.train(state, x, source)
    y = normalize(x, statistics, scale, bias)

``cbn_jax.linen.Norm`` and ``cbn_jax.nnx.Norm`` do the same inside Flax models.
"""

import importlib as _importlib
from typing import Any as _Any

from ._adaptive import GateState as GateState
from ._adaptive import adaptive_batch_norm as adaptive_batch_norm
from ._adaptive import heterogeneity as heterogeneity
from ._adaptive import set_gate as set_gate
from ._batch_norm import batch_norm as batch_norm
from ._corrected import Fit as Fit
from ._corrected import FittedState as FittedState
from ._corrected import corrected_inference as corrected_inference
from ._corrected import fitted_inference as fitted_inference
from ._cross_iteration import CrossIterationState as CrossIterationState
from ._cross_iteration import cross_iteration_batch_norm as cross_iteration_batch_norm
from ._cross_iteration import epochs_to_steps as epochs_to_steps
from ._cross_iteration import ramp as ramp
from ._diminishing import Convergence as Convergence
from ._diminishing import DiminishingState as DiminishingState
from ._diminishing import diminishing_batch_norm as diminishing_batch_norm
from ._diminishing import diminishing_convergence as diminishing_convergence
from ._estimator import Estimator as Estimator
from ._fold import fold as fold
from ._group_batch import GroupNormPlusState as GroupNormPlusState
from ._group_batch import group_batch_norm as group_batch_norm
from ._group_batch import group_norm_plus as group_norm_plus
from ._layer import Layer as Layer
from ._layer import convolution as convolution
from ._layer import dense as dense
from ._moments import Moments as Moments
from ._moments import batch_moments as batch_moments
from ._moments import pool_moments as pool_moments
from ._replay import Memory as Memory
from ._replay import ReplayState as ReplayState
from ._replay import replay_batch_norm as replay_batch_norm
from ._running import RunningMoments as RunningMoments
from ._running import cumulative as cumulative
from ._running import diminishing as diminishing
from ._running import exponential as exponential
from ._running import running_moments as running_moments
from ._small_batch import small_batch_norm as small_batch_norm
from ._source import Source as Source
from ._source import run_layer as run_layer
from ._statistics import Statistics as Statistics
from ._statistics import normalize as normalize
from ._streaming import StreamingState as StreamingState
from ._streaming import streaming_batch_norm as streaming_batch_norm

__version__ = "0.1.0"

# Imported where they are first asked for: most of them need more than JAX.
_MODULES = {
    "assessment",
    "convert",
    "diagnostics",
    "landscape",
    "linen",
    "nnx",
    "optax",
    "population",
}


def __getattr__(name: str) -> _Any:
    if name in _MODULES:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
