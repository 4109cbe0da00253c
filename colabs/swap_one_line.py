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
# # Swap one line in a Flax ResNet
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cbn-jax/cbn_jax/blob/main/colabs/swap_one_line.ipynb)
#
# An ordinary Flax model, a small ResNet with batch norm, trains on one example per step.
# This notebook swaps its normalizer for one of this library and leaves everything else as
# it was: the model, the training step, the checkpoint. It does so in linen and in nnx, and
# shows what one gains, also for a model that batch norm has trained already.

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
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen as nn
from flax import nnx
from sklearn.datasets import load_digits
from tqdm import tqdm

import cbn_jax
import cbn_jax.nnx
from cbn_jax.linen import Norm, from_batch_norm

plt.style.use("cbn_jax.figures")

# %% tags=["parameters"]
EPOCHS = 3
SEEDS = 3
EXAMPLES = 1437  # images for training; the other 360 are for testing

# %% [markdown]
# The data are scikit-learn's handwritten digits, 8 by 8 pixels.

# %%
digits, labels = load_digits(return_X_y=True)
digits, labels = jnp.float32(digits / 16).reshape(-1, 8, 8, 1), jnp.int32(labels)
train_images, train_labels = digits[:EXAMPLES], labels[:EXAMPLES]
test_images, test_labels = digits[-360:], labels[-360:]

# %% [markdown]
# ## The model, and the line
#
# A stem and three residual blocks of 16, 32 and 64 features; the last two halve the image.


# %%
class ResNet(nn.Module):
    """A small residual network; `norm` runs a layer and normalizes what it puts out."""

    norm: Callable

    @nn.compact
    def __call__(self, images, train):
        def conv(z, features, size=3, stride=1):
            layer = nn.Conv(features, (size, size), stride, use_bias=False)
            return self.norm(layer, z, train)

        z = nn.relu(conv(images, 16))
        for features, stride in ((16, 1), (32, 2), (64, 2)):
            shortcut = z if stride == 1 else conv(z, features, 1, stride)
            z = nn.relu(conv(z, features, 3, stride))
            z = nn.relu(shortcut + conv(z, features))
        return nn.Dense(10)(z.mean((1, 2)))


# %% [markdown]
# Before, and after. The convolution goes into `Norm`, because the method has to see its
# weights: it takes statistics from about the last 32 examples, and moves them along as the
# weights change.

# %%
estimator = cbn_jax.small_batch_norm(batch_size=1)


def before(layer, z, train):
    return nn.BatchNorm(use_running_average=not train)(layer(z))


def after(layer, z, train):
    return Norm(estimator, layer, use_running_average=not train)(z)


# %% [markdown]
# The parameters are the same, in the same places, except that `BatchNorm_0` becomes
# `Norm_0`. What the method remembers is in `batch_stats`, beside the running averages. It
# is about twice as large as the parameters; batch norm's is next to nothing.


# %%
def describe(collection, tree):
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)) / 1024
    first = [name for name in tree if name.endswith("_0")]
    return f"{collection:12} {size:6.1f} KiB: {', '.join(first)}, …"


models = {"before": ResNet(before), "after": ResNet(after)}
for name, model in models.items():
    initialize = functools.partial(model.init, train=False)
    variables = jax.eval_shape(initialize, jax.random.key(0), test_images)
    print(name, *(describe(*entry) for entry in variables.items()), sep="\n  ")

# %% [markdown]
# ## Training at one example per step
#
# The step is that of any Flax model with batch norm. The state is donated: every step
# replaces it. The rate is 0.1 at batch size 32 and in proportion to the batch size, so
# 0.1 / 32 here.


# %%
class State(NamedTuple):
    params: Any
    batch_stats: Any
    opt_state: Any


schedule = optax.cosine_decay_schedule(0.1 / 32, EPOCHS * EXAMPLES)
optimizer = optax.sgd(schedule, momentum=0.9)


@functools.partial(jax.jit, static_argnums=0)
def init(model, seed):
    variables = model.init(jax.random.key(seed), test_images, False)
    params = variables["params"]
    return State(params, variables["batch_stats"], optimizer.init(params))


