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
# # Fine-tune a trained network with two images a step
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cbn-jax/cbn_jax/blob/main/colabs/fine_tuning.ipynb)
#
# A network was trained with batch norm and 32 images a step. You want to fine-tune it on
# new pictures, but the memory suffices for only two images. Which norm works best? This
# notebook does not change the code of the model. It replaces the batch norms of a finished
# model and keeps the trained parameters and statistics.

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
import orbax.checkpoint as ocp
from flax import linen as nn
from sklearn.datasets import load_digits
from tqdm import tqdm

from cbn_jax.linen import from_batch_norm, replace_batch_norm, report

plt.style.use("cbn_jax.figures")

# %% tags=["parameters"]
EPOCHS = 6
SEEDS = 3
EXAMPLES = 1437  # images for training; the other 360 are for testing

# %% [markdown]
# The data are scikit-learn's handwritten digits, 8 by 8 pixels. The new pictures are the
# same digits inverted, with half the contrast.

# %%
digits, labels = load_digits(return_X_y=True)
digits, labels = jnp.float32(digits / 16).reshape(-1, 8, 8, 1), jnp.int32(labels)
train_images, train_labels = digits[:EXAMPLES], labels[:EXAMPLES]
test_images, test_labels = digits[-360:], labels[-360:]


def changed(images):
    return 1 - images / 2


# %% [markdown]
# ## The trained network
#
# This is an ordinary Flax model. Its code does not use this library.


# %%
class ResNet(nn.Module):
    """A stem and two residual blocks."""

    @nn.compact
    def __call__(self, images, train):
        def norm(z):
            return nn.BatchNorm(use_running_average=not train, momentum=0.9)(z)

        z = nn.relu(norm(nn.Conv(16, (3, 3), use_bias=False)(images)))
        for features in (32, 64):
            y = nn.relu(norm(nn.Conv(features, (3, 3), 2, use_bias=False)(z)))
            y = norm(nn.Conv(features, (3, 3), use_bias=False)(y))
            z = nn.relu(y + norm(nn.Conv(features, (1, 1), 2, use_bias=False)(z)))
        return nn.Dense(10)(z.mean((1, 2)))


# %% [markdown]
# All runs of this notebook use one training loop. `order` has the row numbers of the images
# of each step.


