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
# A method of this library consists of three pure functions and a state. It needs no neural
# network framework. This notebook trains a small network with JAX and Optax alone. It
# trains on one device, then on all devices with a sharded `jit` and with `jax.shard_map`.
# At the end we compare the results.

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
from functools import partial

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from jax.extend.backend import clear_backends
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from tqdm import tqdm

plt.style.use("cbn_jax.figures")
# Some accelerators round the factors of matrix products. The comparison needs all digits.
jax.config.update("jax_default_matmul_precision", "float32")

if jax.default_backend() == "cpu":  # then make the CPU act as eight devices
    clear_backends()
    jax.config.update("jax_num_cpu_devices", 8)

DEVICES = jax.device_count()
BATCH = DEVICES * -(-8 // DEVICES)  # 8, or the next multiple of the number of devices
print(f"devices: {DEVICES}, examples on each device per step: {BATCH // DEVICES}")

# %% tags=["parameters"]
EPOCHS = 2
EXAMPLES = 1437  # images for training; the other 360 are for testing

# %% [markdown]
# The data are scikit-learn's handwritten digits, 8 by 8 pixels.

# %%
digits, labels = load_digits(return_X_y=True)
digits, labels = np.float32(digits / 16), np.int32(labels)
train_images, train_labels = digits[:EXAMPLES], labels[:EXAMPLES]
test_images, test_labels = digits[-360:], labels[-360:]

# %% [markdown]
# ## Three functions and a state
#
# An `Estimator` estimates the mean and the variance of each feature:
#
# - `init` creates its state.
# - `train` returns statistics and the next state.
# - `infer` returns statistics.
#
# `run_layer` runs the layer before the normalizer. It also returns a `source`, from which
# the estimator gets the weights and inputs of the layer. `normalize` applies the
# statistics. Here is one dense layer in one training step and in inference:

# %%
estimator = cbn_jax.small_batch_norm(batch_size=BATCH)
kernel = jax.random.normal(jax.random.key(0), (64, 32)) / 8
state = estimator.init(32, cbn_jax.dense, kernel)

x, source = cbn_jax.run_layer(cbn_jax.dense, kernel, train_images[:BATCH])
statistics, state = estimator.train(state, x, source)
print("training: ", cbn_jax.normalize(x, statistics).shape)

x = test_images @ kernel
print("inference:", cbn_jax.normalize(x, estimator.infer(state, x)).shape)

for name, shapes in jax.tree.map(jnp.shape, state)._asdict().items():
    print(f"state, {name}: {shapes}")

# %% [markdown]
# The state is a pytree of float32 arrays with constant shapes. It works with `jit`, `scan`,
# donation and checkpoints, as parameters do.
#
# ## A network of pure functions
#
# The network has three normalized dense layers and a last layer for the classes. A training
# step carries the parameters, the states of the normalizers and the state of the optimizer.

# %%
SHAPES = ((64, 64), (64, 64), (64, 64), (64, 10))
rate = optax.cosine_decay_schedule(0.025, EPOCHS * (EXAMPLES // BATCH))
optimizer = optax.sgd(rate, momentum=0.9)


def init(key):
    draw, keys = jax.nn.initializers.he_normal(), jax.random.split(key, len(SHAPES))
    params = [draw(key, shape) for key, shape in zip(keys, SHAPES, strict=True)]
    states = [
        estimator.init(kernel.shape[-1], cbn_jax.dense, kernel) for kernel in params[:-1]
    ]
    return params, states, optimizer.init(params)


def forward(params, states, images, axis_name=None):
    """The logits in training, and the new states."""
    *kernels, last = params
    z, new_states = images, []
    for kernel, state in zip(kernels, states, strict=True):
        x, source = cbn_jax.run_layer(cbn_jax.dense, kernel, z)
        statistics, state = estimator.train(state, x, source, axis_name=axis_name)
        z = jax.nn.relu(cbn_jax.normalize(x, statistics))
        new_states.append(state)
    return z @ last, new_states


def predict(params, states, images):
    """The logits in inference."""
    *kernels, last = params
    z = images
    for kernel, state in zip(kernels, states, strict=True):
        x = z @ kernel
        z = jax.nn.relu(cbn_jax.normalize(x, estimator.infer(state, x)))
    return z @ last


def loss_fn(params, states, images, labels, axis_name=None):
    logits, states = forward(params, states, images, axis_name)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    if axis_name:
        loss = jax.lax.pmean(loss, axis_name)
    return loss, states


def step(carry, images, labels, axis_name=None):
    params, states, opt_state = carry
    (loss, states), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
        params, states, images, labels, axis_name
    )
    updates, opt_state = optimizer.update(gradients, opt_state)
    return (optax.apply_updates(params, updates), states, opt_state), loss


# %% [markdown]
# ## One step, three ways
#
# **One device.** `jit` compiles the step. Donation lets it reuse the memory of the old
# arrays.
#
# **Sharded `jit`.** The function is the same. The shardings put the carry on every device
# and split the batch along the axis `data` of the mesh. XLA inserts the communication. Pass
# `AxisType.Auto` to the mesh: by default, `jax.make_mesh` creates Explicit axes, which not
# all operations support.
#
# **`jax.shard_map`.** Each device runs the function on its part of the batch. The function
# gets the name of the axis. It passes the name to `estimator.train`, so that all devices
# normalize together. It averages the loss with `pmean`. Gradients of replicated parameters
# then arrive summed over the devices, so the step must not average them again.
#
# The older `jax.pmap` works too. There the carry has a leading axis of devices, and the
# step averages the gradients itself, with `pmean`. [Several
# devices](https://github.com/cbn-jax/cbn_jax/blob/main/docs/how_to/devices.md) describes
# it, and also meshes with several axes and several processes.

# %%
mesh = jax.make_mesh((DEVICES,), ("data",), (AxisType.Auto,))
everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

one_device = jax.jit(step, donate_argnums=0)
sharded_jit = jax.jit(
    step,
    in_shardings=(everywhere, split, split),
    out_shardings=everywhere,
    donate_argnums=0,
)
shard_map = jax.jit(
    jax.shard_map(
        partial(step, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    ),
    donate_argnums=0,
)

# %% [markdown]
# ## The same numbers
#
# Each way trains from the same initial weights on the same batches. A fourth run shows how
# much rounding matters. It runs on one device, with initial weights that differ in the last
# digit of a float32.

# %%
EPSILON = np.finfo(np.float32).eps
EVERY = 10  # steps between two records of the states


def train(step, carry):
    """The losses, the states every few steps, and the carry at the end."""
    rng, losses, states = np.random.default_rng(0), [], []
    order = np.concatenate([rng.permutation(EXAMPLES) for _ in range(EPOCHS)])
    for number in range(EPOCHS * (EXAMPLES // BATCH)):
        rows = order[number * BATCH : (number + 1) * BATCH]
        carry, loss = step(carry, train_images[rows], train_labels[rows])
        losses.append(float(loss))
        if number % EVERY == 0:
            states.append(jax.device_get(carry[1]))
    return losses, states, jax.device_get(carry)


def nudged(carry):
    params, *rest = carry
    return [kernel * (1 + EPSILON) for kernel in params], *rest


ways = {
    "one device": (one_device, lambda carry: carry),
    "sharded jit": (sharded_jit, lambda carry: jax.device_put(carry, everywhere)),
    "shard_map": (shard_map, lambda carry: jax.device_put(carry, everywhere)),
    "one device, other last digit": (one_device, nudged),
}
runs = {
    name: train(step, prepare(init(jax.random.key(0))))
    for name, (step, prepare) in tqdm(ways.items())
}

# %%
styles = {
    "one device": dict(color="C2", lw=5, alpha=0.35),
    "sharded jit": dict(color="C4", ls="--"),
    "shard_map": dict(color="C1", ls=":"),
    "one device, other last digit": dict(color="black", lw=1),
}


def difference(states, expected):
    """The largest difference of running statistics, relative to the largest value."""

    def of_leaf(a, b):
        return np.abs(a - b).max() / np.abs(b).max()

    moments = [[(s.running.mean, s.running.var) for s in m] for m in (states, expected)]
    return max(jax.tree.leaves(jax.tree.map(of_leaf, *moments)))


figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
for name, style in styles.items():
    losses, states, _ = runs[name]
    axes[0].plot(1 + np.arange(len(losses)), losses, **style, label=name)
    if name != "one device":
        apart = list(map(difference, states, runs["one device"][1]))
        axes[1].plot(1 + EVERY * np.arange(len(apart)), apart, **style)
axes[1].axhline(EPSILON, color="0.6", label="float32 rounding, 2⁻²³")
axes[0].set(xlabel="training step", ylabel="loss, nats", title="loss")
axes[1].set(xlabel="training step", ylabel="relative difference", yscale="log")
axes[1].set_title("running statistics, compared with one device")
figure.legend(loc="outside lower center", ncols=3)
plt.show()

for name, (_, _, (params, states, _)) in runs.items():
    correct = predict(params, states, test_images).argmax(-1) == test_labels
    print(f"{name:30} test accuracy {100 * correct.mean():.1f} %")

# %% [markdown]
# The losses of all runs are the same, up to rounding: several devices add the same numbers
# in another order. The running statistics of sharded `jit` and `shard_map` differ from
# those of one device by at most a few parts in a million. A change of the last digit of the
# initial weights has an effect of the same size.
#
# ## Summary
#
# - A method is `init`, `train` and `infer`. Its state is one more pytree that a training
#   step carries. No framework is needed.
# - A sharded `jit` needs no change of the step. `jax.shard_map` needs `axis_name` in
#   `train` and a `pmean` of the loss. Both compute the same as one device, up to rounding.
# - Always pass `axis_name` in `shard_map`. Without it, each device would normalize its own
#   examples only.
