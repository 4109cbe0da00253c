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
# Which method serves *your* data set, at *your* batch size? This notebook trains two small
# networks with each of them: the same images, each method at the better of a few learning
# rates, several seeds. It ends with one table and one picture. Put your data set and your
# batch size into the parameters below and run it again.

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
import dataclasses
import time
from collections.abc import Callable

import flax.linen as nn
import matplotlib.pyplot as plt
import numpy as np
import optax
import tensorflow_datasets as tfds
from IPython.display import Markdown, display
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from sklearn.datasets import load_digits
from tqdm import tqdm

import cbn_jax
import cbn_jax.optax
from cbn_jax.assessment import assess
from cbn_jax.linen import Norm

plt.style.use("cbn_jax.figures")

# %% tags=["parameters"]
DATASET = "digits"  # or a name of tensorflow-datasets: "fashion_mnist", "cifar10", …
DATA_DIR = None  # where tensorflow-datasets keeps it; None for its own default
BATCH_SIZE = 2
NETWORKS = ("mlp", "cnn")
RATES = (0.1, 0.4)  # for 32 examples a step; in proportion for other batch sizes
EPOCHS = 2
TUNING_SEEDS = 2  # to choose the rate
SEEDS = 3  # others, to test
EXAMPLES = 1000  # images for training, at most; a fifth of them only chooses the rate

# %% [markdown]
# ## Your data
#
# Any image classification set of tensorflow-datasets with the splits `train` and `test`,
# and images of one size. It is prepared on first use, as array_record files. Reading them
# needs no TensorFlow; preparing most sets does, and Colab has it.


# %%
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


(images, labels), test = read(DATASET)
CLASSES = 1 + int(max(labels.max(), test[1].max()))
cut = len(labels) - len(labels) // 5
train, validation = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
print(
    f"{cut} images of {images.shape[1:]} to train, {len(labels) - cut} to choose the rate,"
)
print(f"{len(test[1])} to test; {CLASSES} classes")

# %% [markdown]
# ## The networks
#
# Three dense layers, and a residual CNN of a stem and one block. `norm(layer, train)` is a
# module that runs a layer and normalizes what it puts out; nothing else differs between
# methods.


# %%
class MLP(nn.Module):
    norm: Callable

    @nn.compact
    def __call__(self, images, train):
        z = images.reshape(len(images), -1)
        for _ in range(3):
            z = nn.relu(self.norm(nn.Dense(128), train)(z))
        return nn.Dense(CLASSES)(z)


class CNN(nn.Module):
    norm: Callable

    @nn.compact
    def __call__(self, images, train):
        def conv(features, size, stride):
            layer = nn.Conv(features, (size, size), stride, use_bias=False)
            return self.norm(layer, train)

        z = nn.relu(conv(16, 3, 2 if images.shape[1] > 16 else 1)(images))
        y = nn.relu(conv(32, 3, 2)(z))
        z = nn.relu(conv(32, 1, 2)(z) + conv(32, 3, 1)(y))
        return nn.Dense(CLASSES)(z.mean((1, 2)))


def norm(estimator):
    """Any method of the library, behind a layer."""
    return lambda layer, train: Norm(estimator, layer, use_running_average=not train)


# %% [markdown]
# ## The methods
#
# The five papers, the recommended method, batch norm and group norm. A method is an
# estimator of statistics, and two of them need one thing more. `cbn_jax.optax.centralize`
# changes the gradients before the optimizer. `adaptive_batch_norm` asks before each step
# whether to normalize this batch, by a threshold that `assess` finds in the training data.
# `corrected_inference` trains nothing: it predicts with the weights of `batch_norm`.


# %%
def batches(epochs, seed):
    """Row numbers ``[steps, BATCH_SIZE]``, every epoch in an order of its own."""
    rng = np.random.default_rng(seed)
    count = len(train[0]) // BATCH_SIZE * BATCH_SIZE
    orders = [rng.permutation(len(train[0]))[:count] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, BATCH_SIZE)


assessment = assess((train[0][rows] for rows in batches(1, seed=0)), "examples")
print(assessment)


# %%
@dataclasses.dataclass(frozen=True)
class Method:
    paper: str
    norm: Callable
    look: str  # color and marker
    gradient: optax.GradientTransformation | None = None  # before the optimizer
    gate: Callable | None = None  # whether to normalize a batch
    weights: str | None = None  # the method that trains for this one


