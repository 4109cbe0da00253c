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
# # A training loop of pure functions, on many devices
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cbn-jax/cbn_jax/blob/main/colabs/pure_functions.ipynb)
#
# A method of this library is three pure functions and a state, and needs no framework. This
# notebook trains a small network with JAX and optax alone: on one device, then with the
# same batch spread over eight, in two ways. Does that change what is computed? And what
# happens if every device normalizes by itself?

# %%
import importlib.util
import subprocess
import sys

# Where the library is not installed yet; the address may also be the path of a wheel.
REQUIREMENT = "cbn_jax[benchmarks] @ git+https://github.com/cbn-jax/cbn_jax"
if importlib.util.find_spec("cbn_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", REQUIREMENT], check=True)

import jax

# A CPU plays eight devices; accelerators do not mind.
jax.config.update("jax_num_cpu_devices", 8)
print(f"JAX {jax.__version__} on {jax.device_count()} x {jax.devices()[0].device_kind}")

# %%
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from tqdm import tqdm

import cbn_jax

plt.style.use("cbn_jax.figures")
# Accelerators may round the factors of a product to fewer digits; not where we count them.
jax.config.update("jax_default_matmul_precision", "float32")

# %% tags=["parameters"]
EPOCHS = 2
SEEDS = 3
EXAMPLES = 1437  # images for training; the other 360 are for testing

# %% [markdown]
# The data are scikit-learn's handwritten digits, 8 by 8 pixels. A step sees eight of them,
# one on each of eight devices.

# %%
digits, labels = load_digits(return_X_y=True)
digits, labels = np.float32(digits / 16), np.int32(labels)
train_images, train_labels = digits[:EXAMPLES], labels[:EXAMPLES]
test_images, test_labels = digits[-360:], labels[-360:]