# %%
def fit(model, variables, order, images, rate, marks=()):
    """SGD with momentum: the variables, and test accuracies after the steps in `marks`."""
    optimizer = optax.sgd(optax.cosine_decay_schedule(rate, len(order)), momentum=0.9)

    @jax.jit
    def step(params, stats, opt_state, rows):
        def loss_fn(params):
            given = {"params": params, "batch_stats": stats}
            logits, new = model.apply(given, images[rows], True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(
                logits, train_labels[rows]
            )
            return losses.mean(), new["batch_stats"]

        gradients, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state

    params, stats = variables["params"], variables["batch_stats"]
    opt_state, accuracies = optimizer.init(params), []
    test = jax.jit(lambda variables: accuracy(model, variables, changed(test_images)))
    for number, rows in enumerate(order, 1):
        params, stats, opt_state = step(params, stats, opt_state, rows)
        if number in marks:
            accuracies.append(float(test({"params": params, "batch_stats": stats})))
    return {"params": params, "batch_stats": stats}, accuracies


def accuracy(model, variables, images):
    """Accuracy of the model in inference mode, on test images."""
    logits = model.apply(variables, images, False)
    return jnp.mean(logits.argmax(-1) == test_labels)


def independent(size, epochs, seed):
    """Rows of every step, in random order."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(EXAMPLES) for _ in range(epochs)])
    return order[: len(order) - len(order) % size].reshape(-1, size)


# %%
trained = []
for seed in tqdm(range(SEEDS)):
    start = jax.jit(ResNet().init, static_argnums=2)(
        jax.random.key(seed), train_images[:2], True
    )
    order = independent(32, EPOCHS, seed)
    trained.append(fit(ResNet(), start, order, train_images, 0.1)[0])

for name, images in (("old", test_images), ("new", changed(test_images))):
    found = [100 * accuracy(ResNet(), each, images) for each in trained]
    print(f"on the {name} pictures: {np.mean(found):.0f} %")

# %% [markdown]
# ## Replace the batch norms
#
# `replace_batch_norm` pairs each batch norm with the convolution before it.
# `from_batch_norm` copies the trained parameters and averages into the new model. Before
# the first step, both models give the same predictions.

# %%
model = replace_batch_norm(ResNet(), cbn_jax.small_batch_norm(batch_size=2))
blank = model.init(jax.random.key(0), train_images[:2], True)
variables = from_batch_norm(trained[0], into=blank)
print(report(model, train_images[:2], True))

before = ResNet().apply(trained[0], test_images, False)
after = model.apply(variables, test_images, False)
print("largest difference of the logits:", float(jnp.abs(before - after).max()))

# %% [markdown]
# ## Two images a step
#
# In the first setting, the two images of a step are independent. In the second, they are of
# one class. Such pairs occur with frames of a video or patches of a scan. Frozen batch norm
# keeps the old averages and trains at a third of the learning rate of the other two.


# %%
def pairs(seed):
    """Rows of every step, two of one class."""
    rng, rows = np.random.default_rng(seed), []
    for label in range(10):
        own = rng.permutation(np.flatnonzero(np.array(train_labels) == label))
        rows.append(own[: len(own) // 2 * 2].reshape(-1, 2))
    return rng.permutation(np.concatenate(rows))


METHODS = {
    "batch_norm": cbn_jax.batch_norm(),
    "frozen": cbn_jax.frozen(cbn_jax.batch_norm(), after=0),
    "small_batch_norm": cbn_jax.small_batch_norm(batch_size=2),
}
RATES = {"batch_norm": 0.006, "frozen": 0.002, "small_batch_norm": 0.006}
SETTINGS = {
    "two independent images": lambda seed: independent(2, 1, seed),
    "two images of one class": pairs,
}
steps = len(pairs(0))
marks = sorted({max(1, round(steps * share)) for share in np.linspace(0.05, 1, 20)})
curves = {}
for setting, name in tqdm([(s, n) for s in SETTINGS for n in METHODS]):
    model, found = replace_batch_norm(ResNet(), METHODS[name]), []
    blank = model.init(jax.random.key(0), train_images[:2], True)
    for seed in range(SEEDS):
        start = from_batch_norm(trained[seed], into=blank)
        order, rate = SETTINGS[setting](seed)[:steps], RATES[name]
        found.append(fit(model, start, order, changed(train_images), rate, marks)[1])
    curves[setting, name] = 100 * np.array(found)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
colors = {"batch_norm": "C0", "frozen": "C3", "small_batch_norm": "C2"}
for axis, setting in zip(axes, SETTINGS, strict=True):
    for name, color in colors.items():
        found = curves[setting, name]
        axis.plot(marks, found.mean(0), color=color, label=name)
        axis.fill_between(marks, found.min(0), found.max(0), color=color, alpha=0.15, lw=0)
    axis.set_title(setting)
    axis.set_xlabel("steps of fine-tuning")
axes[0].set_ylabel("test accuracy on the new pictures, %")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# With independent pairs, batch norm adapts too. With pairs of one class, batch norm
# subtracts the mean of the class, which the network needs. Frozen batch norm does not
# subtract it. But its averages come from the old pictures, and those of the new pictures
# are very different.

# %%
for (setting, name), found in curves.items():
    ends = found[:, -1]
    print(f"{setting:24} {name:18} {ends.mean():.1f} ± {ends.std():.1f} %")

# %% [markdown]
# ## Save and restore
#
# The variables of the new model are dicts of arrays, so Orbax saves them directly.

# %%
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(folder) / "fine_tuned", variables)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(Path(folder) / "fine_tuned", variables)
print("equal bits:", jax.tree.all(jax.tree.map(np.array_equal, variables, restored)))

# %% [markdown]
# Next: [Fine-tuning a trained
# model](https://github.com/cbn-jax/cbn_jax/blob/main/docs/how_to/fine_tuning.md) explains
# the steps for your own network, with measurements on larger networks and real data.
