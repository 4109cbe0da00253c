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
# This notebook replaces its normalizer by `small_batch_norm`. The rest of the model, the
# training step and the checkpoint code stay the same. We then compare the test errors, also
# with a correction of the trained batch norm.

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
import functools
import tempfile
from collections.abc import Callable
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
# ## The model
#
# The model has a first convolution and three residual blocks of 16, 32 and 64 features. The
# last two blocks halve the image.


# %%
class ResNet(nn.Module):
    """A small residual network; `norm` runs a layer and normalizes its output."""

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
# ## The line
#
# Pass the convolution to `Norm`, and call `Norm` with the input of the convolution. The
# method needs the weights of the convolution: it takes statistics from about the last 32
# examples and corrects them when the weights change.

# %%
estimator = cbn_jax.small_batch_norm(batch_size=1)


def before(layer, z, train):
    return nn.BatchNorm(use_running_average=not train)(layer(z))


def after(layer, z, train):
    return Norm(estimator, layer, use_running_average=not train)(z)


# %% [markdown]
# The parameters keep their names and shapes, except that `BatchNorm_0` becomes `Norm_0`.
# The state of the method is in `batch_stats`, in place of batch norm's running averages.
# It is somewhat larger than the parameters. The state of batch norm is much smaller.


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
# This is the usual training step of a Flax model with batch norm. The learning rate is 0.1
# at batch size 32 and proportional to the batch size, so it is 0.1 / 32 here.


# %%
class State(NamedTuple):
    variables: dict[str, Any]  # params and batch_stats
    opt_state: Any


STEPS = EPOCHS * EXAMPLES
optimizer = optax.sgd(optax.cosine_decay_schedule(0.1 / 32, STEPS), momentum=0.9)


@functools.partial(jax.jit, static_argnums=0)
def init(model, seed):
    variables = model.init(jax.random.key(seed), test_images, False)
    return State(variables, optimizer.init(variables["params"]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def step(model, state, rows):
    def loss_fn(params):
        variables = state.variables | {"params": params}
        logits, updates = model.apply(
            variables, train_images[rows], True, mutable=["batch_stats"]
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, train_labels[rows])
        return losses.mean(), updates

    params = state.variables["params"]
    gradients, updates = jax.grad(loss_fn, has_aux=True)(params)
    changes, opt_state = optimizer.update(gradients, state.opt_state)
    return State({"params": optax.apply_updates(params, changes), **updates}, opt_state)


# %% cellView="form" tags=["hide-input"]
# @title The training loop and the test error
REPORT = max(1, STEPS // 18)  # steps between two tests


@functools.partial(jax.jit, static_argnums=0)
def error(model, variables):
    """Test error in percent."""
    logits = model.apply(variables, test_images, False)
    return 100 * (logits.argmax(-1) != test_labels).mean()


def train(model, seed, bar):
    """The trained state, and the test errors during training."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(EXAMPLES) for _ in range(EPOCHS)])
    state, curve = init(model, seed), []
    for number, row in enumerate(order, 1):
        state = step(model, state, np.array([row]))
        if number % REPORT == 0:
            curve.append(error(model, state.variables))
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
styles = {
    "before": dict(color="C0", ls=":", label="before: nn.BatchNorm"),
    "after": dict(color="C2", ls="-", label="after: small_batch_norm"),
}
figure, axis = plt.subplots(figsize=(7, 3.6))
for name, curve in curves.items():
    images = REPORT * np.arange(1, len(curve) + 1)
    axis.plot(images, curve.mean(1), **styles[name])
    color = styles[name]["color"]
    axis.fill_between(images, curve.min(1), curve.max(1), color=color, alpha=0.15, lw=0)
axis.set(xlabel="training images", ylabel="test error, %", ylim=(0, None))
axis.set_title(f"one example per step; mean and range of {SEEDS} seeds")
figure.legend(loc="outside lower center", ncols=2)
plt.show()

# %% [markdown]
# ## A checkpoint
#
# Orbax saves the states of both models, with the optimizer, and restores them with the same
# code. It needs a template of the shapes.

# %%
template = {name: [init.eval_shape(model, 0)] * SEEDS for name, model in models.items()}
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(folder) / "states", states)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(Path(folder) / "states", template)

print("equal bits:", jax.tree.all(jax.tree.map(np.array_equal, restored, states)))

# %% [markdown]
# ## Correct a trained batch norm instead
#
# In training with one example, batch norm normalizes each image by the image's own mean
# and variance. In inference it uses running averages over all images, and the network was
# not trained with these. `corrected_inference` predicts with the statistics that the image
# would have in training. It takes the checkpoint of Flax's `nn.BatchNorm` and needs no more
# training.


# %%
correction = cbn_jax.corrected_inference(cbn_jax.batch_norm(), examples=1)


def corrected(layer, z, train):
    return Norm(correction, layer, use_running_average=not train)(z)


trained = {name: [state.variables for state in found] for name, found in restored.items()}
converted = [from_batch_norm(variables) for variables in trained["before"]]
for name, model, checkpoints in (
    ("nn.BatchNorm", models["before"], trained["before"]),
    ("nn.BatchNorm, corrected", ResNet(corrected), converted),
    ("small_batch_norm", models["after"], trained["after"]),
):
    errors = np.array([error(model, variables) for variables in checkpoints])
    print(f"{name:24} test error {errors.mean():4.1f} ± {errors.std():.1f} %")

# %% [markdown]
# In the run shown, `small_batch_norm` lowers the test error of batch norm. The corrected
# batch norm is as good as `small_batch_norm`, up to the differences between seeds. So on
# this network, batch norm loses its accuracy in inference. The two remedies differ in the
# cost of inference. `small_batch_norm` uses running averages, which you can fold into the
# convolution. The correction needs the moments of each image, which you cannot fold.
#
# ## The same line in nnx
#
# In nnx, the module holds its state, and `train()` and `eval()` choose the mode.

# %%
rngs = nnx.Rngs(0)
conv = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
# before: block = nnx.Sequential(conv, nnx.BatchNorm(16, rngs=rngs))
block = cbn_jax.nnx.Norm(estimator, layer=conv, rngs=rngs)

block.train()
print("training: ", block(train_images[:1]).shape)
block.eval()
print("inference:", block(test_images).shape)

# %% [markdown]
# ## Summary
#
# - Replace `nn.BatchNorm()(nn.Conv(...)(z))` by `Norm(estimator, nn.Conv(...))(z)`. In nnx,
#   write `cbn_jax.nnx.Norm(estimator, layer=nnx.Conv(...), rngs=rngs)`. The training step
#   and the checkpoint code stay the same. The collection `batch_stats` becomes larger than
#   the parameters.
# - To train at one example per step, use `small_batch_norm`.
# - If batch norm has already trained the model at one example per step, try
#   `corrected_inference` first. It needs no training.
#
# Next: *What goes wrong at batch size 2* explains why small batches need other statistics.
# *Choosing a method* compares all methods on your data.
