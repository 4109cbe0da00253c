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
# # Choosing a method for your data
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cbn-jax/cbn_jax/blob/main/colabs/choosing_a_method.ipynb)
#
# Which method works best on *your* data set, at *your* batch size? This notebook trains two
# small networks with each method, on the same images and with several seeds. Each method
# uses the better of a few learning rates. The result is one table and one figure. Set your
# data set and your batch size in the parameters below, and run the notebook again.

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
import time

import flax.linen as nn
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import tensorflow_datasets as tfds
from IPython.display import Markdown, display
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from sklearn.datasets import load_digits
from tqdm import tqdm

from cbn_jax.linen import Norm

plt.style.use("cbn_jax.figures")

# %% tags=["parameters"]
DATASET = "digits"  # or a name in tensorflow-datasets: "fashion_mnist", "cifar10", …
DATA_DIR = None  # the folder of tensorflow-datasets; None for its default
BATCH_SIZE = 2
NETWORKS = ("mlp", "cnn")
RATES = (0.1, 0.4)  # at batch size 32; proportional to the batch size
EPOCHS = 2
TUNING_SEEDS = 2  # to choose the rate
SEEDS = 3  # other seeds, for the test
EXAMPLES = 1000  # at most this many images for training; a fifth of them chooses the rate

# %% [markdown]
# ## Your data
#
# Use any image classification set of tensorflow-datasets that has the splits `train` and
# `test` and images of one size. The first use prepares it as array_record files. To read
# them you need no TensorFlow. To prepare most sets you do, and Colab has it installed.


# %% cellView="form" tags=["hide-input"]
# @title Read the data
def read(name):
    """Training and test images ``[N, H, W, C]`` in [0, 1], each with labels."""
    if name == "digits":
        images, labels = load_digits(return_X_y=True)
        images = images.reshape(-1, 8, 8, 1)
        parts = (
            (images[:-360][:EXAMPLES], labels[:-360][:EXAMPLES]),
            (images[-360:], labels[-360:]),
        )
    else:
        builder = tfds.builder(name, data_dir=DATA_DIR)
        builder.download_and_prepare(file_format="array_record")
        train, test = builder.as_data_source(split=["train", "test"])
        parts = columns(train, EXAMPLES), columns(test, len(test))
    brightest = parts[0][0].max()
    return [(np.float32(images / brightest), np.int32(labels)) for images, labels in parts]


def columns(source, most):
    """The first examples of a data source, as two arrays."""
    examples = [source[i] for i in range(min(most, len(source)))]
    images, labels = ([example[key] for example in examples] for key in ("image", "label"))
    return np.stack(images), np.array(labels)


# %%
(images, labels), test = read(DATASET)
CLASSES = 1 + int(max(labels.max(), test[1].max()))
cut = len(labels) - len(labels) // 5
train, validation = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
print(f"images of {images.shape[1:]}, {CLASSES} classes")
print(f"{cut} to train, {len(labels) - cut} to choose the rate, {len(test[1])} to test")

# %% [markdown]
# ## The networks
#
# The MLP has three dense layers. The CNN has a first convolution and one residual block.
# `Norm(estimator, layer)` runs a layer and normalizes its output. You can add your own
# network to `MODELS`.


# %%
class MLP(nn.Module):
    estimator: object

    @nn.compact
    def __call__(self, images, train):
        z = images.reshape(len(images), -1)
        for _ in range(3):
            norm = Norm(self.estimator, nn.Dense(128), use_running_average=not train)
            z = nn.relu(norm(z))
        return nn.Dense(CLASSES)(z)


class CNN(nn.Module):
    estimator: object

    @nn.compact
    def __call__(self, images, train):
        def conv(features, size, stride):
            layer = nn.Conv(features, (size, size), stride, use_bias=False)
            return Norm(self.estimator, layer, use_running_average=not train)

        z = nn.relu(conv(16, 3, 2 if images.shape[1] > 16 else 1)(images))
        y = nn.relu(conv(32, 3, 2)(z))
        z = nn.relu(conv(32, 1, 2)(z) + conv(32, 3, 1)(y))
        return nn.Dense(CLASSES)(z.mean((1, 2)))


