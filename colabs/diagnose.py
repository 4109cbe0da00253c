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
# # Is batch norm your problem?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cbn-jax/cbn_jax/blob/main/colabs/diagnose.ipynb)
#
# A network trains badly with small batches. Is batch norm the cause? This notebook measures
# the statistics of every batch norm of a model, and compares them with those of a large
# batch. A few lines do this for any Flax model.

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
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from tqdm import tqdm

from cbn_jax import diagnostics
from cbn_jax.linen import replace_batch_norm

plt.style.use("cbn_jax.figures")

# %% tags=["parameters"]
EPOCHS = 2
EXAMPLES = 1437  # images for training; the other 360 are for testing

# %% [markdown]
# The data are scikit-learn's handwritten digits, 8 by 8 pixels. The model has two
# convolutions and a dense layer, and a batch norm after each.

# %%
digits, labels = load_digits(return_X_y=True)
digits, labels = np.float32(digits / 16).reshape(-1, 8, 8, 1), np.int32(labels)
train_images, train_labels = digits[:EXAMPLES], labels[:EXAMPLES]
test_images, test_labels = digits[-360:], labels[-360:]


class CNN(nn.Module):
    """Two convolutions and a dense layer, in ordinary Flax."""

    @nn.compact
    def __call__(self, images, train):
        def active(z, name):
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=name)
            return nn.relu(norm(z))

        z = active(nn.Conv(16, (3, 3))(images), "after_conv_1")
        z = active(nn.Conv(32, (3, 3), 2)(z), "after_conv_2")
        z = active(nn.Dense(64)(z.reshape(len(z), -1)), "after_dense")
        return nn.Dense(10)(z)


# %% [markdown]
# ## Three situations
#
# Each situation is a way to form batches. For your model, take batches as your training
# forms them.


# %%
def independent(size, rng, labels=train_labels, epochs=EPOCHS):
    """Rows of every step, in random order."""
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(epochs)])
    return order[: len(order) - len(order) % size].reshape(-1, size)


