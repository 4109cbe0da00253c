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
# # A U-Net at batch size 1
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/cbn-jax/cbn_jax/blob/main/colabs/unet.ipynb)
#
# A network that labels every pixel needs much memory. Often there is enough for one image a
# step. Which norm is best then? This notebook puts five norms into one U-Net, without an
# edit of the model, and draws the predicted masks.

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
from matplotlib.colors import ListedColormap
from sklearn.datasets import load_digits, load_sample_images
from tqdm import tqdm

from cbn_jax.linen import replace_batch_norm, report

plt.style.use("cbn_jax.figures")

# %% tags=["parameters"]
SEEDS = 3
EXAMPLES = 2000  # images for training, one a step

# %% [markdown]
# ## The task: digits on photographs
#
# Each image has four handwritten digits on a piece of a photograph. The network labels
# every pixel: background, or ink of a 0, 1, 2 or 3. Images differ in brightness and
# contrast, as exposures do. Digits and photographs come with scikit-learn.

# %%
CLASSES, SIDE = 5, 32
digits, digit_labels = load_digits(return_X_y=True)
digits = np.float32(digits / 16).reshape(-1, 8, 8)
photos = [np.float32(p[::2, ::2].mean(-1) / 255) for p in load_sample_images().images]


def scene(rng, rows):
    """An image, its true mask and its contrast."""
    photo = photos[rng.integers(2)]
    top, left = (rng.integers(n - SIDE) for n in photo.shape)
    image = 0.6 * photo[top : top + SIDE, left : left + SIDE]
    mask = np.zeros((SIDE, SIDE), np.int32)
    for corner, row in enumerate(rng.choice(rows, 4)):
        y, x = 16 * np.array(divmod(corner, 2)) + rng.integers(0, 9, 2)
        place, ink = (slice(y, y + 8), slice(x, x + 8)), digits[row]
        image[place] += ink * (1 - image[place])
        mask[place][ink > 0.5] = 1 + digit_labels[row]
    contrast = rng.uniform(0.1, 1)
    return (rng.uniform(0, 1 - contrast) + contrast * image)[..., None], mask, contrast


def scenes(count, first, last, seed):
    """Scenes of some of the digits, as arrays."""
    rng, rows = np.random.default_rng(seed), np.arange(first, last)
    rows = rows[digit_labels[rows] < CLASSES - 1]
    made = [scene(rng, rows) for _ in range(count)]
    return tuple(np.stack(each) for each in zip(*made, strict=True))


train_images, train_masks, _ = scenes(EXAMPLES, 0, 1200, seed=0)
validation = scenes(100, 1200, 1437, seed=1)
test = scenes(300, 1437, 1797, seed=2)

# %% [markdown]
# ## One model, five norms
#
# An ordinary Flax U-Net, with strides on the way down, transposed convolutions on the way
# up, and skip connections. Its code does not use this library. `replace_batch_norm` pairs
# each batch norm with the layer before it.


# %%
class UNet(nn.Module):
    """Predicts a class for every pixel."""

    @nn.compact
    def __call__(self, images, train):
        def active(layer, z):
            norm = nn.BatchNorm(use_running_average=not train, momentum=0.99)
            return nn.relu(norm(layer(z)))

        def conv(features, stride=1):
            return nn.Conv(features, (3, 3), stride, use_bias=False)

        def up(features):
            return nn.ConvTranspose(features, (2, 2), (2, 2), use_bias=False)

        fine = active(conv(8), images)
        middle = active(conv(16), active(conv(16, 2), fine))
        coarse = active(conv(32), active(conv(32, 2), middle))
        z = jnp.concatenate([active(up(16), coarse), middle], -1)
        z = jnp.concatenate([active(up(8), active(conv(16), z)), fine], -1)
        return nn.Dense(CLASSES)(active(conv(8), z))


def replaced(estimator, kernel=None):
    return replace_batch_norm(UNet(), estimator, kernel=kernel)