DEVICES = jax.device_count()
BATCH = DEVICES * -(-8 // DEVICES)  # 8, or the next number that the devices can share

# %% [markdown]
# ## One noun
#
# An `Estimator` estimates statistics: `init` makes its state, `train` returns statistics
# and the next state, `infer` returns statistics only. `run_layer` runs the layer before the
# normalizer and keeps the way back to its weights; `normalize` applies the statistics. Here
# they are around one dense layer, whose weights stand still.

# %%
SMALL = cbn_jax.small_batch_norm(batch_size=BATCH)
kernel = jax.random.normal(jax.random.key(0), (64, 32)) / 8


def see(state, z):
    x, source = cbn_jax.run_layer(cbn_jax.dense, kernel, z)
    statistics, state = SMALL.train(state, x, source)
    return state, cbn_jax.normalize(x, statistics)


steps = EXAMPLES // BATCH
state, y = jax.lax.scan(
    see,
    SMALL.init(32, cbn_jax.dense, kernel),
    train_images[: steps * BATCH].reshape(steps, BATCH, 64),
)
print(f"training:  mean {y.mean():.2f}, deviation {y.std():.2f}")

x = test_images @ kernel
y = cbn_jax.normalize(x, SMALL.infer(state, x))
print(f"inference: mean {y.mean():.2f}, deviation {y.std():.2f}")

for name, shapes in jax.tree.map(jnp.shape, state)._asdict().items():
    print(f"{name}: {shapes}")

# %% [markdown]
# A state is a pytree of float32 arrays whose shapes never change. It goes through `jit`,
# donation, `scan` (above) and checkpoints as parameters do. This one holds the running
# averages that inference uses, the moments of a window of examples with their derivatives
# by the weights, and the weights of the last step.
#
# ## A network of pure functions
#
# Three normalized dense layers, and one for the classes. Parameters are a list of kernels,
# states a list of states; a training step carries both, and the optimizer's state.
# (`normalize` takes a learned scale and bias, too; this network does without.)

# %%
SHAPES = ((64, 64), (64, 64), (64, 64), (64, 10))
rate = optax.cosine_decay_schedule(0.025, EPOCHS * (EXAMPLES // BATCH))
optimizer = optax.sgd(rate, momentum=0.9)


def init(key, estimator):
    draw, keys = jax.nn.initializers.he_normal(), jax.random.split(key, len(SHAPES))
    params = [draw(key, shape) for key, shape in zip(keys, SHAPES, strict=True)]
    states = [
        estimator.init(kernel.shape[-1], cbn_jax.dense, kernel) for kernel in params[:-1]
    ]
    return params, states, optimizer.init(params)


def forward(params, states, images, estimator, axis_name=None):
    """Logits in training, and the new states."""
    *kernels, last = params
    z, updated = images, []
    for kernel, state in zip(kernels, states, strict=True):
        x, source = cbn_jax.run_layer(cbn_jax.dense, kernel, z)
        statistics, state = estimator.train(state, x, source, axis_name=axis_name)
        z = jax.nn.relu(cbn_jax.normalize(x, statistics))
        updated.append(state)
    return z @ last, updated


def predict(params, states, images, estimator):
    """Logits in inference, where states do not change and no axis is named."""
    *kernels, last = params
    z = images
    for kernel, state in zip(kernels, states, strict=True):
        x = z @ kernel
        z = jax.nn.relu(cbn_jax.normalize(x, estimator.infer(state, x)))
    return z @ last


@partial(jax.value_and_grad, has_aux=True)
def gradient(params, states, images, labels, estimator, axis_name=None):
    """The mean loss with the new states, and the gradients."""
    logits, states = forward(params, states, images, estimator, axis_name)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), states


def descend(params, gradients, opt_state):
    updates, opt_state = optimizer.update(gradients, opt_state)
    return optax.apply_updates(params, updates), opt_state


# %% [markdown]
# ## One step, three ways
#
# **One device.** The step as everyone writes it. What it carries is donated: the new arrays
# take the place of the old ones in memory.
#
# **`jit` with a sharded batch.** The same function. The shardings say that the carry is on
# every device and that the batch is split along the mesh's axis `data`; where to
# communicate is the compiler's business.
#
# **`pmap`.** One program for each device, which sees its own part of the batch and has its
# own copy of the carry: every array has a leading axis of devices. The program has to say
# what the devices share: `axis_name` for the statistics, `lax.pmean` for the gradients.
#
# | way | `axis_name` | gradients | states |
# | --- | --- | --- | --- |
# | one device | None | as they are | one |
# | `jit`, sharded batch | None | as they are | one, on every device |
# | `pmap` | its axis | `lax.pmean(gradients, axis)` | a copy for each device, all alike |
#
# `jax.shard_map` is a further way, in which the loss is averaged inside what is
# differentiated; its step, meshes with several axes and several processes are described in
# [Several devices](https://github.com/cbn-jax/cbn_jax/blob/main/docs/how_to/devices.md).


# %%
def step(carry, images, labels, estimator):
    params, states, opt_state = carry
    (loss, states), gradients = gradient(params, states, images, labels, estimator)
    params, opt_state = descend(params, gradients, opt_state)
    return (params, states, opt_state), loss


def step_of_each(carry, images, labels, estimator, axis_name):
    params, states, opt_state = carry
    (loss, states), gradients = gradient(
        params, states, images, labels, estimator, axis_name
    )
    loss, gradients = jax.lax.pmean((loss, gradients), "data")
    params, opt_state = descend(params, gradients, opt_state)
    return (params, states, opt_state), loss


# %%
class Way(NamedTuple):
    """A step, and how to come to its devices and back."""

    estimator: cbn_jax.Estimator
    begin: Callable  # key -> carry
    step: Callable  # carry, images, labels -> carry, loss
    split: Callable  # a batch -> what the step takes
    copies: Callable  # carry -> arrays of the host, with a leading axis of copies


def only_copy(carry):
    return jax.tree.map(lambda leaf: np.asarray(leaf)[None], carry)


def one_device(estimator, init=init):
    begin = jax.jit(partial(init, estimator=estimator))
    run = jax.jit(partial(step, estimator=estimator), donate_argnums=0)
    return Way(estimator, begin, run, np.asarray, only_copy)


mesh = jax.make_mesh((DEVICES,), ("data",), (AxisType.Auto,))
everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))


def sharded_jit(estimator):
    begin = jax.jit(partial(init, estimator=estimator), out_shardings=everywhere)
    run = jax.jit(
        partial(step, estimator=estimator),
        in_shardings=(everywhere, split, split),
        out_shardings=everywhere,
        donate_argnums=0,
    )
    return Way(estimator, begin, run, np.asarray, only_copy)


def one_part_each(batch):
    return batch.reshape(DEVICES, -1, *batch.shape[1:])


def pmapped(estimator, axis_name="data"):
    begin_each = jax.pmap(partial(init, estimator=estimator))
    run = jax.pmap(
        partial(step_of_each, estimator=estimator, axis_name=axis_name),
        axis_name="data",
        donate_argnums=0,
    )

    def begin(key):
        return begin_each(jnp.stack([key] * DEVICES))

    return Way(estimator, begin, run, one_part_each, jax.device_get)


