"""Every method in float64 NumPy while the weights stand still.

A window is then a weighted union of batches, whatever the method does about moving weights;
``reference.py`` has the oracles for that. Here are masks, counts and wrappers. Activations
are ``[N, T, C]``, masks the same, True where a value counts. Nothing of ours is imported.
"""

import numpy as np

EPSILON = 1e-5
AXES = (0, 1)


class Moments:
    """Mean, biased variance and number of values of each feature."""

    def __init__(self, mean, var, size):
        self.mean, self.var, self.size = mean, var, np.float64(size)

    def where(self, known, other):
        mean = np.where(known, self.mean, other.mean)
        return Moments(mean, np.where(known, self.var, other.var), self.size)


def moments(x, mask, axes=AXES):
    """Over ``axes``, which stay with size 1; 0 where nothing counts."""
    size = mask.sum(axes, keepdims=True)
    least = np.maximum(size, 1)
    mean = np.where(mask, x, 0.0).sum(axes, keepdims=True) / least
    square = np.where(mask, (np.where(mask, x, mean) - mean) ** 2, 0.0)
    return Moments(mean, square.sum(axes, keepdims=True) / least, size)


def union(parts, weights):
    """Moments of several batches together, each value with the weight of its batch."""
    sizes = [part.size * weight for part, weight in zip(parts, weights, strict=True)]
    total = np.sum(sizes, axis=0)
    shares = [size / np.where(total > 0, total, 1.0) for size in sizes]
    mean = sum(s * part.mean for s, part in zip(shares, parts, strict=True))
    square = [part.var + (part.mean - mean) ** 2 for part in parts]
    var = sum(s * each for s, each in zip(shares, square, strict=True))
    return Moments(mean, var, total)


def affine(x, mean, scale):
    return (x - mean) * scale


class Running:
    """An average of moments; a step without two values leaves it as it is."""

    def __init__(self, features, momentum):
        self.mean, self.var = np.zeros((1, 1, features)), np.ones((1, 1, features))
        self.steps, self.momentum = np.zeros((1, 1, features)), momentum

    def add(self, seen, taken):
        self.steps = self.steps + taken
        m, decay = np.maximum(self.steps, 1), self.momentum
        alpha = 1 / m if decay is None else (1 - decay) / (1 - decay**m)
        self.mean = self.mean + np.where(taken, alpha * (seen.mean - self.mean), 0.0)
        self.var = self.var + np.where(taken, alpha * (seen.var - self.var), 0.0)

    def restart(self, window, positions):
        """Where the window contradicts the averages, they become its moments."""
        values = window.size / positions**0.5
        old, new = self.var + EPSILON, window.var + EPSILON
        far = (window.mean - self.mean) ** 2 * values > 9 * new
        far |= (new - old) ** 2 * values > 18 * new * old
        far &= (values >= 8) & (window.var > 0)
        self.mean = np.where(far, window.mean, self.mean)
        self.var = np.where(far, window.var, self.var)


class Batch:
    """``batch_norm``, and with a ``window`` its relatives: the weights of past batches."""

    def __init__(self, features, momentum=0.9, window=lambda ages: ages == 0, of="batch"):
        self.running = Running(features, momentum)
        self.window, self.of, self.seen = window, of, []

    def used(self, x, mask):
        """Moments to normalize by, and what the average is given."""
        batch = moments(x, mask)
        self.seen.append(batch)
        pooled = union(self.seen, self.window(np.arange(len(self.seen))[::-1]))
        seen = batch if self.of == "batch" else pooled
        if self.of == "window":
            self.running.restart(pooled, x.shape[1])
        self.running.add(seen, (seen.size > 1) & (batch.size > 0))
        return pooled

    def train(self, x, mask):
        before = Moments(self.running.mean, self.running.var, 0)
        used = self.used(x, mask)
        used = used.where(used.size > 1, before)
        return self.normalized(x, used)

    def infer(self, x, mask):
        return self.normalized(x, self.running)

    @staticmethod
    def normalized(x, used):
        scale = (used.var + EPSILON) ** -0.5
        return affine(x, used.mean, scale), scale + 0 * x