MODELS = {"mlp": MLP, "cnn": CNN}

# %% [markdown]
# ## The methods
#
# The same training code works for all of these methods. `small_batch_norm` is the one that
# this library recommends. `cross_iteration_batch_norm` appears as published and with the
# options `gradient="window"` and `running="window"`. Some methods of the library need
# another training step, such as `adaptive_batch_norm`. The benchmarks have them: [published
# claims,
# tested](https://github.com/cbn-jax/cbn_jax/blob/main/benchmarks/README.md#published-claims-tested).

# %%
cross_iteration = cbn_jax.cross_iteration_batch_norm
varied = {"gradient": "window", "running": "window"}
METHODS = {  # with color and marker in the figure
    "batch_norm": (cbn_jax.batch_norm(), "C0 o"),
    "group_norm": (cbn_jax.group_norm(num_groups=8), "C3 D"),
    "small_batch_norm": (cbn_jax.small_batch_norm(batch_size=BATCH_SIZE), "C2 s"),
    "cross_iteration_batch_norm": (cross_iteration(window=8), "C1 ^"),
    "cross_iteration_batch_norm, varied": (cross_iteration(window=8, **varied), "C1 v"),
    "diminishing_batch_norm": (cbn_jax.diminishing_batch_norm(0.5), "C5 P"),
    "group_batch_norm": (cbn_jax.learned(cbn_jax.group_batch_norm, num_groups=8), "C5 D"),
}

# %% [markdown]
# ## Training
#
# Each method trains at each rate with two seeds. The rate with the best accuracy on the
# validation images then trains with three other seeds, and we test only these runs.


# %% cellView="form" tags=["hide-input"]
# @title The training loop
def batches(seed):
    """Row numbers ``[steps, BATCH_SIZE]``; the order changes in every epoch."""
    rng = np.random.default_rng(seed)
    count = len(train[0]) // BATCH_SIZE * BATCH_SIZE
    orders = [rng.permutation(len(train[0]))[:count] for _ in range(EPOCHS)]
    return np.concatenate(orders).reshape(-1, BATCH_SIZE)


def runner(model):
    """A function that trains at a rate; the variables, and the median seconds of a step."""
    schedule = optax.cosine_decay_schedule(BATCH_SIZE / 32, len(batches(0)))
    optimizer = optax.sgd(schedule, momentum=0.9)
    init = jax.jit(model.init, static_argnums=2)

    @jax.jit
    def step(variables, opt_state, images, labels, rate):
        def loss_fn(params):
            given = variables | {"params": params}
            logits, stats = model.apply(given, images, True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), stats

        params = variables["params"]
        gradients, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        params = optax.apply_updates(params, optax.tree.scale(rate, updates))
        return {"params": params, **stats}, opt_state

    def run(rate, seed):
        variables, seconds = init(jax.random.key(seed), train[0][:2], False), []
        opt_state = optimizer.init(variables["params"])
        for rows in batches(seed):
            start = time.perf_counter()
            state = step(variables, opt_state, train[0][rows], train[1][rows], rate)
            variables, opt_state = jax.block_until_ready(state)
            seconds.append(time.perf_counter() - start)
        return variables, np.median(seconds)

    return run


def compare(network, estimator):
    """The results of one method: test accuracies in %, rate, seconds, bytes of state."""
    model = MODELS[network](estimator)
    predict = jax.jit(lambda variables, images: model.apply(variables, images, False))

    def accuracy(variables, part):
        return 100 * jnp.mean(predict(variables, part[0]).argmax(-1) == part[1])

    def tuning(rate):
        found = [accuracy(run(rate, seed)[0], validation) for seed in range(TUNING_SEEDS)]
        return np.mean(found)

    run = runner(model)
    rate = max(RATES, key=tuning)
    runs = [run(rate, TUNING_SEEDS + seed) for seed in range(SEEDS)]
    return {
        "accuracy": np.array([accuracy(variables, test) for variables, _ in runs]),
        "rate": rate,
        "seconds": np.median([seconds for _, seconds in runs]),
        "bytes": sum(
            leaf.nbytes for leaf in jax.tree.leaves(runs[0][0].get("batch_stats", {}))
        ),
    }


