"""Input that people bring: one Hypothesis strategy for activations and masks."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

FEATURES = ("normal", "constant", "spike", "far", "tiny", "huge", "two values", "zero")
MASKS = (
    "all",
    "some",
    "padding",
    "an example without a value",
    "one value",
    "nothing",
    "the same for all examples",
)
FEATURE_MASKS = ("a feature without a value", "a feature with one value", "any")
JUNK = (0.0, 1e3, float("inf"), float("nan"))
LAYOUTS = ("plain", "transposed", "broadcast")


class Batch(NamedTuple):
    """Activations ``[N, T, C]`` in float64, and which of them count."""

    x: np.ndarray
    mask: np.ndarray
    junk: float


def feature(kind, rng, shape, place, largest):
    """One feature. A spike goes to the flat index ``place``."""
    noise = rng.normal(size=shape)
    if kind == "constant":
        return np.full(shape, 3.0)
    if kind == "zero":
        return np.zeros(shape)
    if kind == "spike":
        noise = 0.01 * noise
        noise.flat[place] = 100.0
    if kind == "far":
        noise = min(1e4, largest / 16) + noise
    if kind == "tiny":
        noise = 1e-4 * noise if largest < 1e5 else 1e-12 * noise
    if kind == "huge":
        noise = min(1e12, largest / 64) * noise
    if kind == "two values":
        noise = np.sign(noise)
    return noise


def mask_of(kind, rng, shape, place):
    n, t, _ = shape
    mask = np.ones(shape, bool)
    if kind == "some":
        mask &= rng.random((n, t, 1)) < 0.6
    if kind == "padding":
        mask &= np.arange(t)[:, None] < rng.integers(0, t + 1, (n, 1, 1))
    if kind == "an example without a value":
        mask[place % n] = False
    if kind == "one value":
        mask[:] = False
        mask.reshape(n * t, -1)[place] = True
    if kind == "nothing":
        mask[:] = False
    if kind == "the same for all examples":
        mask &= rng.random((1, t, 1)) < 0.6
    if kind == "a feature without a value":
        mask[..., place % shape[-1]] = False
    if kind == "a feature with one value":
        mask[..., 0] = False
        mask.reshape(n * t, -1)[place, 0] = True
    if kind == "any":
        mask &= rng.random(shape) < 0.5
    return mask


@st.composite
def batches(draw, shape=(4, 6, 4), count=3, per_feature=False, dtype=np.float32):
    """Several batches, the features of each kind of their own."""
    largest = float(np.finfo(dtype).max) if dtype == np.float16 else 1e12
    n, t, c = shape
    seed = draw(st.integers(0, 2**31))
    kinds = draw(st.lists(st.sampled_from(FEATURES), min_size=c, max_size=c))
    masks = MASKS + FEATURE_MASKS * per_feature
    # Where programs look first: the beginning, the middle, the end.
    places = st.sampled_from([0, n * t // 2, n * t - 1, t // 2])
    made = []
    for i in range(count):
        rng, place = np.random.default_rng([seed, i]), draw(places)
        x = [feature(kind, rng, (n, t), place, largest) for kind in kinds]
        x = arranged(np.stack(x, -1), draw(st.sampled_from(LAYOUTS)))
        mask = mask_of(draw(st.sampled_from(masks)), rng, shape, place)
        made.append(Batch(x, mask, draw(st.sampled_from(JUNK))))
    return made


def arranged(x, layout):
    """The same shape in another layout of memory."""
    if layout == "transposed":
        return np.ascontiguousarray(x.T).T
    if layout == "broadcast":
        return np.broadcast_to(x[:1], x.shape)
    return x