# %% [markdown]
# ## The same numbers
#
# Each way trains the same network on the same batches. As a yardstick for rounding, one
# device does it once more with initial weights that differ in the last digit of a float32.

# %%
EPSILON = np.finfo(np.float32).eps
EVERY = 10  # steps between two looks at the states


def nudged_init(key, estimator):
    params, *rest = init(key, estimator)
    return [kernel * (1 + EPSILON) for kernel in params], *rest


def batches(seed):
    """Row numbers ``[steps, BATCH]``, every epoch in an order of its own."""
    rng = np.random.default_rng(seed)
    steps = EXAMPLES // BATCH
    orders = [rng.permutation(EXAMPLES)[: steps * BATCH] for _ in range(EPOCHS)]
    return np.concatenate(orders).reshape(-1, BATCH)


def train(way, seed):
    """All losses, the states on the way, and the carry at the end."""
    carry, losses, states = way.begin(jax.random.key(seed)), [], []
    for number, rows in enumerate(batches(seed)):
        images, labels = way.split(train_images[rows]), way.split(train_labels[rows])
        carry, loss = way.step(carry, images, labels)
        losses.append(np.ravel(loss)[0])
        if number % EVERY == 0:
            states.append(way.copies(carry[1]))
    return losses, states, way.copies(carry)


