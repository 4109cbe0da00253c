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
    ``[N, ..., D]`` flattened over what the kernel ``[D, C]`` contracts.
    """

    def __init__(self, window, burn_in=0):
        self.window, self.burn_in = window, burn_in
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
        mus, nus = [mu], [np.maximum(nu, mu**2)]
        for old in self.past if use_past else []:
            dW, db = W - old["W"], b - old["b"]
            m = old["mu"] + (old["dmu_dW"] * dW).sum(0) + old["dmu_db"] * db
            n = old["nu"] + (old["dnu_dW"] * dW).sum(0) + old["dnu_db"] * db
            mus.append(m)
            nus.append(np.maximum(n, m**2))
        self.past = ([entry, *self.past])[: self.window - 1]
        mean, nu = np.mean(mus, 0), np.mean(nus, 0)
        return mean, nu - mean**2