def cross_entropy(logits, rows):
    labels = train_labels[rows]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(model, state, rows):
    def loss_fn(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, updates = model.apply(
            variables, train_images[rows], True, mutable=["batch_stats"]
        )
        return cross_entropy(logits, rows), updates["batch_stats"]

    gradients, batch_stats = jax.grad(loss_fn, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state)
    return State(optax.apply_updates(state.params, updates), batch_stats, opt_state)


# %%
def test_error(logits):
    return 100 * (logits.argmax(-1) != test_labels).mean()


def variables_of(state):
    return {"params": state.params, "batch_stats": state.batch_stats}


@functools.partial(jax.jit, static_argnums=0)
def error(model, variables):
    return test_error(model.apply(variables, test_images, False))


STEPS = EPOCHS * EXAMPLES
REPORT = max(1, STEPS // 18)


def batches(seed):
    """Row numbers, one in each batch; every epoch in an order of its own."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(EXAMPLES) for _ in range(EPOCHS)]
    return np.concatenate(orders).reshape(-1, 1)


def train(model, seed, bar):
    """The trained state, and test errors along the way, in percent."""
    state, curve = init(model, seed), []
    for number, rows in enumerate(batches(seed), 1):
        state = step(model, state, rows)
        if number % REPORT == 0:
            curve.append(error(model, variables_of(state)))
        bar.update()
    return state, np.array(curve)


# %%
states, curves = {}, {}
with tqdm(total=len(models) * SEEDS * STEPS) as bar:
    for name, model in models.items():
        runs = [train(model, seed, bar) for seed in range(SEEDS)]
        states[name] = [state for state, _ in runs]
        curves[name] = np.stack([curve for _, curve in runs], axis=1)

# %%
seen = REPORT * np.arange(1, len(curves["after"]) + 1)


def draw_curves(axis, name, color, style, label):
    curve = curves[name]
    axis.plot(seen, curve.mean(1), style, color=color, label=label)
    axis.fill_between(seen, curve.min(1), curve.max(1), color=color, alpha=0.15, lw=0)
    axis.set(xlabel="training images seen", ylabel="test error, %")


figure, axis = plt.subplots(figsize=(7, 3.6))
draw_curves(axis, "before", "C0", ":", "before: nn.BatchNorm")
draw_curves(axis, "after", "C2", "-", "after: small_batch_norm")
axis.set_ylim(bottom=0)
axis.set_title(f"one example per step; mean and range of {SEEDS} seeds")
figure.legend(loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# ## A checkpoint
#
# The states of both models, optimizer included, go to a folder and come back. What comes
# back is told by a template of shapes, for which no model has to be initialized.

# %%
template = {
    name: [init.eval_shape(model, seed) for seed in range(SEEDS)]
    for name, model in models.items()
}
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(folder) / "linen", states)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(Path(folder) / "linen", template)

assert jax.tree.all(jax.tree.map(np.array_equal, restored, states))

# %% [markdown]
# ## A model that batch norm has trained
#
# With one example in the batch, batch norm in training normalizes every image by its own
# mean and variance. In inference it takes running averages over all images, which is
# another function than the one that was trained. `corrected_inference` predicts with what
# an image's statistics would have been in training. It takes the checkpoint of Flax's own
# `nn.BatchNorm`; nothing is trained again.


# %%
correction = cbn_jax.corrected_inference(cbn_jax.batch_norm(), examples=1)


def corrected(layer, z, train):
    return Norm(correction, layer, use_running_average=not train)(z)


trained = [variables_of(state) for state in restored["before"]]
converted = [from_batch_norm(variables) for variables in trained]
swapped = [variables_of(state) for state in restored["after"]]
ways = {
    "before:\nnn.BatchNorm": (ResNet(before), trained, "C0", "o"),
    "the same checkpoint,\ncorrected_inference": (ResNet(corrected), converted, "C4", "s"),
    "after:\nsmall_batch_norm": (ResNet(after), swapped, "C2", "^"),
}

# %%
figure, axis = plt.subplots(figsize=(6.5, 3.4))
for place, (name, (model, checkpoints, color, marker)) in enumerate(ways.items()):
    errors = np.array([error(model, variables) for variables in checkpoints])
    axis.plot(np.full(SEEDS, place), errors, marker, color=color, alpha=0.6)
    axis.hlines(errors.mean(), place - 0.2, place + 0.2, color=color)
    print(f"{name.replace(chr(10), ' '):41} {errors.mean():4.1f} ± {errors.std():.1f} %")
axis.set_xticks(range(len(ways)), ways)
axis.set(xlim=(-0.5, len(ways) - 0.5), ylim=(0, None), ylabel="test error, %")
axis.set_title(f"{SEEDS} seeds, and their mean")
plt.show()

# %% [markdown]
# Once it is corrected, batch norm's checkpoint makes as many errors as the model with
# `small_batch_norm`, as far as these seeds can tell: on this network, at one example per
# step, what batch norm loses against it is lost in prediction. They differ in how they
# predict. `small_batch_norm` takes running averages, as batch norm does; the correction
# takes every image's own moments, so it cannot be folded into the convolution.
#
# ## The same in nnx
#
# The line is the same, with the random numbers that nnx hands to every layer.


# %%
def conv(fan_in, features, size=3, stride=1, *, rngs):
    layer = nnx.Conv(fan_in, features, (size, size), stride, use_bias=False, rngs=rngs)
    # was: nnx.Sequential(layer, nnx.BatchNorm(features, rngs=rngs))
    return cbn_jax.nnx.Norm(estimator, layer=layer, rngs=rngs)


class Block(nnx.Module):
    def __init__(self, fan_in, features, stride, *, rngs):
        self.shortcut = conv(fan_in, features, 1, stride, rngs=rngs) if stride > 1 else None
        self.first = conv(fan_in, features, 3, stride, rngs=rngs)
        self.second = conv(features, features, rngs=rngs)

    def __call__(self, z):
        shortcut = z if self.shortcut is None else self.shortcut(z)
        return nnx.relu(shortcut + self.second(nnx.relu(self.first(z))))


class NnxResNet(nnx.Module):
    def __init__(self, *, rngs):
        self.stem = conv(1, 16, rngs=rngs)
        self.blocks = nnx.Sequential(
            Block(16, 16, 1, rngs=rngs),
            Block(16, 32, 2, rngs=rngs),
            Block(32, 64, 2, rngs=rngs),
        )
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        z = self.blocks(nnx.relu(self.stem(images)))
        return self.head(z.mean((1, 2)))


# %% [markdown]
# In nnx a model holds its state, so that a training step returns nothing; `train()` and
# `eval()` switch the mode.


# %%
@nnx.jit
def nnx_step(model, optimizer, rows):
    def loss_fn(model):
        return cross_entropy(model(train_images[rows]), rows)

    optimizer.update(model, nnx.grad(loss_fn)(model))


@nnx.jit
def nnx_error(model):
    return test_error(model(test_images))


def nnx_train(seed):
    """The trained model, and test errors along the way, in percent."""
    model = NnxResNet(rngs=nnx.Rngs(seed))
    nnx_optimizer = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    step = nnx.cached_partial(nnx_step, model, nnx_optimizer)  # takes the model apart once
    curve = []
    for number, rows in enumerate(tqdm(batches(seed)), 1):
        step(rows)
        if number % REPORT == 0:
            model.eval()
            curve.append(nnx_error(model))
            model.train()
    return model, np.array(curve)


nnx_model, nnx_curve = nnx_train(0)

# %%
figure, axis = plt.subplots(figsize=(7, 3.6))
draw_curves(axis, "after", "C2", "-", f"linen, mean and range of {SEEDS} seeds")
axis.plot(seen, nnx_curve, "--", color="C5", label="nnx, one seed")
axis.set_ylim(bottom=0)
axis.set_title("small_batch_norm at one example per step")
figure.legend(loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# The nnx run has initial weights of its own. It goes the way of the linen runs, and ends
# somewhat below them.
#
# A checkpoint and back, and a prediction by the model that came back.

# %%
graph, template = nnx.split(nnx.eval_shape(lambda: NnxResNet(rngs=nnx.Rngs(0))))
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(folder) / "nnx", nnx.state(nnx_model))
    checkpointer.wait_until_finished()
    again = nnx.merge(graph, checkpointer.restore(Path(folder) / "nnx", template))

assert jax.tree.all(jax.tree.map(np.array_equal, nnx.state(again), nnx.state(nnx_model)))
again.eval()
print("predicted:", again(test_images[:16]).argmax(-1))
print("true:     ", test_labels[:16])
print(f"test error, nnx: {nnx_error(again):.1f} %")
print(f"test error, linen, mean: {curves['after'][-1].mean():.1f} %")

# %% [markdown]
# ## What to remember
#
# - The line: `nn.BatchNorm()(nn.Conv(...)(z))` becomes `Norm(estimator, nn.Conv(...))(z)`,
#   in nnx `cbn_jax.nnx.Norm(estimator, layer=nnx.Conv(...), rngs=rngs)`. The training step
#   and the checkpoint stay as they were; what is in `batch_stats` becomes about twice as
#   large as the parameters.
# - A model that is still to be trained at one example per step: `small_batch_norm` takes
#   the test error down, from the first dots above to the third.
# - A model that batch norm has trained at one example per step: `corrected_inference` does
#   the same, and nothing is trained again.
#
# Where next: *What goes wrong at batch size 2* shows why small batches need other
# statistics; *Choosing a method* compares all of them on your data.
