"""Every public estimator with the arguments under which the contract suite runs it."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax as cbn

ALL = 400  # samples: at least as many positions as any batch of the tests has

FACTORIES = {
    "batch_norm": functools.partial(cbn.batch_norm, momentum=0.9),
    "batch_norm-cumulative": functools.partial(cbn.batch_norm, momentum=cbn.cumulative()),
    "cross_iteration_batch_norm": functools.partial(
        cbn.cross_iteration_batch_norm, window=3, momentum=0.9
    ),
    "cross_iteration_batch_norm-from_scratch": functools.partial(
        cbn.cross_iteration_batch_norm,
        window=3,
        burn_in=cbn.ramp(3),
        guard="drop",
        gradient="window",
        running="window",
    ),
    "streaming_batch_norm": functools.partial(
        cbn.streaming_batch_norm, window=3, samples=None
    ),
    "carried_batch_norm": functools.partial(cbn.carried_batch_norm, window=3),
    "replay_batch_norm": functools.partial(
        cbn.replay_batch_norm, window=3, samples=ALL, momentum=0.9
    ),
    "diminishing_batch_norm": cbn.diminishing_batch_norm,
    "diminishing_batch_norm-all_alike": functools.partial(
        cbn.diminishing_batch_norm, cbn.diminishing(1.0)
    ),
    "group_batch_norm": functools.partial(
        cbn.group_batch_norm, 0.7, num_groups=2, momentum=0.9
    ),
    "group_norm": functools.partial(cbn.group_norm, num_groups=2),
    "group_norm_plus": functools.partial(cbn.group_norm_plus, 0.7, num_groups=2),
    "corrected_inference": lambda **kwargs: cbn.corrected_inference(
        cbn.batch_norm(**kwargs), examples=8
    ),
    "fitted_inference": lambda **kwargs: cbn.fitted_inference(cbn.batch_norm(**kwargs)),
    "adaptive_batch_norm": lambda **kwargs: cbn.adaptive_batch_norm(
        cbn.batch_norm(**kwargs)
    ),
    "small_batch_norm": functools.partial(cbn.small_batch_norm, batch_size=8),
}


@cbn.factory
def fresh(estimator) -> cbn.Estimator:
    """One with backward statistics, as in its first step."""

    def train(state, x, source=None, *, axis_name=None, mask=None):
        now = estimator.at(estimator.init_backward(jnp.shape(x)[-1]))
        return now.train(state, x, source, axis_name=axis_name, mask=mask)

    return cbn.Estimator(
        estimator.init, train, estimator.infer, estimator.epsilon, estimator.traits
    )


FACTORIES |= {
    "batch_renorm": functools.partial(cbn.batch_renorm, momentum=0.9),
    "batch_renorm-relaxed": functools.partial(
        cbn.batch_renorm, momentum=0.9, warmup_steps=0
    ),
    "momentum_batch_norm": functools.partial(cbn.momentum_batch_norm, 0.8, momentum=0.9),
    "ghost_batch_norm": functools.partial(cbn.ghost_batch_norm, 2, momentum=0.9),
    "filter_response_norm": cbn.filter_response_norm,
    "frozen": lambda **kwargs: cbn.frozen(cbn.batch_norm(**kwargs), after=100),
    "mixed_inference": lambda **kwargs: cbn.mixed_inference(
        cbn.batch_norm(**kwargs), examples=8
    ),
    "bidirectional_batch_norm": lambda **kwargs: fresh(
        cbn.bidirectional_batch_norm(window=3, **kwargs)
    ),
    "moving_average_batch_norm": lambda **kwargs: fresh(
        cbn.moving_average_batch_norm(window=3, **kwargs)
    ),
    "online_norm": lambda **kwargs: fresh(cbn.online_norm(0.9, **kwargs)),
}

# Some of the products that make sense; wrappers hand on what the method inside is given.
FACTORIES |= {
    "corrected_inference-cross_iteration": lambda **kwargs: cbn.corrected_inference(
        cbn.cross_iteration_batch_norm(window=3, running="window", **kwargs), examples=24
    ),
    "corrected_inference-diminishing_batch_norm": lambda **kwargs: cbn.corrected_inference(
        cbn.diminishing_batch_norm(cbn.diminishing(1.0), **kwargs), examples=8
    ),
    "fitted_inference-replay": lambda **kwargs: cbn.fitted_inference(
        cbn.replay_batch_norm(window=3, samples=ALL, **kwargs)
    ),
    "adaptive_batch_norm-corrected-streaming": lambda **kwargs: cbn.adaptive_batch_norm(
        cbn.corrected_inference(
            cbn.streaming_batch_norm(window=3, samples=None, **kwargs), examples=24
        )
    ),
    "adaptive_batch_norm-group": lambda **kwargs: cbn.adaptive_batch_norm(
        cbn.group_batch_norm(0.7, **{"num_groups": 2} | kwargs)
    ),
    "cross_iteration_batch_norm-diminishing_average": functools.partial(
        cbn.cross_iteration_batch_norm, window=3, momentum=cbn.diminishing(1.0)
    ),
}

# One of each public factory.
KINDS = [name for name in FACTORIES if hasattr(cbn, name)]
SAMPLING = {"small_batch_norm"}  # looks at some positions of a batch only
# See every example by itself.
GROUPS = {
    "group_batch_norm",
    "group_norm",
    "group_norm_plus",
    "adaptive_batch_norm-group",
}
# Normalize parts of a batch by themselves, in training.
PARTS = {"ghost_batch_norm", "online_norm"}
# Have a gradient that is no derivative of their output.
DESIGNED = {
    "batch_renorm-relaxed",
    "bidirectional_batch_norm",
    "moving_average_batch_norm",
    "online_norm",
}
# Divide by the root of a second moment.
UNCENTERED = {"filter_response_norm", "moving_average_batch_norm"}
PER_EXAMPLE = GROUPS | {"filter_response_norm"}
# Keep no statistics.
STATELESS = {"group_norm", "group_norm_plus", "filter_response_norm"}
# Do so in inference.
CORRECTED = {
    name
    for name in FACTORIES
    if any(word in name for word in ("corrected", "fitted", "mixed"))
}


def make(name):
    """An estimator with wide groups. Groups of two values would become signs, and their
    gradients would consist of rounding errors."""
    return FACTORIES[name](**({"num_groups": 1} if name in GROUPS else {}))


class Layer(NamedTuple):
    layer: cbn.Layer
    kernel: tuple[int, ...]
    inputs: tuple[int, ...]
    bias: bool

    @functools.partial(jax.jit, static_argnames=("self", "dtype"))
    def params(self, key, dtype=jnp.float32):
        k1, k2 = jax.random.split(key)
        params = {"kernel": 0.5 * jax.random.normal(k1, self.kernel, dtype)}
        if self.bias:
            params["bias"] = jax.random.normal(k2, self.kernel[-1:], dtype)
        return params

    @functools.partial(jax.jit, static_argnames=("self", "dtype", "examples"))
    def data(self, key, dtype=jnp.float32, examples=None):
        shape = self.inputs if examples is None else (examples, *self.inputs[1:])
        return 0.3 + jax.random.normal(key, shape, dtype)

    @property
    def fn(self):
        return self.layer.apply

    @property
    def groups(self):
        return self.layer.groups

    @property
    def features(self):
        return self.kernel[-1]


LAYERS = {
    "dense": Layer(cbn.dense, (5, 4), (8, 5), bias=True),
    "dense-no_bias": Layer(cbn.dense, (5, 4), (8, 5), bias=False),
    "conv": Layer(cbn.convolution(padding=1), (3, 3, 2, 4), (8, 5, 5, 2), bias=False),
    "conv-strided": Layer(
        cbn.convolution(2, "VALID"), (3, 3, 2, 4), (8, 7, 7, 2), bias=True
    ),
    "conv-dilated": Layer(
        cbn.convolution(padding=2, dilation=2), (3, 3, 2, 4), (8, 6, 6, 2), bias=True
    ),
    "conv-grouped": Layer(
        cbn.convolution(padding=1, groups=2), (3, 3, 2, 4), (8, 5, 5, 4), bias=True
    ),
}


def init(estimator, layer, params):
    return estimator.init(layer.features, layer.layer, params)


@jax.jit
def drift(params, key, size=0.05):
    """Weights after an imagined optimizer step."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    moved = [
        p + size * jax.random.normal(k, p.shape, p.dtype)
        for p, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def eager_train(estimator, state, layer, params, z, mask=None, axis_name=None):
    """One training call on a layer's output: (x, statistics, state)."""
    x, source = cbn.run_layer(layer.layer, params, z)
    statistics, state = estimator.train(state, x, source, axis_name=axis_name, mask=mask)
    return x, statistics, state


# Estimators and layers are values, so all tests of a process share the compiled programs.
train = jax.jit(eager_train, static_argnames=("estimator", "layer", "axis_name"))
infer = jax.jit(
    lambda estimator, state, x: estimator.infer(state, x), static_argnames="estimator"
)
normalize = jax.jit(cbn.normalize)


@functools.partial(jax.jit, static_argnames="layer")
def apply(layer, params, z):
    """The layer's output."""
    return layer.fn(params, z)


@functools.cache
def started(estimator, name):
    """A training call of a layer, one for all tests, and the state before the first."""
    layer = LAYERS[name]

    def step(state, params, z):
        return train(estimator, state, layer, params, z)

    return step, init(estimator, layer, layer.params(jax.random.key(0)))


def path(layer, key, steps, size=0.3, examples=(2,)):
    """(params, inputs) of a run with moving weights."""
    params = layer.params(key)
    for step in range(steps):
        n = examples[step % len(examples)]
        yield params, layer.data(jax.random.fold_in(key, step), examples=n)
        params = drift(params, jax.random.fold_in(key, 100 + step), size)


def variance(statistics):
    """σ² of statistics with the usual ε, in float64."""
    return 1 / np.square(np.float64(statistics.inv_std)) - 1e-5
