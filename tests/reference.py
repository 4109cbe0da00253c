"""Float64 NumPy, written from the papers' equations; imports nothing of the library.

A linear layer maps input patches P to ``x = P θ + bias``: for a dense layer the patches
are its inputs, for a convolution they are cut out by hand.
"""

import itertools

import numpy as np


def conv_patches(z, size, stride=1, padding=0, dilation=1):
    """Patches of an ``[N, H, W, I]`` image, ``[N, H', W', size, size, I]``."""
    z = np.pad(np.float64(z), ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)))
    reach = dilation * (size - 1) + 1
    rows = range(0, z.shape[1] - reach + 1, stride)
    columns = range(0, z.shape[2] - reach + 1, stride)
    out = np.zeros((z.shape[0], len(rows), len(columns), size, size, z.shape[3]))
    for (i, r), (j, c) in itertools.product(enumerate(rows), enumerate(columns)):
        out[:, i, j] = z[:, r : r + reach : dilation, c : c + reach : dilation]
    return out


def batch_norm(x, scale=1.0, bias=0.0, epsilon=1e-5):
    """Ioffe & Szegedy, algorithm 1."""
    x = np.float64(x)
    axes = tuple(range(x.ndim - 1))
    return scale * (x - x.mean(axes)) / np.sqrt(x.var(axes) + epsilon) + bias


def exponential_weights(steps, momentum):
    """Weights of batches 1 … m in a debiased exponential average."""
    raw = np.array([momentum ** (steps - s) for s in range(1, steps + 1)])
    return raw / raw.sum()


class CrossIteration:
    """Yao et al., equations for μ̄, ν̄ and the inference average, in the raw (μ, ν) form.

    ``step(patches, kernel, bias)`` returns (mean, variance) of the window. Patches are
    ``[N, ..., D]`` flattened over what the kernel ``[D, C]`` contracts. With ``drop`` a
    negative variance does not count, instead of counting as zero.
    """

    def __init__(self, window, burn_in=0, rho=1.0, drop=False):
        self.window, self.burn_in, self.rho, self.drop = window, burn_in, rho, drop
        self.past, self.means, self.variances = [], [], []

    def step(self, patches, kernel, bias):
        P = np.float64(patches).reshape(-1, kernel.shape[0])
        W, b = np.float64(kernel), np.float64(bias)
        x = P @ W + b
        mu, nu = x.mean(0), (x**2).mean(0)
        self.means.append(mu)
        self.variances.append(x.var(0))
        entry = {
            "mu": mu,
            "nu": nu,
            "dmu_dW": np.repeat(P.mean(0)[:, None], W.shape[1], axis=1),
            "dmu_db": np.ones_like(b),
            "dnu_dW": 2 * P.T @ x / len(P),
            "dnu_db": 2 * mu,
            "W": W,
            "b": b,
        }
        use_past = len(self.means) > self.burn_in
        mus, nus, counts = [mu], [np.maximum(nu, mu**2)], [np.ones_like(mu)]
        for old in self.past if use_past else []:
            dW, db = self.rho * (W - old["W"]), self.rho * (b - old["b"])
            m = old["mu"] + (old["dmu_dW"] * dW).sum(0) + old["dmu_db"] * db
            n = old["nu"] + (old["dnu_dW"] * dW).sum(0) + old["dnu_db"] * db
            mus.append(m)
            nus.append(np.maximum(n, m**2))
            counts.append(np.where(n < m**2, 1.0 - self.drop, 1.0))
        self.past = ([entry, *self.past])[: self.window - 1]
        mean, nu = np.average(mus, 0, counts), np.average(nus, 0, counts)
        return mean, nu - mean**2


# Stride, padding, dilation and groups of ``cases.LAYERS``, whose kernels are 3 wide.
GEOMETRY = {
    "conv": (1, 1, 1, 1),
    "conv-strided": (2, 0, 1, 1),
    "conv-dilated": (1, 2, 2, 1),
    "conv-grouped": (1, 1, 1, 2),
}