# %%
results = {network: {} for network in NETWORKS}
for network, name in tqdm([(n, m) for n in NETWORKS for m in METHODS]):
    try:
        results[network][name] = compare(network, METHODS[name][0])
    except ValueError as error:  # a method that cannot train at this batch size
        print(f"{name} is left out of {network}: {error}")

# %% [markdown]
# ## The results


# %% cellView="form" tags=["hide-input"]
# @title The table
def spread(accuracy):
    """Mean ± standard error; the latter needs two seeds or more."""
    if len(accuracy) == 1:
        return f"{accuracy[0]:.1f}"
    return f"{accuracy.mean():.1f} ± {accuracy.std(ddof=1) / np.sqrt(len(accuracy)):.1f}"


def table(network):
    """Markdown, with the best method first."""
    found = results[network]
    head = ("method", "test, %", "rate", "step, ms", "state, KiB")
    lines = [head, ("---",) * len(head)]
    for name in sorted(found, key=lambda name: -found[name]["accuracy"].mean()):
        row = found[name]
        measured = (spread(row["accuracy"]), f"{row['rate']:g}")
        costs = (f"{1000 * row['seconds']:.2f}", f"{row['bytes'] / 1024:,.1f}")
        lines.append((name, *measured, *costs))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


for network in NETWORKS:
    display(Markdown(f"**{network}**, batch size {BATCH_SIZE}\n\n{table(network)}"))

# %% [markdown]
# *test*: accuracy, mean ± standard error over the seeds. *rate*: the chosen rate, at batch
# size 32. *step*: median time of a training step on this machine, a rough number. *state*:
# size of the normalizers' state in all layers. The figure has a point for each seed and a
# bar at the mean.

# %% cellView="form" tags=["hide-input"]
# @title The figure
first = results[NETWORKS[0]]
names = sorted(first, key=lambda name: first[name]["accuracy"].mean())
size = (4.5 * len(NETWORKS) + 1, 3.6)
figure, axes = plt.subplots(1, len(NETWORKS), figsize=size, sharey=True, squeeze=False)
for axis, (network, found) in zip(axes[0], results.items(), strict=True):
    for height, name in enumerate(names):
        if name in found:
            error = 100 - found[name]["accuracy"]
            color, marker = METHODS[name][1].split()
            axis.plot(error, [height] * len(error), marker, color=color, ms=6, alpha=0.7)
            axis.plot(error.mean(), height, "|", color="black", ms=16, mew=2)
    axis.set(xscale="log", xlabel="test error, %")
    axis.set_title(f"{network}, batch size {BATCH_SIZE}")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
axes[0, 0].set_yticks(range(len(names)), names)
plt.show()

# %% [markdown]
# ## How to read the results
#
# Treat two methods as different only if their means differ by more than two standard
# errors, $2\sqrt{s_1^2 + s_2^2}$. With three seeds, even this is a rough rule.
#
# In the run shown, at batch size 2:
#
# - On the MLP, `small_batch_norm`, `cross_iteration_batch_norm` and `group_norm` do not
#   differ by this rule. All other methods are behind. `batch_norm` classifies only about
#   half of the test images correctly.
# - On the CNN, `batch_norm` works well, because each feature has many positions.
#   `small_batch_norm` does not differ from it, but costs more. `group_norm` and
#   `cross_iteration_batch_norm` as published are behind after so few steps.
#
# The network matters as much as the data.
#
# **What to change.** Set `DATASET` and `BATCH_SIZE`. Increase `EPOCHS` and `EXAMPLES` until
# the accuracies are realistic. Increase `SEEDS` until the standard errors are small enough.
# Add rates to `RATES` if a method chooses the smallest or the largest one.
#
# **More results.** The library's own study has batch sizes from 1 to 32, more rates, epochs
# and images, a larger CNN, and Fashion-MNIST: [accuracy against batch
# size](https://github.com/cbn-jax/cbn_jax/blob/main/benchmarks/README.md#accuracy-against-batch-size).