MODELS = {
    "nn.BatchNorm": UNet(),
    "small_batch_norm": replaced(cbn_jax.small_batch_norm(1)),
    "small_batch_norm, standardize": replaced(
        cbn_jax.small_batch_norm(1), cbn_jax.standardize
    ),
    "group_norm": replaced(cbn_jax.group_norm(4)),
    "group_norm, standardize": replaced(cbn_jax.group_norm(4), cbn_jax.standardize),
}
print(report(MODELS["small_batch_norm"], train_images[:1], True))

# %% [markdown]
# `small_batch_norm` uses the statistics of the last 32 images, converted to the current
# weights. `group_norm` normalizes each image by itself. `standardize` gives each filter of
# a convolution mean 0 and variance 1.
#
# ## One image a step
#
# Each method trains with Adam, at its own rate: the one with the best masks on validation
# images. The measure is the mean intersection over union (IoU) of the classes: the number
# of pixels in both masks, predicted and true, over the number of pixels in either.


# %%
def trainer(model):
    """Functions that train and that predict; both compile once for all rates and seeds."""
    optimizer = optax.scale_by_adam()
    init = jax.jit(model.init, static_argnums=2)

    @jax.jit
    def step(params, stats, opt_state, image, mask, rate):
        def loss_fn(params):
            given = {"params": params, "batch_stats": stats}
            logits, new = model.apply(given, image, True, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, mask)
            return losses.mean(), new.get("batch_stats", {})

        gradients, stats = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradients, opt_state)
        updates = jax.tree.map(lambda update: -rate * update, updates)
        return optax.apply_updates(params, updates), stats, opt_state

    def fit(seed, rate):
        """Trains with every image once; the variables."""
        variables = init(jax.random.key(seed), train_images[:1], True)
        params, stats = variables["params"], variables.get("batch_stats", {})
        opt_state = optimizer.init(params)
        decay = optax.cosine_decay_schedule(rate, EXAMPLES)(np.arange(EXAMPLES))
        order = np.random.default_rng(seed).permutation(EXAMPLES)
        for row, now in zip(order, np.array(decay), strict=True):
            given = train_images[row][None], train_masks[row][None], now
            params, stats, opt_state = step(params, stats, opt_state, *given)
        return {"params": params, "batch_stats": stats}

    return fit, jax.jit(lambda variables, images: predicted(model, variables, images))


def predicted(model, variables, images, train=False):
    """The masks."""
    return model.apply(variables, images, train, mutable=["batch_stats"])[0].argmax(-1)


def iou(masks, truth):
    """Mean over the classes, %."""
    pairs = [(masks == label, truth == label) for label in range(CLASSES)]
    return 100 * np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs])


# %%
RATES = (0.003, 0.01, 0.03)
trainers = {name: trainer(model) for name, model in MODELS.items()}
best, trained = {}, {}
print(f"{'IoU on validation images at rate':34}", *(f"{rate:6g}" for rate in RATES))
for name, (fit, predict) in tqdm(trainers.items()):
    tried = [fit(0, rate) for rate in RATES]
    found = [iou(np.array(predict(each, validation[0])), validation[1]) for each in tried]
    best[name] = RATES[np.argmax(found)]
    trained[name] = [tried[np.argmax(found)]]
    print(f"{name:34}", *(f"{score:4.0f} %" for score in found))

# %% [markdown]
# The other seeds train at the best rate.

# %%
for name, (fit, _) in tqdm(trainers.items()):
    trained[name] += [fit(seed, best[name]) for seed in range(1, SEEDS)]

# %% [markdown]
# ## Who wins?
#
# Mean and standard deviation over the seeds, on test images:

# %%
images, truth, contrasts = test
masks = {
    name: [np.array(trainers[name][1](each, images)) for each in trained[name]]
    for name in MODELS
}
scores = {name: [iou(each, truth) for each in masks[name]] for name in MODELS}
for name, found in scores.items():
    print(f"{name:29} {np.mean(found):.1f} ± {np.std(found):.1f} %")

# %% [markdown]
# The masks on the image of lowest, of median and of highest contrast, from the first seed:

# %%
shown = np.argsort(contrasts)[[0, len(images) // 2, -1]]
colors = ListedColormap(["#e8e8e8", "#0072B2", "#E69F00", "#009E73", "#D55E00"])
figure, axes = plt.subplots(len(shown), 2 + len(MODELS), figsize=(9, 4.4))
for row, place in zip(axes, shown, strict=True):
    row[0].imshow(images[place, ..., 0], cmap="gray", vmin=0, vmax=1)
    for axis, mask in zip(row[1:], [truth, *(m[0] for m in masks.values())], strict=True):
        axis.imshow(mask[place], cmap=colors, vmin=0, vmax=4, interpolation="nearest")
for axis in axes.flat:
    axis.axis("off")
titles = ["image", "truth"]
titles += [f"{name}\n{np.mean(scores[name]):.0f} % IoU" for name in MODELS]
for axis, title in zip(axes[0], titles, strict=True):
    axis.set_title(title.replace(", ", "\n"), fontsize=8)
figure.suptitle("nn.BatchNorm fails on low contrast; group norm, standardized, is ahead")
plt.show()

# %%
quarters = np.array_split(np.argsort(contrasts), 4)
places = [contrasts[rows].mean() for rows in quarters]
figure, axis = plt.subplots(figsize=(6.4, 2.8))
looks = ("C0", "-"), ("C2", "-"), ("C2", "--"), ("C3", "-"), ("C3", "--")
for name, (color, style) in zip(MODELS, looks, strict=True):
    curve = [
        np.mean([iou(mask[rows], truth[rows]) for mask in masks[name]]) for rows in quarters
    ]
    axis.plot(places, curve, style, marker="o", color=color, label=name)
axis.set(xlabel="contrast of the images", ylabel="mean IoU, %", ylim=(0, None))
axis.set_title("Only nn.BatchNorm depends much on the contrast")
figure.legend(loc="outside right upper")
plt.show()

# %% [markdown]
# ## Why does batch norm fail?
#
# With one image a step, batch norm normalizes each image by itself in training. In
# inference it uses averages over many images. The network did not train with these. This
# cell gives each test image its own statistics, as in training:


# %%
@jax.jit
def alone(variables, images):
    """Masks of batch norm, one image a batch, with `train=True`."""

    def mask(image):
        return predicted(UNet(), variables, image[None], train=True)[0]

    return jax.vmap(mask)(images)


found = [iou(np.array(alone(each, images)), truth) for each in trained["nn.BatchNorm"]]
print(f"nn.BatchNorm, train=True      {np.mean(found):.1f} ± {np.std(found):.1f} %")

# %% [markdown]
# The masks are better, with the same parameters. So the averages of inference fail, and not
# the training. [`corrected_inference`](https://github.com/cbn-jax/cbn_jax/blob/main/docs/methods/corrected_inference.md)
# lets a network that batch norm trained on single images predict as in training.
#
# ## Which norm for which case?
#
# - To train from scratch with one image a step, take `group_norm` with
#   `kernel=cbn_jax.standardize`. It was ahead here, as it was on [tiles of a
#   map](https://github.com/cbn-jax/cbn_jax/blob/main/benchmarks/README.md#one-map-tile-a-step).
#   It normalizes each image by itself, in training and in inference alike.
# - `small_batch_norm` was behind `group_norm`, with standardized kernels and without. The
#   differences are about as large as the spread of the seeds. Its statistics agree in
#   training and inference, so it does not fail on low contrast as batch norm does.
# - To fine-tune a network that batch norm trained, take `small_batch_norm`. It applies
#   unchanged: it keeps the trained parameters, kernels and averages. Group norm would
#   change the function that the network computes. See [fine-tune a trained
#   network](https://github.com/cbn-jax/cbn_jax/blob/main/colabs/fine_tuning.ipynb).
#
# [How to choose](https://github.com/cbn-jax/cbn_jax/blob/main/docs/choose.md) has the other
# cases.