def layer_patches(name, z):
    """What a layer of ``cases.LAYERS`` sees: ``[n, D]``, groups side by side."""
    if z.ndim == 2:
        return np.float64(z)
    *options, groups = GEOMETRY[name]
    each = np.split(conv_patches(z, 3, *options), groups, axis=-1)
    return np.concatenate([p.reshape(-1, np.prod(p.shape[3:])) for p in each], axis=1)


def layer_kernel(kernel, groups):
    """The kernel for these patches: ``[D, C]``, block diagonal where there are groups."""
    each = np.split(np.float64(kernel), groups, axis=-1)
    each = [k.reshape(-1, k.shape[-1]) for k in each]
    return np.block(
        [
            [k if i == j else np.zeros_like(k) for j in range(groups)]
            for i, k in enumerate(each)
        ]
    )


class Averages:
    """The averages for inference of a method with a window: exponential, debiased.

    They move with the window, and they become the window's moments where these contradict
    them by more than three standard errors of the mean or of the variance, the latter as a
    share of the geometric mean of both.
    """

    def __init__(self, momentum):
        self.momentum, self.steps = momentum, 0
        self.mean = self.var = 0.0

    def step(self, mean, var, values, shift=0.0, ratio=1.0):
        self.steps += 1
        if self.steps > 1:
            self.mean, self.var = self.mean + shift, self.var * ratio
            old, new = self.var + 1e-5, var + 1e-5
            errors = (mean - self.mean) ** 2 / new, (old - new) ** 2 / (2 * old * new)
            far = (values >= 8) & (np.maximum(*errors) * values > 9)
            self.mean = np.where(far, mean, self.mean)
            self.var = np.where(far, var, self.var)
        alpha = (1 - self.momentum) / (1 - self.momentum**self.steps)
        self.mean = self.mean + alpha * (mean - self.mean)
        self.var = self.var + alpha * (var - self.var)
        return self.mean, self.var