# %%
ONE, JIT, PMAP = "one device", "jit, sharded batch", "pmap"
ALONE, LONGER = "pmap, each by itself", "pmap, each by itself, longer window"
NUDGED = "one device, weights nudged"
ways = {
    ONE: one_device(SMALL),
    JIT: sharded_jit(SMALL),
    PMAP: pmapped(SMALL),
    ALONE: pmapped(SMALL, axis_name=None),
    LONGER: pmapped(cbn_jax.small_batch_norm(BATCH // DEVICES), axis_name=None),
}
runs = {
    name: [train(way, seed) for seed in range(SEEDS)] for name, way in tqdm(ways.items())
}
runs[NUDGED] = [train(one_device(SMALL, nudged_init), seed=0)]

# %%
styles = {
    ONE: dict(color="C2", lw=5, alpha=0.35),
    JIT: dict(color="C4", ls="--", marker="x"),
    PMAP: dict(color="C5", ls=":", marker="o", mfc="none", ms=7),
}
figure, axes = plt.subplots(1, 2, figsize=(10, 3), width_ratios=(3, 2))
for name, style in styles.items():
    losses = runs[name][0][0]
    numbers = 1 + np.arange(len(losses))
    axes[0].plot(numbers, losses, **style | {"marker": ""})
    axes[1].plot(numbers[-25:], losses[-25:], **style, label=name)
axes[0].set(xlabel="training step", ylabel="loss, nats", title="all steps")
axes[1].set(xlabel="training step", title="the last 25")
figure.legend(loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# One seed, three curves, on top of each other. How far are they apart? Below, the running
# means and variances of all layers against those of one device: the largest difference on
# any device, relative to the largest value of each array.


# %%
def difference(states, expected):
    def of_leaf(a, b):
        return np.abs(a - b).max() / np.abs(b).max()

    moments = [[(s.running.mean, s.running.var) for s in m] for m in (states, expected)]
    return max(jax.tree.leaves(jax.tree.map(of_leaf, *moments)))


styles = {
    ALONE: dict(color="C2", ls="-."),
    NUDGED: dict(color="black", ls="--"),
    JIT: dict(color="C4", marker="x"),
    PMAP: dict(color="C5", ls=":", marker="o", mfc="none"),
}
figure, axis = plt.subplots(figsize=(8, 3.4))
for name, style in styles.items():
    apart = list(map(difference, runs[name][0][1], runs[ONE][0][1]))
    axis.plot(1 + EVERY * np.arange(len(apart)), apart, **style, label=name)
axis.axhline(EPSILON, color="0.6", label="float32 rounding, 2⁻²³")
axis.set(xlabel="training step", ylabel="relative difference", yscale="log")
axis.set_title("running statistics, against one device")
figure.legend(loc="outside lower center", ncols=3)
plt.show()

# %% [markdown]
# Sums over eight parts are rounded in another order than sums over one batch. That is all:
# `jit` and `pmap` stay as close to one device as it stays to itself when its weights are
# nudged in the last digit, below one part in a million for all of the training. The line
# far above them is the next section.
#
# ## Every device by itself
#
# Leave `axis_name` out under `pmap`, and nothing fails here: gradients are still averaged,
# parameters remain the same everywhere. But every device now normalizes its single example
# by itself, and the window of four steps, which held 32 examples, holds four. Below, one
# feature's running variance on each of the devices. (With a single device the panels are
# alike.)

# %%
LAYER, FEATURE = 1, 0
figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True)
for axis, name in zip(axes, (PMAP, ALONE), strict=True):
    seen = [states[LAYER].running.var[:, FEATURE] for states in runs[name][0][1]]
    axis.plot(1 + EVERY * np.arange(len(seen)), seen, lw=1, color="C2")
    axis.set(xlabel="training step", title=f"{name}: {DEVICES} lines")
axes[0].set_ylabel("running variance, one feature")
plt.show()

# %% [markdown]
# On the left, eight lines that are one. On the right there are eight states, none of which
# is that of the training on the left, and which of them should predict? Below, all of them
# do, on the test images, one row of dots for each seed. The last way is also without
# `axis_name`, but was told so: `small_batch_norm(batch_size=1)` keeps a window of 32 steps,
# because `batch_size` counts the examples that are normalized together.


# %%
def accuracies(name):
    """In percent, ``[SEEDS, copies]``: every copy of the network predicts."""
    run = partial(predict, images=test_images, estimator=ways[name].estimator)
    run = jax.jit(jax.vmap(run))
    logits = jnp.stack([run(*carry[:2]) for _, _, carry in runs[name]])
    return 100 * np.mean(logits.argmax(-1) == test_labels, -1)


figure, axis = plt.subplots(figsize=(8, 3))
for row, name in enumerate(ways):
    found = accuracies(name)
    for seed, copies in enumerate(found):
        height = row + 0.2 * (seed - (SEEDS - 1) / 2)
        axis.plot(copies, [height] * len(copies), "o", color="C2", alpha=0.4)
    axis.plot(found.mean(), row, "|", color="black", ms=24, mew=2)
    print(f"{name:36} {found.mean():5.1f} ± {found.mean(1).std():.1f} %")
axis.set(xlabel="test accuracy, %", yticks=range(len(ways)), yticklabels=ways)
axis.set_title(f"dots: every copy of the network, {SEEDS} seeds; line: mean")
axis.invert_yaxis()
plt.show()

# %% [markdown]
# One device, `jit` and `pmap` have the same dots. Each device by itself loses between three
# and four points, and the copies of one training disagree. The longer window wins more than
# half of it back without any communication in the layers, but not all.
#
# Batch norm would not have begun at all. A single value per feature has no spread, and the
# library says so where it is traced:

# %%
batch_norm = cbn_jax.batch_norm()
try:
    batch_norm.train(batch_norm.init(32), jnp.ones((1, 32)))
except ValueError as error:
    print(error)

# %% [markdown]
# ## What it costs to agree
#
# Under an axis name a layer sends everything that it has for the others at once. We count
# the all-reduces in the compiled program of `forward`. (Speed is not measured here: eight
# devices that one CPU plays say nothing about it.)


# %%
def all_reduces(estimator):
    """In the compiled forward pass of the network."""
    way = pmapped(estimator)
    run = partial(forward, estimator=estimator, axis_name="data")
    params, states, _ = jax.eval_shape(way.begin, jax.random.key(0))
    images = way.split(train_images[:BATCH])
    program = jax.pmap(run, axis_name="data").lower(params, states, images).compile()
    return sum(map(program.as_text().count, ("all-reduce(", "all-reduce-start(")))


methods = {
    "batch_norm": batch_norm,
    "cross_iteration_batch_norm": cbn_jax.cross_iteration_batch_norm(window=8),
    "small_batch_norm": SMALL,
}
for name, estimator in methods.items():
    print(f"{name:28} {all_reduces(estimator)} all-reduces in 3 layers")

# %% [markdown]
# The program has two for each layer, with every method. The second one runs only if a mean
# is more than eight standard deviations from the running mean, where the first sums are not
# exact enough. A step therefore usually runs one for each layer.
#
# ## What to remember
#
# - A method is `init`, `train` and `infer`, its state one more pytree to carry from step to
#   step: no framework is needed.
# - `jit` with a sharded batch needs no change of the step. `pmap` needs an `axis_name` in
#   `train` and a `pmean` of the gradients. Both compute what one device computes, up to
#   rounding.
# - Without `axis_name` every device normalizes by itself: states part ways and accuracy
#   falls. Where that is what you want, let `batch_size` count one device's examples.