def alike(rng, labels=train_labels, epochs=EPOCHS):
    """Rows of every step, two images of one class."""
    pairs = []
    for label in np.tile(np.arange(10), epochs):
        own = rng.permutation(np.flatnonzero(labels == label))
        pairs.append(own[: len(own) // 2 * 2].reshape(-1, 2))
    return rng.permutation(np.concatenate(pairs))


SITUATIONS = {
    "32 independent images": independent(32, np.random.default_rng(0)),
    "2 independent images": independent(2, np.random.default_rng(0)),
    "2 images of one class": alike(np.random.default_rng(0)),
}

# %% [markdown]
# ## Which statistics are wrong?
#
# `watch` runs two methods side by side on the same activations. The model trains with the
# first, batch norm. `reference` computes the statistics of a large batch under the same
# weights, and `errors` compares the two. Your own training loop needs no more than this
# cell.


# %%
def watched(batch_size):
    """The model for training, and the model for measuring."""
    methods = {
        "batch_norm": cbn_jax.batch_norm(momentum=0.9),
        "small_batch_norm": cbn_jax.small_batch_norm(batch_size),
    }
    return (
        replace_batch_norm(CNN(), diagnostics.watch(methods, use="batch_norm")),
        replace_batch_norm(CNN(), diagnostics.reference(methods, use="batch_norm")),
    )


def measure(probe, variables):
    """The errors of each method in each layer, against all training images."""
    _, measured = probe.apply(variables, train_images, True, mutable=["batch_stats"])
    return diagnostics.errors(measured["batch_stats"])


# %% [markdown]
# An ordinary training loop. At 20 steps it measures the errors, with the statistics of the
# step and the parameters before their update.


# %%
def fit(model, order, probe=None):
    """Trains by SGD with momentum; variables, and errors at 20 steps of the second half."""
    rates = optax.cosine_decay_schedule(0.1 * order.shape[1] / 32, len(order))
    optimizer = optax.sgd(rates, momentum=0.9)

    @jax.jit
    def step(params, stats, opt_state, images, labels):
        def loss_fn(params):
            given = {"params": params, "batch_stats": stats}
            logits, new = model.apply(given, images, True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), new["batch_stats"]

        gradients, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    init = jax.jit(model.init, static_argnums=2)
    variables = init(jax.random.key(0), train_images[order[0]], True)
    params, stats = variables["params"], variables["batch_stats"]
    opt_state, found = optimizer.init(params), []
    marks = set(np.linspace(len(order) // 2, len(order) - 1, 20).astype(int))
    for number, rows in enumerate(tqdm(order)):
        given = stats, opt_state, train_images[rows], train_labels[rows]
        before, (params, stats, opt_state) = params, step(params, *given)
        if probe is not None and number in marks:
            found.append(measure(probe, {"params": before, "batch_stats": stats}))
    return {"params": params, "batch_stats": stats}, found


# %%
found, trained = {}, {}
for situation, order in SITUATIONS.items():
    model, probe = watched(order.shape[1])
    variables, found[situation] = fit(model, order, probe)
    trained[situation, "batch_norm"] = model, variables


def error(situation, layer, method):
    """The median over the measured steps, in standard deviations of the feature."""
    return np.median([each[layer][method].mean for each in found[situation]])


# %%
LAYERS = ("after_conv_1", "after_conv_2", "after_dense")
figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), sharey=True)
places = np.arange(len(LAYERS))
for axis, situation in zip(axes, SITUATIONS, strict=True):
    for shift, method, color in (
        (-0.18, "batch_norm", "C0"),
        (0.18, "small_batch_norm", "C2"),
    ):
        heights = [error(situation, layer, method) for layer in LAYERS]
        axis.bar(places + shift, heights, 0.34, color=color, label=method)
    axis.axhline(np.sqrt(1 / 32), color="black", lw=1, ls="--", label="√(1/32)")
    axis.set_xticks(places, [layer.removeprefix("after_") for layer in LAYERS])
    axis.set_title(situation)
axes[0].set_ylabel("error of the mean, deviations")
figure.suptitle("Only the norm after the dense layer is wrong, and only with two images")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

for situation in SITUATIONS:
    for layer in LAYERS:
        pair = [error(situation, layer, m) for m in ("batch_norm", "small_batch_norm")]
        print(f"{situation:22} {layer:13} {pair[0]:.2f}  {pair[1]:.2f}")

# %% [markdown]
# ## Read the result
#
# The columns are the errors of batch norm and of small_batch_norm. The dashed line,
# √(1/32), is the error of the mean of 32 independent values. Batch norm trains well with
# this error. If a bar is not above the line, batch norm is no problem in that layer.
#
# - After the convolutions, every bar is below the line. Each position of an image counts as
#   a value there, so two images are many values. Keep batch norm.
# - After the dense layer, two images are two values. The bars of batch norm exceed the
#   line. With two images of one class they are higher: the mean of such a batch is that of
#   the class.
# - `small_batch_norm` also uses the images of the last steps, so its bars are close to the
#   line. If its bar is high too, the weights of that layer change fast. Lower the rate.
#
# So only one norm of this model needs another method. `replace_batch_norm` replaces all
# three. That does no harm here: with two images, `small_batch_norm` has the lower error in
# every layer.
#
# ## Training or inference?
#
# Batch norm uses the statistics of the batch in training, and running averages in
# inference. Either can be wrong. Compare the accuracies with `train=True` and with
# `train=False` on the same batches of test images, formed as in training.


# %%
def accuracies(model, variables, rows):
    """Over test batches, with `train=True` and with `train=False`."""

    @jax.jit
    def correct(images, labels):
        logits = [
            model.apply(variables, images, train, mutable=["batch_stats"])[0]
            for train in (True, False)
        ]
        return jnp.array([jnp.mean(each.argmax(-1) == labels) for each in logits])

    found = [correct(test_images[each], test_labels[each]) for each in rows]
    return 100 * np.mean(found, 0)


model = replace_batch_norm(CNN(), cbn_jax.small_batch_norm(batch_size=2))
situation = "2 images of one class"
trained[situation, "small_batch_norm"] = model, fit(model, SITUATIONS[situation])[0]


def test_rows(situation):
    """Batches of test images, formed as in training."""
    rng = np.random.default_rng(1)
    if situation == "2 images of one class":
        return alike(rng, test_labels, 1)
    size = SITUATIONS[situation].shape[1]
    return independent(size, rng, test_labels, 1)


for (situation, method), (model, variables) in trained.items():
    training, inference = accuracies(model, variables, test_rows(situation))
    print(f"{situation:22} {method:17} {training:5.1f} %  {inference:5.1f} %")

# %% [markdown]
# The columns are the accuracies with `train=True` and with `train=False`. Read a row as
# follows:
#
# - If both are high, there is no problem.
# - If both are low, the network learned little, because the statistics in training were
#   wrong. Two images with batch norm are this case. Better averages for inference do not
#   help.
# - If only inference is low, the running averages are wrong, or each batch gives the
#   network information about its content. The second happens if the images of a batch are
#   alike. See [batches that are
#   alike](https://github.com/cbn-jax/cbn_jax/blob/main/docs/how_to/correlated_batches.md).
#
# With the same pairs of one class, `small_batch_norm` trains the network.
#
# Your model: [is batch norm your
# problem?](https://github.com/cbn-jax/cbn_jax/blob/main/docs/how_to/is_batch_norm_the_problem.md)
# has the lines to copy. [How to
# choose](https://github.com/cbn-jax/cbn_jax/blob/main/docs/choose.md) names the method to
# take.