class Streaming:
    """``streaming_batch_norm`` in raw moments μ, ν = E[x²]: nothing central to get wrong.

    A bias is one more weight, of an input that is always one. Of the window μ, ν and their
    derivatives p, H are known at θ. At θ + Δ, with Z eight patches of past batches and
    Q = E[(Z − p)(Z − p)ᵀ] + p pᵀ for the second moment of the window's patches,

        μ' = μ + pΔ        ν' = max(ν + HΔ + ΔᵀQΔ, μ'²)        H' = H + 2QΔ

    and then all four are averaged with those of the batch, by number of values: at most as
    many batches as the weights of a group take to turn a radian.

    The first batch gives all of Z, its first patches again and again; from then on every
    batch gives one.
    """

    def __init__(self, window, groups=1):
        self.keep, self.size = 1 - 1 / window, np.zeros(groups)
        self.mu = self.nu = self.p = self.H = self.theta = 0.0
        self.steps, self.Z = 0, None

    def step(self, patches, kernel, bias):
        P = np.c_[np.float64(patches), np.ones(len(patches))]
        theta = np.r_[np.float64(kernel), np.float64(bias)[None]]
        x, n = P @ theta, len(P)
        if not self.size.any():
            self.p, self.H = np.zeros(len(theta)), np.zeros_like(theta)
        delta = theta - self.theta
        Z = np.zeros((8, len(theta))) if self.Z is None else self.Z
        Q = (Z - self.p).T @ (Z - self.p) / 8 + np.outer(self.p, self.p)
        mu = self.mu + self.p @ delta
        nu = self.nu + (self.H * delta).sum(0) + (delta * (Q @ delta)).sum(0)
        old = np.maximum(nu, mu**2), mu, self.p, self.H + 2 * Q @ delta
        before, after = self.nu - self.mu**2, old[0] - mu**2
        self.shift = mu - self.mu  # of the window, and the growth of its variance
        both = (before > 1e-9) & (after > 1e-9)
        self.ratio = np.where(both, after / np.where(both, before, 1), 1)
        new = (x**2).mean(0), x.mean(0), P.mean(0), 2 * P.T @ x / n
        spread = (delta * ((Q - np.outer(self.p, self.p)) @ delta)).sum(0)
        var = old[0] - mu**2
        turn = np.divide(spread, var, where=var > 0, out=spread.copy())
        turn = np.minimum(turn, 1).reshape(len(self.size), -1).mean(1) ** 0.5
        self.size = np.minimum(self.keep * self.size, n / np.maximum(turn, 1e-99)) + n
        a = np.repeat(n / self.size, x.shape[1] // len(self.size))
        rows = np.repeat(n / self.size, (len(theta) - 1) // len(self.size))
        shares = a, a, np.r_[rows, n / self.size[:1]], a
        self.nu, self.mu, self.p, self.H = (
            (1 - s) * o + s * b for s, o, b in zip(shares, old, new, strict=True)
        )
        self.theta = theta
        rows = P[np.arange(8) % n]
        if self.Z is None:
            self.Z = rows
        else:
            self.Z[self.steps % 8] = rows[self.steps % 8]
        self.steps += (self.size > 1).all()
        return self.mu, self.nu - self.mu**2

    @property
    def d_var(self):
        """∂(ν − μ²)/∂θ."""
        return self.H - 2 * self.p[:, None] * self.mu


class Carried:
    """``carried_batch_norm``: all past patches have the mean p and the spread of a ball.

    So the mean of the past is pθ, and its variance grows with |θ|², bias left out.
    """

    def __init__(self, window, groups=1):
        self.keep, self.size = 1 - 1 / window, np.zeros(groups)
        self.mean = self.var = self.square = self.p = 0.0

    def step(self, patches, kernel, bias):
        P = np.c_[np.float64(patches), np.ones(len(patches))]
        theta = np.r_[np.float64(kernel), np.float64(bias)[None]]
        x, n, square = P @ theta, len(P), (np.float64(kernel) ** 2).sum(0)
        first = not self.size.any()
        if first:
            self.p = np.zeros(len(theta))
        past = self.p @ theta
        self.shift = past - self.mean
        self.ratio = np.ones_like(square) if first else square / self.square
        var = self.var * self.ratio
        self.size = self.keep * self.size + n
        a = np.repeat(n / self.size, x.shape[1] // len(self.size))
        self.mean = (1 - a) * past + a * x.mean(0)
        each = var + (past - self.mean) ** 2, x.var(0) + (x.mean(0) - self.mean) ** 2
        self.var = (1 - a) * each[0] + a * each[1]
        rows = np.repeat(n / self.size, (len(theta) - 1) // len(self.size))
        rows = np.r_[rows, n / self.size[:1]]
        self.p = (1 - rows) * self.p + rows * P.mean(0)
        self.square = square
        return self.mean, self.var


class Replay:
    """``replay_batch_norm``: moments of everything remembered, under today's weights."""

    def __init__(self, window):
        self.window, self.seen = window, []

    def step(self, patches, kernel, bias):
        self.seen = [*self.seen, np.float64(patches)][-self.window :]
        x = np.concatenate(self.seen) @ np.float64(kernel) + np.float64(bias)
        return x.mean(0), x.var(0)


class Diminishing:
    """Ma & Klabjan, algorithm 1, on mini-batches: the average λ = (μ, σ), from (0, 1).

    ``alpha(m)`` is the weight of batch m = 1, 2, …; ``step(x)`` returns the λ by which the
    layer normalizes, the one before or the one after this batch.
    """

    def __init__(self, alpha, order="updated"):
        self.alpha, self.order = alpha, order
        self.m, self.mu, self.sigma = 0, 0.0, 1.0

    def step(self, x):
        x = np.float64(x).reshape(-1, np.shape(x)[-1])
        before = self.mu + np.zeros(x.shape[1]), self.sigma + np.zeros(x.shape[1])
        self.m += 1
        alpha, mu = self.alpha(self.m), x.mean(0)
        sigma = np.sqrt(np.mean((x - mu) ** 2, axis=0))
        self.mu = alpha * mu + (1 - alpha) * before[0]
        self.sigma = alpha * sigma + (1 - alpha) * before[1]
        return before if self.order == "previous" else (self.mu, self.sigma)

    def normalize(self, x, epsilon=1e-5):
        mu, sigma = self.step(x)
        return (np.float64(x) - mu) / (sigma + epsilon)


def by_groups(x, num_groups):
    """``[N, positions, G, C/G]``."""
    return x.reshape(len(x), -1, num_groups, x.shape[-1] // num_groups)


def group_and_batch(x, mix, order, group, batch):
    """Gunawan et al.: two normalizers, one after the other or side by side, and a mix."""
    if order == "group_first":
        grouped = group(x)
        return mix * grouped + (1 - mix) * batch(grouped)
    if order == "batch_first":
        batched = batch(x)
        return mix * group(batched) + (1 - mix) * batched
    return mix * group(x) + (1 - mix) * batch(x)


class GroupBatch:
    """``group_batch_norm``, on arrays; NaN if no value counts."""

    def __init__(self, num_groups, order, momentum=0.99, epsilon=1e-5):
        self.num_groups, self.order = num_groups, order
        self.momentum, self.epsilon = momentum, epsilon
        self.seen = []

    def train(self, x, mix):
        def batch(x):
            axes = tuple(range(x.ndim - 1))
            mean, var = np.nanmean(x, axes), np.nanvar(x, axes)
            self.seen.append((mean, var))
            return (x - mean) / np.sqrt(var + self.epsilon)

        return group_and_batch(np.float64(x), mix, self.order, self.group, batch)

    def infer(self, x, mix):
        def batch(x):
            weights = exponential_weights(len(self.seen), self.momentum)
            mean, var = np.tensordot(weights, self.seen, 1)
            return (x - mean) / np.sqrt(var + self.epsilon)

        return group_and_batch(np.float64(x), mix, self.order, self.group, batch)

    def group(self, x):
        each = by_groups(np.float64(x), self.num_groups)
        mean = np.nanmean(each, (1, 3), keepdims=True)
        var = np.nanvar(each, (1, 3), keepdims=True)
        return ((each - mean) / np.sqrt(var + self.epsilon)).reshape(x.shape)


def group_norm_plus(x, mix, num_groups, order, epsilon=1e-5):
    """The layer as published: by n − 1, ε outside the root, B over the examples alone."""

    def group(x):
        each = by_groups(x, num_groups)
        mean = np.nanmean(each, (1, 3), keepdims=True)
        std = np.nanstd(each, (1, 3), ddof=1, keepdims=True)
        return ((each - mean) / (std + epsilon)).reshape(x.shape)

    def batch(x):
        return (x - np.nanmean(x, 0)) / (np.nanstd(x, 0, ddof=1) + epsilon)

    return group_and_batch(np.float64(x), mix, order, group, batch)


def corrected_moments(mean, var, x, batch_size):
    """Mean and variance of an example's training statistics, ``[N, C]``, from its own."""
    x = np.float64(x).reshape(len(x), -1, x.shape[-1])
    own, m = x.mean(1), batch_size
    between = (m - 1) / m**2 * (own - mean) ** 2
    return mean + (own - mean) / m, (1 - 1 / m) * var + x.var(1) / m + between


def conditional_moments(population, batch_size):
    """The same by counting: all batches with replacement, ``population`` [K, P, C].

    Returns (mean, variance) of a batch averaged over all batches that contain example i at
    a given place, ``[K, C]`` each.
    """
    population = np.float64(population)
    K = len(population)
    others = np.array(list(itertools.product(range(K), repeat=batch_size - 1)), int)
    means, variances = [], []
    for i in range(K):
        batches = population[np.c_[np.full(len(others), i), others]]  # [B, m, P, C]
        means.append(batches.mean((1, 2)).mean(0))
        variances.append(batches.var((1, 2)).mean(0))
    return np.array(means), np.array(variances)


def regression(batches, mean, var, epsilon=1e-5):
    """Least squares of training statistics on the moments of each example, per feature.

    Batches ``[N, ..., C]`` of one size. Returns the slope ``[C]``, clipped to [0, 1], and
    three coefficients ``[3, C]``, clipped at 0, in units of the running variance + ε.
    """
    rows, targets, slopes = [], [], []
    for x in batches:
        x = np.float64(x).reshape(len(x), -1, x.shape[-1])
        scale = var + epsilon
        d, t = x.mean(1) - mean, x.mean((0, 1)) - mean
        ratio = (x.var((0, 1)) + epsilon) / scale
        rows.append(np.stack([np.ones_like(d), x.var(1) / scale, d**2 / scale], axis=1))
        targets.append(np.broadcast_to(ratio, d.shape))
        slopes.append(((d * t).sum(0), (d * d).sum(0)))
    rows, targets = np.concatenate(rows), np.concatenate(targets)
    product, square = np.sum(slopes, axis=0)
    coefficients = [
        np.linalg.lstsq(rows[..., c], targets[:, c], rcond=None)[0]
        for c in range(rows.shape[-1])
    ]
    return np.clip(product / square, 0, 1), np.maximum(coefficients, 0).T


def heterogeneity(x, measure):
    """Spread of a batch, by its three measures."""
    x = np.float64(x)
    if measure == "entries":
        return x.std()
    return x.std(tuple(range(x.ndim - 1)) if measure == "channels" else 0).mean()


def batch_renorm(x, mean, var, r_max, d_max, epsilon=1e-5):
    """Ioffe 2017, algorithm 1, with limits, for running averages (mean, var)."""
    axes = tuple(range(x.ndim - 1))
    sigma, past = np.sqrt(x.var(axes) + epsilon), np.sqrt(var + epsilon)
    r = np.clip(sigma / past, 1 / r_max, r_max)
    d = np.clip((x.mean(axes) - mean) / past, -d_max, d_max)
    return (x - x.mean(axes)) / sigma * r + d


def batch_renorm_gradient(x, g, mean, var, r_max, epsilon=1e-5):
    """∂L/∂x for ∂L/∂y = g: batch norm's, times r."""
    axes = tuple(range(x.ndim - 1))
    sigma, past = np.sqrt(x.var(axes) + epsilon), np.sqrt(var + epsilon)
    r = np.clip(sigma / past, 1 / r_max, r_max)
    z = (x - x.mean(axes)) / sigma
    return r / sigma * (g - g.mean(axes) - z * (g * z).mean(axes))


class Momentum:
    """Yong et al. 2020; ``decay(t)`` is λ of step t = 1, 2, …"""

    def __init__(self, decay):
        self.decay, self.t, self.mean, self.var = decay, 0, 0.0, 1.0

    def step(self, x, epsilon=1e-5):
        self.t += 1
        axes = tuple(range(x.ndim - 1))
        lam = self.decay(self.t)
        self.mean = lam * self.mean + (1 - lam) * x.mean(axes)
        self.var = lam * self.var + (1 - lam) * x.var(axes)
        return (x - self.mean) / np.sqrt(self.var + epsilon)


def momentum_decay(t, batch_size, steps, like=32):
    """λ of Yong et al. 2020."""
    rho = min(batch_size / like, 1) ** (1 / steps)
    return rho ** (steps / (steps - 1) * max(steps - t, 0)) - rho**steps


def filter_response(x, epsilon=1e-6):
    """Singh & Krishnan 2020, equations 1 and 2, without scale and bias."""
    axes = tuple(range(1, x.ndim - 1))
    return x / np.sqrt((x**2).mean(axes, keepdims=True) + epsilon)


class Bidirectional:
    """Exponential windows of the statistics of both passes."""

    def __init__(self, window, epsilon=1e-5):
        self.keep, self.epsilon = 1 - 1 / window, epsilon
        self.batches, self.q = [], []

    def weights(self, count):
        raw = self.keep ** np.arange(count)[::-1]
        return raw / raw.sum()

    def forward(self, x):
        axes = tuple(range(x.ndim - 1))
        self.batches.append((x.mean(axes), (x**2).mean(axes)))
        w = self.weights(len(self.batches))
        mean, square = (
            np.tensordot(w, np.stack(m), 1) for m in zip(*self.batches, strict=True)
        )
        self.std = np.sqrt(square - mean**2 + self.epsilon)
        self.z = (x - mean) / self.std
        return self.z

    def backward(self, g):
        axes = tuple(range(g.ndim - 1))
        self.q.append((g.mean(axes), (g * self.z).mean(axes)))
        w = self.weights(len(self.q))
        q1, q2 = (np.tensordot(w, np.stack(m), 1) for m in zip(*self.q, strict=True))
        return (g - q1 - self.z * q2) / self.std


class MovingAverage:
    """Yan et al. 2020, as in the authors' layer, with a debiased running average."""

    def __init__(self, window, warmup, limit, limit_steps, momentum, epsilon=1e-5):
        self.m, self.warmup, self.limit, self.limit_steps = (
            window,
            warmup,
            limit,
            limit_steps,
        )
        self.momentum, self.epsilon = momentum, epsilon
        self.squares, self.used, self.gz, self.running = [], [], [], 1.0

    def windowed(self, values):
        t = len(values)
        if t <= self.m or t < self.warmup:
            return values[-1]
        return np.mean(values[-self.m :], axis=0)

    def forward(self, x):
        axes = tuple(range(x.ndim - 1))
        self.squares.append((x * x).mean(axes))
        var = self.windowed(self.squares)
        most = (
            1.0 if len(self.squares) <= max(self.limit_steps, self.warmup) else self.limit
        )
        self.std = np.sqrt(var + self.epsilon)
        self.r = np.clip(self.std / np.sqrt(self.running + self.epsilon), 1 / most, most)
        self.z = x / self.std
        self.used.append(var)
        weights = exponential_weights(len(self.used), self.momentum)
        self.running = np.tensordot(weights, np.stack(self.used), 1)
        return self.r * self.z

    def backward(self, grad_output):
        axes = tuple(range(grad_output.ndim - 1))
        g = grad_output * self.r
        self.gz.append((g * self.z).mean(axes))
        return (g - self.z * self.windowed(self.gz)) / self.std


class Online:
    """Chiley et al. 2019, equations 8 to 10, an example at a time; x is ``[N, T, C]``."""

    def __init__(self, features, forward, backward, epsilon=1e-5):
        self.a, self.b, self.epsilon = forward, backward, epsilon
        self.mean, self.var = np.zeros(features), np.ones(features)
        self.u, self.v = np.zeros(features), np.zeros(features)

    def forward(self, x):
        self.y, self.scale = np.zeros_like(x), np.zeros((len(x), x.shape[-1]))
        for t, each in enumerate(x):
            self.scale[t] = np.sqrt(self.var + self.epsilon)
            self.y[t] = (each - self.mean) / self.scale[t]
            offset = each.mean(0) - self.mean
            spread = self.a * (1 - self.a) * offset**2
            self.var = self.a * self.var + (1 - self.a) * each.var(0) + spread
            self.mean = self.a * self.mean + (1 - self.a) * each.mean(0)
        return self.y

    def backward(self, grad_output):
        result = np.zeros_like(grad_output)
        for t, g in enumerate(grad_output):
            h = g - (1 - self.b) * self.v * self.y[t]
            self.v = self.v + (h * self.y[t]).mean(0)
            result[t] = h / self.scale[t] - (1 - self.b) * self.u
            self.u = self.u + result[t].mean(0)
        return result


def evonorm_s0(x, v, num_groups, epsilon=1e-5):
    """Liu et al. 2020, table 1: x σ(v x) over the deviation of a group."""
    split = x.reshape(len(x), -1, num_groups, x.shape[-1] // num_groups)
    std = np.sqrt(split.var((1, 3), keepdims=True) + epsilon)
    return ((split / std).reshape(x.shape)) / (1 + np.exp(-v * x))


def evonorm_b0(x, v, epsilon=1e-3):
    """Liu et al. 2020, table 1, in training."""
    axes = tuple(range(x.ndim - 1))
    of_batch = np.sqrt(x.var(axes) + epsilon)
    own = np.sqrt(x.var(axes[1:], keepdims=True) + epsilon)
    return x / np.maximum(of_batch, v * x + own)


def center(kernel):
    """Yan et al. 2020: kernels without their mean."""
    return kernel - kernel.mean(tuple(range(kernel.ndim - 1)))


def standardize(kernel, epsilon=1e-10):
    """Qiao et al. 2019: mean 0 and variance 1 over a filter's inputs."""
    axes = tuple(range(kernel.ndim - 1))
    return (kernel - kernel.mean(axes)) / np.sqrt(kernel.var(axes) + epsilon)
