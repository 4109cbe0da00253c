# SPDX-License-Identifier: Apache-2.0
"""cbn_jax: normalization for small batches, in JAX and Flax.

A method is an ``Estimator``: pure functions ``init``, ``train`` and ``infer`` that estimate
the statistics to normalize with. ``run_layer`` and ``normalize`` do the rest::

    estimator = small_batch_norm(batch_size=2)
    state = estimator.init(features, layer, params)
    x, source = run_layer(layer, params, inputs)
    statistics, state = estimator.train(state, x, source)
    y = normalize(x, statistics, scale, bias)

``cbn_jax.linen.Norm`` and ``cbn_jax.nnx.Norm`` do the same inside Flax models, and
``cbn_jax.equinox.Norm`` in Equinox models.
"""

import importlib as _importlib
from typing import TYPE_CHECKING
from typing import Any as _Any

from .core.backward import BackwardStatistics, Bidirectional
from .core.batch import batch_moments
from .core.carrying import Window
from .core.estimator import Estimator
from .core.layers import Layer, convolution, dense
from .core.moments import Moments, pool_moments
from .core.running import RunningMoments, from_batch_stats
from .core.schedules import (
    Schedule,
    cumulative,
    diminishing,
    exponential,
    matched_noise,
    ramp,
    rescale_decay,
)
from .core.source import Source, run_layer
from .core.statistics import Statistics, normalize
from .core.values import factory
from .methods.batch_norm import batch_norm
from .methods.batch_renorm import batch_renorm
from .methods.bidirectional import BidirectionalState, bidirectional_batch_norm
from .methods.carried import CarriedState, carried_batch_norm
from .methods.cross_iteration import CrossIterationState, cross_iteration_batch_norm
from .methods.diminishing import DiminishingState, diminishing_batch_norm
from .methods.evonorm import evonorm_b0, evonorm_s0
from .methods.filter_response import filter_response_norm
from .methods.ghost import ghost_batch_norm
from .methods.group_batch import group_batch_norm
from .methods.group_norm import group_norm
from .methods.group_norm_plus import group_norm_plus
from .methods.momentum import MomentumState, momentum_batch_norm
from .methods.moving_average import MovingAverageState, moving_average_batch_norm
from .methods.online import OnlineState, online_norm
from .methods.replay import ReplayState, replay_batch_norm
from .methods.small_batch import small_batch_norm
from .methods.streaming import StreamingState, streaming_batch_norm
from .tools.fold import fold
from .tools.kernels import center, standardize
from .wrappers.adaptive import GateState, adaptive_batch_norm, heterogeneity, set_gate
from .wrappers.corrected import corrected_inference
from .wrappers.fitted import FittedState, fitted_inference
from .wrappers.frozen import FrozenState, frozen
from .wrappers.learned import Learned, learned
from .wrappers.mixed import mixed_inference

if TYPE_CHECKING:
    from . import assessment as assessment
    from . import convert as convert
    from . import diagnostics as diagnostics
    from . import equinox as equinox
    from . import figures as figures
    from . import linen as linen
    from . import nnx as nnx
    from . import optax as optax
    from . import population as population

__version__ = "0.1.0"

# These modules are imported at their first use, because most of them need more than JAX.
_MODULES = [
    "assessment",
    "convert",
    "diagnostics",
    "equinox",
    "figures",
    "linen",
    "nnx",
    "optax",
    "population",
]

__all__ = [
    "BackwardStatistics",
    "Bidirectional",
    "BidirectionalState",
    "CarriedState",
    "CrossIterationState",
    "DiminishingState",
    "Estimator",
    "FittedState",
    "FrozenState",
    "GateState",
    "Layer",
    "Learned",
    "Moments",
    "MomentumState",
    "MovingAverageState",
    "OnlineState",
    "ReplayState",
    "RunningMoments",
    "Schedule",
    "Source",
    "Statistics",
    "StreamingState",
    "Window",
    "adaptive_batch_norm",
    "batch_moments",
    "batch_norm",
    "batch_renorm",
    "bidirectional_batch_norm",
    "carried_batch_norm",
    "center",
    "convolution",
    "corrected_inference",
    "cross_iteration_batch_norm",
    "cumulative",
    "dense",
    "diminishing",
    "diminishing_batch_norm",
    "evonorm_b0",
    "evonorm_s0",
    "exponential",
    "factory",
    "filter_response_norm",
    "fitted_inference",
    "fold",
    "from_batch_stats",
    "frozen",
    "ghost_batch_norm",
    "group_batch_norm",
    "group_norm",
    "group_norm_plus",
    "heterogeneity",
    "learned",
    "matched_noise",
    "mixed_inference",
    "momentum_batch_norm",
    "moving_average_batch_norm",
    "normalize",
    "online_norm",
    "pool_moments",
    "ramp",
    "replay_batch_norm",
    "rescale_decay",
    "run_layer",
    "set_gate",
    "small_batch_norm",
    "standardize",
    "streaming_batch_norm",
]


def __getattr__(name: str) -> _Any:
    if name in _MODULES:
        return _importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES, "__version__"])
