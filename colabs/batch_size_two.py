# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What goes wrong at batch size 2
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cbn-jax/cbn_jax/blob/main/colabs/batch_size_two.ipynb)
#
# Batch norm gives every feature mean 0 and standard deviation 1 *within the batch*. With 32
# examples, the statistics of the batch are close to those of the data. With two examples
# they are not. This notebook shows which information a feature loses, how large the errors
# of the statistics are, and how much accuracy they cost. It then adds the statistics of the
# last iterations, as this library does.

# %% cellView="form" tags=["hide-input"]
# @title Install cbn_jax if it is missing; print the devices and the versions
import importlib.metadata
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

# The path of a wheel works too: "./cbn_jax-0.1.0-py3-none-any.whl[benchmarks]".
REQUIREMENT = "cbn_jax[benchmarks] @ git+https://github.com/cbn-jax/cbn_jax"
if importlib.util.find_spec("cbn_jax") is None:
    # An installed JAX stays: pip's own choice may not support the accelerator. If the
    # installed JAX is older than cbn_jax needs, pip stops with an error.
    kept = [name for name in ("jax", "jaxlib") if importlib.util.find_spec(name)]
    pins = [f"{name}=={importlib.metadata.version(name)}\n" for name in kept]
    constraints = Path(tempfile.mkdtemp()) / "constraints.txt"
    constraints.write_text("".join(pins))
    pip = [sys.executable, "-m", "pip", "install", "-q", "-c", str(constraints)]
    subprocess.run([*pip, REQUIREMENT], check=True)

import flax
import jax

import cbn_jax

print(f"{jax.device_count()} x {jax.devices()[0].device_kind}")
print(f"JAX {jax.__version__}, Flax {flax.__version__}, cbn_jax {cbn_jax.__version__}")
if jax.default_backend() == "cpu":
    print("Warning: JAX found only a CPU. Every cell runs, but more slowly.")

# %%
import flax.linen as nn
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

from cbn_jax import diagnostics
from cbn_jax.linen import Norm

plt.style.use("cbn_jax.figures")

# %% tags=["parameters"]
EPOCHS = 4
SEEDS = 3
EXAMPLES = 1437  # images for training; the other 360 are for testing

# %% [markdown]
# The data are scikit-learn's handwritten digits, 8 by 8 pixels.

# %%
digits, labels = load_digits(return_X_y=True)
digits, labels = jnp.float32(digits / 16), jnp.int32(labels)
train_images, train_labels = digits[:EXAMPLES], labels[:EXAMPLES]
test_images, test_labels = digits[-360:], labels[-360:]

# %% [markdown]
# ## Two values are always ±1
#
# Subtract the mean of two values and divide by their standard deviation. The results are
# -1 and +1 for any two different values, and 0 for two equal values. Batch norm at batch
# size 2 therefore passes on only *which of the two examples had the larger value*.
# Inference uses running averages instead, so the next layer gets inputs unlike those in
# training.
#
# The figure shows the outputs of one dense layer with fixed random weights. The filled area
# is the output in training. The line is the output in inference, after many batches.

# %%
kernel = jax.random.normal(jax.random.key(0), (64, 32)) / 8


