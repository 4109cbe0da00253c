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
# Batch norm gives every feature mean 0 and deviation 1 *within the batch*. With 32 examples
# that is about what the data say. With two, it is not: this notebook shows what is left of
# a feature, how far the batch's statistics are from the truth, and what it costs. Then it
# takes statistics from the last iterations as well, which is what this library is about.

# %%
import importlib.util
import subprocess
import sys

# Where the library is not installed yet; the address may also be the path of a wheel.
REQUIREMENT = "cbn_jax[benchmarks] @ git+https://github.com/cbn-jax/cbn_jax"
if importlib.util.find_spec("cbn_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", REQUIREMENT], check=True)

import jax

print(f"JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}")

# %%
import flax.linen as nn
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

import cbn_jax
from cbn_jax import diagnostics, figures
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
# Take the mean from two values, divide by their standard deviation: what remains is
# -1 and +1, whatever the values were. A layer that is followed by batch norm at batch size
# 2 tells the next one *which of two examples had more of a feature*, and nothing else
# (0, if both had the same). In inference the same layer answers with running averages, and
# the next one sees something that it has never been trained on.
#
# Below, one dense layer with fixed random weights. Filled: what training puts out. Line:
# what inference puts out, after many batches.

# %%
kernel = jax.random.normal(jax.random.key(0), (64, 32)) / 8


def normalized(estimator, batch_size):
    """All digits, in batches: normalized as in training, and as in inference after it."""

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
# The fourth panel is batch size 2 as well. `small_batch_norm` takes its statistics from
# about the last 32 examples, whatever the batch size, and training and inference agree.
#
# ## Statistics that follow the weights
#
# Older batches were seen by older weights. A cross-iteration method moves their statistics
# to today's weights before it uses them: the published one by a Taylor term
# (Yao et al., 2021), the recommended one by moving one running window in every step.
#
# How close are they? We train a small MLP at batch size 2 and watch three methods on the
# same activations. The truth for a layer is what all of 512 images say under the same
# weights.


# %%
class MLP(nn.Module):
    """Three dense layers; `norm` runs a layer and normalizes what it puts out."""

    norm: object

    @nn.compact
    def __call__(self, images, train):
        z = images
        for _ in range(3):
            z = nn.relu(self.norm(nn.Dense(128), train)(z))
        return nn.Dense(10)(z)


def norm(estimator):
    """Any method of the library, behind a layer."""
    return lambda layer, train: Norm(estimator, layer, use_running_average=not train)


def loss_fn(params, batch_stats, model, rows):
    variables = {"params": params, "batch_stats": batch_stats}
    images, labels = train_images[rows], train_labels[rows]
    logits, updates = model.apply(variables, images, True, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updates.get("batch_stats", {})


def trainer(model, batch_size):
    """The functions that begin and do a training step; rates grow with the batch."""
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
    """Row numbers ``[steps, batch_size]``, every epoch in an order of its own."""
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


state, records, seen = init(jax.random.key(0)), [], []
for number, rows in enumerate(tqdm(batches(2, seed=0)[:600])):
    before = state[0]
    state = step(state, rows)
    measured = measure(before, state[1])["batch_stats"]
    layer = measured[LAYER]
    seen.append(
        [1 / layer["truth"]["inv_std"][FEATURE]]
        + [1 / layer["estimated"][name]["inv_std"][FEATURE] for name in methods]
    )
    if number % 10 == 9:
        records.append((number + 1, diagnostics.errors(measured)))

# %%
truth, *estimated = np.array(seen).T
figure, axis = plt.subplots(figsize=(8, 3.2))
axis.plot(estimated[0], ".", color="C6", ms=3, label="batch_norm")
axis.plot(estimated[1], color="C1", label="cross_iteration_batch_norm")
axis.plot(estimated[2], color="C2", label="small_batch_norm")
axis.plot(truth, color="black", label="truth: 512 images")
axis.set(xlabel="training step", ylabel="standard deviation", yscale="log")
axis.set_title(f"one feature as each method estimates it ({LAYER}, feature {FEATURE})")
figure.legend(loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# The same for all features, layer by layer. `cbn_jax.diagnostics` does this in any model:
# wrap the methods in `watch`, measure with `reference`; `cbn_jax.figures` draws it.

# %%
figure = figures.draw_errors(records)
figure

# %% [markdown]
# ## What it costs, and what it gives back
#
# Five ways to normalize the same MLP, with the batch size behind the name: the same number
# of images seen, the same initial weights, rates in proportion to the batch size.
# `cross_iteration_batch_norm` is the method as published.


# %%
def evaluate(model, state):
    variables = {"params": state[0], "batch_stats": state[1]}
    logits = model.apply(variables, test_images, False)
    return (logits.argmax(-1) == test_labels).mean()


def learning_curve(model, batch_size):
    """Images seen, and test accuracies ``[points, SEEDS]``; all seeds train at once."""
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
figure, axis = plt.subplots(figsize=(7, 3.8))
for name, (seen, accuracy) in curves.items():
    color, style = runs[name][2:]
    axis.plot(seen, accuracy.mean(1), style, color=color, label=name)
    axis.fill_between(seen, accuracy.min(1), accuracy.max(1), color=color, alpha=0.15, lw=0)
axis.set(xlabel="training images seen", ylabel="test accuracy, %", ylim=(0, 100))
axis.set_title(f"mean and range of {SEEDS} seeds")
axis.legend(loc="lower right")
plt.show()

for name, (_, accuracy) in curves.items():
    print(f"{name:32} {accuracy[-1].mean():5.1f} ± {accuracy[-1].std():.1f} %")

# %% [markdown]
# At batch size 2, batch norm hardly trains this network: it gets signs. With
# statistics from the last iterations the same two examples per step are enough.
#
# Where next: *Swap one line in a Flax ResNet* puts the method into your model; *Choosing a
# method* compares all of them on your data.