batch_norm = cbn_jax.batch_norm()
cross_iteration = cbn_jax.cross_iteration_batch_norm
METHODS = {
    "batch_norm": Method("Ioffe & Szegedy, 2015", norm(batch_norm), "C0 o"),
    "group_norm": Method("Wu & He, 2018", norm(cbn_jax.group_norm(num_groups=8)), "C3 D"),
    "small_batch_norm": Method(
        "recommended here", norm(cbn_jax.small_batch_norm(batch_size=BATCH_SIZE)), "C2 s"
    ),
    "cross_iteration_batch_norm": Method(
        "Yao et al., 2021", norm(cross_iteration(window=8)), "C1 ^"
    ),
    "cross_iteration_batch_norm, window": Method(
        "Yao et al., 2021, varied",
        norm(cross_iteration(window=8, gradient="window", running="window")),
        "C1 v",
    ),
    "diminishing_batch_norm": Method(
        "Ma & Klabjan, 2024", norm(cbn_jax.diminishing_batch_norm(0.5)), "C5 P"
    ),
    "corrected_inference": Method(
        "Zhang, 2020",
        norm(cbn_jax.corrected_inference(batch_norm, examples=BATCH_SIZE)),
        "C4 o",
        weights="batch_norm",
    ),
    "optax.centralize": Method(
        "Yong et al., 2020", norm(batch_norm), "C4 X", gradient=cbn_jax.optax.centralize()
    ),
    "adaptive_batch_norm": Method(
        "Alsobhi et al., 2022",
        norm(cbn_jax.adaptive_batch_norm(batch_norm)),
        "C4 *",
        gate=assessment.gate,
    ),
    "group_batch_norm": Method(
        "Gunawan et al., 2022",
        norm(cbn_jax.learned(cbn_jax.group_batch_norm, num_groups=8)),
        "C5 D",
    ),
}

# %% [markdown]
# ## Training
#
# One jitted step for a network and a method. The rate is an argument, so that another rate
# traces nothing anew.


