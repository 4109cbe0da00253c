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


class Streaming:
    """``streaming_batch_norm`` in raw moments μ, ν = E[x²]: nothing central to get wrong.

    A bias is one more weight, of an input that is always one. Of the window μ, ν and their
    derivatives p, H are known at θ. At θ + Δ, with P the patches of the batch and
    Q = E[(P − p)(P − p)ᵀ] + p pᵀ for the second moment of the window's patches,

        μ' = μ + pΔ        ν' = max(ν + HΔ + ΔᵀQΔ, μ'²)        H' = H + 2QΔ

    and then all four are averaged with those of the batch, by number of values: at most as
    many batches as the weights of a group take to turn a radian.
    """

    def __init__(self, window, groups=1):
        self.keep, self.size = 1 - 1 / window, np.zeros(groups)
        self.mu = self.nu = self.p = self.H = self.theta = 0.0

    def step(self, patches, kernel, bias):
        P = np.c_[np.float64(patches), np.ones(len(patches))]
        theta = np.r_[np.float64(kernel), np.float64(bias)[None]]
        x, n = P @ theta, len(P)
        if not self.size.any():
            self.p, self.H = np.zeros(len(theta)), np.zeros_like(theta)
        delta = theta - self.theta
        Q = (P - self.p).T @ (P - self.p) / n + np.outer(self.p, self.p)
        mu = self.mu + self.p @ delta
        nu = self.nu + (self.H * delta).sum(0) + (delta * (Q @ delta)).sum(0)
        old = np.maximum(nu, mu**2), mu, self.p, self.H + 2 * Q @ delta
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
        return self.mu, self.nu - self.mu**2

    @property
    def d_var(self):
        """∂(ν − μ²)/∂θ."""
        return self.H - 2 * self.p[:, None] * self.mu


class Replay:
    """``replay_batch_norm``: moments of everything remembered, under today's weights."""

    def __init__(self, window):
        self.window, self.seen = window, []

    def step(self, patches, kernel, bias):
        self.seen = [*self.seen, np.float64(patches)][-self.window :]
        x = np.concatenate(self.seen) @ np.float64(kernel) + np.float64(bias)
        return x.mean(0), x.var(0)