class Streaming(Batch):
    """An exponential window: a batch without a value does not make it older."""

    def __init__(self, features, window, momentum=0.99):
        super().__init__(features, momentum, of="window")
        self.keep, self.state = 1 - 1 / window, None

    def used(self, x, mask):
        batch = moments(x, mask)
        self.seen.append(batch)
        past = self.state or batch
        pooled = union([batch, past], [1.0, self.keep if self.state else 0.0])
        if batch.size.any():
            self.state = pooled
        taken = (pooled.size > 1) & (batch.size > 0)
        self.running.restart(pooled, x.shape[1])
        self.running.add(pooled, taken)
        return pooled


class Corrected(Batch):
    """Inference as in training with ``examples`` others."""

    examples = 8

    def infer(self, x, mask):
        own, running = moments(x, mask, (1,)), self.running
        share = np.where(own.size > 0, 1 / self.examples, 0.0)
        offset = own.mean - running.mean
        var = (1 - share) * running.var + share * own.var
        var = var + share * (1 - share) * offset**2
        mean = running.mean + share * offset
        return self.normalized(x, Moments(mean, var, own.size))


class Mixed(Batch):
    """Inference by the training statistics and the batch's own."""

    def infer(self, x, mask):
        own, running = moments(x, mask), self.running
        share = np.where(own.size > 0, len(x) / (len(x) + 8), 0.0)
        mean = (1 - share) * running.mean + share * own.mean
        var = (1 - share) * running.var + share * own.var
        return self.normalized(x, Moments(mean, var, own.size))


class Diminishing:
    """One average of means and of standard deviations."""

    def __init__(self, features, alpha=lambda m: 0.25):
        self.mean, self.std = np.zeros((1, 1, features)), np.ones((1, 1, features))
        self.steps, self.alpha = np.zeros((1, 1, features)), alpha

    def train(self, x, mask):
        batch = moments(x, mask)
        known = batch.size > 1
        self.steps = self.steps + known
        alpha = np.where(known, self.alpha(np.maximum(self.steps, 1)), 0.0)
        self.mean = (1 - alpha) * self.mean + alpha * batch.mean
        self.std = (1 - alpha) * self.std + alpha * np.sqrt(batch.var)
        return self.infer(x, mask)

    def infer(self, x, mask):
        scale = 1 / (self.std + EPSILON)
        return affine(x, self.mean, scale), scale + 0 * x


class Momentum(Batch):
    """An average of moments, mixed with the batch's."""

    def __init__(self, features, decay=0.8, momentum=0.9):
        super().__init__(features, momentum)
        self.average = Running(features, decay)

    def used(self, x, mask):
        batch = moments(x, mask)
        self.average.add(batch, batch.size > 1)
        self.running.add(batch, batch.size > 1)
        return Moments(self.average.mean, self.average.var, batch.size)


class Ghost(Batch):
    """Two examples at a time."""

    def train(self, x, mask):
        before = Moments(self.running.mean, self.running.var, 0)
        parts = [moments(x[i : i + 2], mask[i : i + 2]) for i in range(0, len(x), 2)]
        known = [part.size > 1 for part in parts]
        count = np.maximum(sum(known), 1)
        mean = sum(k * p.mean for k, p in zip(known, parts, strict=True)) / count
        var = sum(k * p.var for k, p in zip(known, parts, strict=True)) / count
        self.running.add(Moments(mean, var, 0), sum(known) > 0)
        each = [part.where(part.size > 1, before) for part in parts]
        mean, var = (
            np.repeat(np.concatenate(v), 2, 0)
            for v in ([e.mean for e in each], [e.var for e in each])
        )
        return self.normalized(x, Moments(mean, var, 0))


class FilterResponse:
    """Each feature of each example by its mean square."""

    def train(self, x, mask):
        own = moments(x, mask, (1,))
        scale = np.where(own.size > 0, (own.var + own.mean**2 + 1e-6) ** -0.5, 1.0)
        return affine(x, 0.0, scale), scale + 0 * x

    infer = train


class MovingAverage:
    """Second moments, while neither the window nor the limit is in use."""

    def __init__(self, features, momentum=0.98):
        self.running = Running(features, momentum)

    def train(self, x, mask):
        batch = moments(x, mask)
        square, known = batch.var + batch.mean**2, batch.size > 0
        used = np.where(known, square, self.running.var)
        self.running.add(Moments(0 * square, square, 0), known)
        return self.by(x, used)

    def infer(self, x, mask):
        return self.by(x, self.running.var)

    @staticmethod
    def by(x, square):
        scale = (square + EPSILON) ** -0.5
        return affine(x, 0.0, scale), scale + 0 * x