def normalized(estimator, batch_size):
    """All digits in batches: the outputs in training, and the outputs in inference."""

    def step(state, z):
        x, source = cbn_jax.run_layer(cbn_jax.dense, kernel, z)
        statistics, state = estimator.train(state, x, source)
        return state, cbn_jax.normalize(x, statistics)

    steps = len(train_images) // batch_size
    batches = train_images[: steps * batch_size].reshape(steps, batch_size, 64)
    state, training = jax.lax.scan(step, estimator.init(32, cbn_jax.dense, kernel), batches)
    x = train_images @ kernel
    inference = cbn_jax.normalize(x, estimator.infer(state, x))
    return training[steps // 4 :].ravel(), inference.ravel()


panels = {
    "batch_norm, 32 examples": (cbn_jax.batch_norm(), 32),
    "batch_norm, 8": (cbn_jax.batch_norm(), 8),
    "batch_norm, 2": (cbn_jax.batch_norm(), 2),
    "small_batch_norm, 2": (cbn_jax.small_batch_norm(batch_size=2), 2),
}
figure, axes = plt.subplots(1, 4, figsize=(10, 2.8), sharex=True)
bins = np.linspace(-3, 3, 61)
for axis, (title, (estimator, size)) in zip(axes, panels.items(), strict=True):
    training, inference = normalized(estimator, size)
    axis.hist(training, bins, density=True, color="C1", label="training")
    axis.hist(inference, bins, density=True, color="C0", histtype="step", label="inference")
    axis.set(title=title, xlabel="normalized activation")
axes[0].set_ylabel("density")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# The fourth panel has batch size 2 too. `small_batch_norm` takes its statistics from about
# the last 32 examples, for every batch size. Training and inference then agree.
#
# ## Statistics that follow the weights
#
# The statistics of older batches belong to older weights. A cross-iteration method corrects
# them for the change of the weights before it uses them. The published method
# `cross_iteration_batch_norm` (Yao et al., 2021) corrects each older batch by a first-order
# Taylor term. This library recommends `small_batch_norm`, which keeps one running window
# and corrects it in every step.
#
# How accurate are the estimates? We train a small MLP at batch size 2 and compare three
# methods on the same activations. The true statistics of a layer are those of 512 images
# under the same weights.


# %%
class MLP(nn.Module):
    """Three dense layers; `norm` runs a layer and normalizes its output."""

    norm: object

    @nn.compact
    def __call__(self, images, train):
        z = images
        for _ in range(3):
            z = nn.relu(self.norm(nn.Dense(128), train)(z))
        return nn.Dense(10)(z)


def norm(estimator):
    """A method of the library after a layer."""
    return lambda layer, train: Norm(estimator, layer, use_running_average=not train)


# %% cellView="form" tags=["hide-input"]
# @title The training step and the batches
def loss_fn(params, batch_stats, model, rows):
    variables = {"params": params, "batch_stats": batch_stats}
    images, labels = train_images[rows], train_labels[rows]
    logits, updates = model.apply(variables, images, True, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updates.get("batch_stats", {})


def trainer(model, batch_size):
    """`init` and `step` of the training; the rate is proportional to the batch size."""
    steps = EPOCHS * (EXAMPLES // batch_size)
    rate = optax.cosine_decay_schedule(0.1 * batch_size / 32, steps)
    optimizer = optax.sgd(rate, momentum=0.9)

    def init(key):
        variables = model.init(key, train_images[:2], False)
        params = variables["params"]
        return params, variables.get("batch_stats", {}), optimizer.init(params)

    def step(state, rows):
        params, batch_stats, opt_state = state
        gradients, batch_stats = jax.grad(loss_fn, has_aux=True)(
            params, batch_stats, model, rows
        )
        updates, opt_state = optimizer.update(gradients, opt_state)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    return init, step


def batches(batch_size, seed):
    """Row numbers ``[steps, batch_size]``; the order changes in every epoch."""
    rng = np.random.default_rng(seed)
    steps = EXAMPLES // batch_size
    orders = [rng.permutation(EXAMPLES)[: steps * batch_size] for _ in range(EPOCHS)]
    return np.concatenate(orders).reshape(-1, batch_size)


# %%
methods = {
    "batch_norm": cbn_jax.batch_norm(),
    "cross_iteration_batch_norm": cbn_jax.cross_iteration_batch_norm(window=16),
    "small_batch_norm": cbn_jax.small_batch_norm(batch_size=2),
}
model = MLP(norm(diagnostics.watch(methods, use="small_batch_norm")))
probe = MLP(norm(diagnostics.reference(methods, use="small_batch_norm")))
LAYER, FEATURE = "Norm_1", 7

init, step = trainer(model, batch_size=2)
step = jax.jit(step)


@jax.jit
def measure(params, batch_stats):
    variables = {"params": params, "batch_stats": batch_stats}
    return probe.apply(variables, train_images[:512], True, mutable=["batch_stats"])[1]


state, deviations = init(jax.random.key(0)), []
for rows in tqdm(batches(2, seed=0)[:600]):
    before = state[0]
    state = step(state, rows)
    layer = measure(before, state[1])["batch_stats"][LAYER]
    found = [layer["truth"], *(layer["estimated"][name] for name in methods)]
    deviations.append([1 / statistics["inv_std"][FEATURE] for statistics in found])

# %%
truth, *estimated = np.array(deviations).T
figure, axis = plt.subplots(figsize=(8, 3.2))
axis.plot(estimated[0], ".", color="C6", ms=3, label="batch_norm")
axis.plot(estimated[1], color="C1", label="cross_iteration_batch_norm")
axis.plot(estimated[2], color="C2", label="small_batch_norm")
axis.plot(truth, color="black", label="true: 512 images")
axis.set(xlabel="training step", ylabel="standard deviation", yscale="log")
axis.set_title(f"standard deviation of one feature ({LAYER}, feature {FEATURE})")
figure.legend(loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# The estimates of `batch_norm` vary by orders of magnitude, and most of them are too small.
# The other two methods stay near the true value. `cbn_jax.diagnostics` measures this in any
# model: [Is batch norm the
# problem?](https://github.com/cbn-jax/cbn_jax/blob/main/docs/how_to/is_batch_norm_the_problem.md)
#
# ## Accuracy
#
# We train the same MLP with five normalizers; the number after the name is the batch size.
# All runs use the same number of images and the same initial weights. The rate is
# proportional to the batch size.


# %% cellView="form" tags=["hide-input"]
# @title The learning curves
def evaluate(model, state):
    variables = {"params": state[0], "batch_stats": state[1]}
    logits = model.apply(variables, test_images, False)
    return (logits.argmax(-1) == test_labels).mean()


def learning_curve(model, batch_size):
    """Numbers of images, and test accuracies ``[points, SEEDS]``; seeds train together."""
    init, step = trainer(model, batch_size)
    state = jax.vmap(init)(jax.random.split(jax.random.key(1), SEEDS))
    step = jax.jit(jax.vmap(step))
    accuracy = jax.jit(jax.vmap(lambda state: evaluate(model, state)))
    rows = np.stack([batches(batch_size, seed) for seed in range(SEEDS)], axis=1)
    seen, curve = [], []
    for number, chosen in enumerate(rows, 1):
        state = step(state, chosen)
        if number % max(1, len(rows) // 24) == 0:
            seen.append(number * batch_size)
            curve.append(accuracy(state))
    return seen, 100 * np.array(curve)


# %%
published = cbn_jax.cross_iteration_batch_norm(window=8)
runs = {
    "batch_norm, 32 examples": (norm(cbn_jax.batch_norm()), 32, "C6", "--"),
    "small_batch_norm, 2": (norm(cbn_jax.small_batch_norm(batch_size=2)), 2, "C2", "-"),
    "cross_iteration_batch_norm, 2": (norm(published), 2, "C1", "-"),
    "group_norm, 2": (norm(cbn_jax.group_norm(num_groups=8)), 2, "C3", "-."),
    "batch_norm, 2": (norm(cbn_jax.batch_norm()), 2, "C0", ":"),
}
curves = {
    name: learning_curve(MLP(make), size) for name, (make, size, _, _) in tqdm(runs.items())
}

# %%
figure, axis = plt.subplots(figsize=(7, 4.2))
for name, (seen, accuracy) in curves.items():
    color, style = runs[name][2:]
    axis.plot(seen, accuracy.mean(1), style, color=color, label=name)
    axis.fill_between(seen, accuracy.min(1), accuracy.max(1), color=color, alpha=0.15, lw=0)
axis.set(xlabel="training images", ylabel="test accuracy, %", ylim=(0, 100))
axis.set_title(f"mean and range of {SEEDS} seeds")
figure.legend(loc="outside lower center", ncols=2)
plt.show()

for name, (_, accuracy) in curves.items():
    print(f"{name:32} {accuracy[-1].mean():5.1f} ± {accuracy[-1].std():.1f} %")

# %% [markdown]
# In the run shown, `batch_norm` at batch size 2 ends far below `batch_norm` with 32
# examples. `small_batch_norm` with two examples ends about equal to it. `group_norm` needs
# no statistics of a batch, and ends a few points lower. So does
# `cross_iteration_batch_norm`, which also needs more images to get there.
#
# Next: *Swap one line in a Flax ResNet* changes the method in a convolutional network.
# *Choosing a method* compares all methods on your data.