# %%
class Trainer:
    """A network with a method; remembers how long its steps took."""

    def __init__(self, network, method):
        self.method, self.seconds = method, []
        self.model = {"mlp": MLP, "cnn": CNN}[network](method.norm)
        steps = len(batches(EPOCHS, seed=0))
        schedule = optax.cosine_decay_schedule(1.0, steps)
        self.optimizer = optax.sgd(schedule, momentum=0.9)
        if method.gradient:
            self.optimizer = optax.chain(method.gradient, self.optimizer)
        self.step = jax.jit(self._step)
        self.predict = jax.jit(self._predict)
        rows = np.arange(BATCH_SIZE)
        self.step.eval_shape(self.init(0), train[0][rows], train[1][rows], 0.1)

    def init(self, seed):
        variables = self.model.init(jax.random.key(seed), train[0][:2], False)
        params = variables["params"]
        return params, variables.get("batch_stats", {}), self.optimizer.init(params)

    def _step(self, state, images, labels, rate):
        params, batch_stats, opt_state = state
        if self.method.gate:
            batch_stats = cbn_jax.set_gate(batch_stats, self.method.gate(images))

        def loss_fn(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, updates = self.model.apply(
                variables, images, True, mutable="batch_stats"
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updates.get("batch_stats", {})

        gradients, batch_stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = self.optimizer.update(gradients, opt_state)
        updates = optax.tree.scale(rate, updates)
        return optax.apply_updates(params, updates), batch_stats, opt_state

    def train(self, rate, seed):
        state, rate = self.init(seed), rate * BATCH_SIZE / 32
        for rows in batches(EPOCHS, seed):
            start = time.perf_counter()
            state = self.step(state, train[0][rows], train[1][rows], rate)
            jax.block_until_ready(state)
            self.seconds.append(time.perf_counter() - start)
        return state

    def _predict(self, state, images):
        params, batch_stats, _ = state
        return self.model.apply(
            {"params": params, "batch_stats": batch_stats}, images, False
        )


# %% [markdown]
# Each method trains at each rate with two seeds; the rate that is best on the validation
# images then trains with three other seeds, and only these are tested. Methods take turns,
# so that a busy moment of the machine hits all of them.


# %%
def trainers(network):
    """Those methods that accept the network at this batch size."""
    found = {}
    for name, method in METHODS.items():
        try:
            found[name] = Trainer(network, method)
        except ValueError as error:
            print(f"{name} is left out of {network}: {error}")
    return found


def trial(trainers, rates, seed, part):
    """Trains every method once; states, and accuracies on a part of the data, in %."""
    states, accuracies = {}, {}
    for name, trainer in trainers.items():
        source = trainer.method.weights
        states[name] = states[source] if source else trainer.train(rates[name], seed)
        predicted = trainer.predict(states[name], part[0]).argmax(-1)
        accuracies[name] = 100 * float((predicted == part[1]).mean())
        bar.update()
    return states, accuracies


def choose(trainers):
    """The rate of each method, the best on the validation images."""
    tuned = {}
    for rate in RATES:
        rates = dict.fromkeys(trainers, rate)
        found = [
            trial(trainers, rates, seed, validation)[1] for seed in range(TUNING_SEEDS)
        ]
        tuned[rate] = {name: np.mean([one[name] for one in found]) for name in trainers}
    return {
        name: max(RATES, key=lambda rate: tuned[rate][trainer.method.weights or name])
        for name, trainer in trainers.items()
    }


def compare(network):
    """One row of results for each method."""
    made = trainers(network)
    rates = choose(made)
    seeds = range(TUNING_SEEDS, TUNING_SEEDS + SEEDS)
    trials = [trial(made, rates, seed, test) for seed in seeds]
    states = trials[0][0]
    return {
        name: {
            "accuracy": np.array([accuracies[name] for _, accuracies in trials]),
            "rate": rates[name],
            "seconds": np.median(trainer.seconds or np.nan),
            "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(states[name][1])),
        }
        for name, trainer in made.items()
    }


RUNS = len(RATES) * TUNING_SEEDS + SEEDS
with tqdm(total=len(NETWORKS) * len(METHODS) * RUNS) as bar:
    results = {network: compare(network) for network in NETWORKS}

# %% [markdown]
# ## The results


# %%
def spread(accuracy):
    """Mean ± standard error, which takes two seeds or more."""
    if len(accuracy) == 1:
        return f"{accuracy[0]:.1f}"
    return f"{accuracy.mean():.1f} ± {accuracy.std(ddof=1) / np.sqrt(len(accuracy)):.1f}"


def table(results):
    """Markdown, for each network the best first."""
    head = ("network", "method", "paper", "test, %", "rate", "step / batch_norm", "state")
    lines = [head, ("---",) * len(head)]
    for network, found in results.items():
        baseline = found.get("batch_norm", {"seconds": np.nan})["seconds"]
        for name, row in sorted(
            found.items(), key=lambda item: -item[1]["accuracy"].mean()
        ):
            ratio = row["seconds"] / baseline
            lines.append(
                (
                    *(network, name, METHODS[name].paper, spread(row["accuracy"])),
                    *(f"{row['rate']:g}", f"{ratio:.1f}" if np.isfinite(ratio) else "–"),
                    f"{row['bytes'] / 1024:,.1f} KiB",
                )
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


display(Markdown(table(results)))

# %% [markdown]
# *test*: accuracy, mean ± standard error over seeds; *rate*: the chosen one, per 32
# examples; *step*: median time of a training step over that of batch norm, rough, as other
# programs and the call itself count too (–: nothing was trained); *state*: what the
# normalizers keep, all layers together.


# %%
def draw(axis, found, names):
    """A line for each method: a dot for each seed, a bar at the mean."""
    for height, name in enumerate(names):
        if name in found:
            error = 100 - found[name]["accuracy"]
            color, marker = METHODS[name].look.split()
            axis.plot(error, [height] * len(error), marker, color=color, ms=6, alpha=0.7)
            axis.plot(error.mean(), height, "|", color="black", ms=16, mew=2)
    axis.set(xscale="log", xlabel="test error, %")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())


first = results[NETWORKS[0]]
names = sorted(first, key=lambda name: first[name]["accuracy"].mean())
size = (4.5 * len(NETWORKS) + 1, 4.2)
figure, axes = plt.subplots(1, len(NETWORKS), figsize=size, sharey=True, squeeze=False)
for axis, (network, found) in zip(axes[0], results.items(), strict=True):
    draw(axis, found, names)
    axis.set_title(f"{network}, batch size {BATCH_SIZE}")
axes[0, 0].set_yticks(range(len(names)), names)
figure.suptitle("a dot for each seed, a bar at their mean")
plt.show()

# %% [markdown]
# ## How to read it
#
# Two methods are told apart only if their means differ by more than two standard errors,
# $2\sqrt{s_1^2 + s_2^2}$, and with three seeds even that is a rough rule. In the run shown,
# at batch size 2:
#
# - On the MLP, `small_batch_norm`, both forms of `cross_iteration_batch_norm` and
#   `group_norm` are not told apart. The first three take statistics from earlier batches
#   too, `group_norm` takes them from other features. `batch_norm` of two examples gets
#   about half of the test images right. `corrected_inference`, `centralize` and
#   `diminishing_batch_norm` do not mend that. `group_batch_norm` lands in between, and
#   `adaptive_batch_norm` ends at chance.
# - On the CNN, where every feature has many positions, `batch_norm` works.
#   `adaptive_batch_norm`, `group_norm` and `cross_iteration_batch_norm` as published are
#   behind it after so few steps; all others are not told apart from it.
#
# So the network decides as much as the data. A step of `small_batch_norm` costs more than
# one of `batch_norm`, and `cross_iteration_batch_norm` keeps the most state.
#
# **What to change.** `DATASET` and `BATCH_SIZE`; then `EPOCHS` and `EXAMPLES`, until the
# accuracies are those that you care about, and `SEEDS`, until the standard errors are small
# enough. Widen `RATES` if the chosen ones lie at an end of the range. Methods that refuse a
# batch size say so and are left out. Your own network goes beside `MLP` and `CNN`.
#
# **What is known already.** The library's own study has batch sizes 1 to 32, four rates,
# more epochs and images, a larger CNN, and Fashion-MNIST:
# [accuracy against batch size](https://github.com/cbn-jax/cbn_jax/blob/main/benchmarks/README.md#accuracy-against-batch-size).
# On its CNN at batch size 2, group norm and cross-iteration as published are within some
# two points of batch norm.