class Online:
    """One example after the other."""

    def __init__(self, features, decay=0.9):
        self.mean, self.var, self.a = (
            np.zeros((1, 1, features)),
            np.ones((1, 1, features)),
            decay,
        )

    def train(self, x, mask):
        outputs = []
        for i in range(len(x)):
            outputs.append(self.infer(x[i : i + 1], mask))
            own = moments(x[i : i + 1], mask[i : i + 1])
            offset, known = own.mean - self.mean, own.size > 0
            var = self.a * self.var + (1 - self.a) * (own.var + self.a * offset**2)
            self.var = np.where(known, var, self.var)
            self.mean = np.where(known, self.mean + (1 - self.a) * offset, self.mean)
        return tuple(map(np.concatenate, zip(*outputs, strict=True)))

    def infer(self, x, mask):
        scale = (self.var + EPSILON) ** -0.5
        return affine(x, self.mean, scale), scale + 0 * x


def by_groups(x, groups):
    return x.reshape(*x.shape[:2], groups, -1)


class Group:
    """Group norm, with ``batch`` the normalizer that sees its output, in shares."""

    def __init__(self, features, groups=2, mix=1.0, plus=False):
        self.groups, self.mix, self.plus = groups, mix, plus
        self.running = Running(features, 0.9)

    def scale(self, used):
        if not self.plus:
            return (used.var + EPSILON) ** -0.5
        unbiased = used.var * used.size / np.maximum(used.size - 1, 1)
        return 1 / (np.sqrt(unbiased) + EPSILON)

    def group(self, x, mask):
        own = moments(by_groups(x, self.groups), by_groups(mask, self.groups), (1, 3))
        known = own.size > 1
        mean, scale = np.where(known, own.mean, 0.0), np.where(known, self.scale(own), 1.0)
        size = x.shape[-1] // self.groups
        mean, scale = (np.repeat(v[..., 0], size, -1) for v in (mean, scale))
        return affine(x, mean, scale), scale + 0 * x

    def mixed(self, grouped, gain, used, known):
        scale = self.scale(used)
        mix = np.where(known, self.mix, 1.0)
        y = mix * grouped + (1 - mix) * affine(grouped, used.mean, scale)
        return y, gain * (mix + (1 - mix) * scale)

    def train(self, x, mask):
        grouped, gain = self.group(x, mask)
        if self.plus:
            used = moments(grouped, mask, (0,))
            return self.mixed(grouped, gain, used, used.size > 1)
        before = Moments(self.running.mean, self.running.var, 0)
        batch = moments(grouped, mask)
        known = (batch.size > 1) | (self.running.steps > 0)
        used = batch.where(batch.size > 1, before)
        self.running.add(batch, batch.size > 1)
        return self.mixed(grouped, gain, used, known)

    def infer(self, x, mask):
        if self.plus:
            return self.train(x, mask)
        grouped, gain = self.group(x, mask)
        return self.mixed(grouped, gain, self.running, self.running.steps > 0)


def last(window):
    """The weights of a window of so many batches."""
    return lambda ages: np.float64(ages < window)


ORACLES = {
    "batch_norm": Batch,
    "cross_iteration_batch_norm": lambda c: Batch(c, window=last(3)),
    "streaming_batch_norm": lambda c: Streaming(c, 3),
    "carried_batch_norm": lambda c: Streaming(c, 3),
    "replay_batch_norm": lambda c: Batch(c, window=last(3), of="window"),
    "diminishing_batch_norm": Diminishing,
    "group_batch_norm": lambda c: Group(c, mix=0.7),
    "group_norm": Group,
    "group_norm_plus": lambda c: Group(c, mix=0.7, plus=True),
    "corrected_inference": lambda c: Corrected(c, momentum=0.99),
    "adaptive_batch_norm": lambda c: Batch(c, momentum=0.99),
    "small_batch_norm": lambda c: Streaming(c, 4),
    "batch_renorm": Batch,
    "frozen": lambda c: Batch(c, momentum=0.99),
    "mixed_inference": lambda c: Mixed(c, momentum=0.99),
    "momentum_batch_norm": Momentum,
    "ghost_batch_norm": Ghost,
    "filter_response_norm": lambda c: FilterResponse(),
    "bidirectional_batch_norm": lambda c: Streaming(c, 3),
    "moving_average_batch_norm": MovingAverage,
    "online_norm": Online,
    # Its inference is a regression, which test_corrected.py checks.
    "fitted_inference": lambda c: Batch(c, momentum=0.99),
}
