# SPDX-License-Identifier: Apache-2.0
"""One picture of the idea of each method, made by the methods themselves.

Statistics are shown for a dense layer with Gaussian inputs and rotating weights, whose true
standard deviation is known. The pictures show the median and the range of many independent
runs. The other pictures show the effect of a method on one small example. Nothing is
trained here.

Run it with ``python -m benchmarks.studies.ideas``.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax
from benchmarks.lib.optional import needed_for
from cbn_jax.assessment import assess

with needed_for("benchmarks"):
    import matplotlib.figure
    import tyro
    from rich.console import Console
    from sklearn.datasets import load_digits

    from cbn_jax.optax import centralize

from benchmarks.lib import report, study

WINDOW = 16
# Name -> the method, and its examples per step.
FOLLOWED: dict[str, tuple[cbn_jax.Estimator, int]] = {
    "batch of 2": (cbn_jax.batch_norm(), 2),
    "batch of 32": (cbn_jax.batch_norm(), 32),
    "batch of 8": (cbn_jax.batch_norm(), 8),
    "cross_iteration_batch_norm-uncompensated": (
        cbn_jax.cross_iteration_batch_norm(WINDOW, rho=0.0),
        2,
    ),
    "cross_iteration_batch_norm": (cbn_jax.cross_iteration_batch_norm(WINDOW), 2),
    "streaming_batch_norm": (cbn_jax.streaming_batch_norm(WINDOW), 2),
    "replay_batch_norm": (cbn_jax.replay_batch_norm(WINDOW, samples=2), 2),
    **{f"small_batch_norm {n}": (cbn_jax.small_batch_norm(n), n) for n in (1, 2, 8)},
    "diminishing 0.25": (cbn_jax.diminishing_batch_norm(0.25), 2),
    "diminishing 0.05": (cbn_jax.diminishing_batch_norm(0.05), 2),
    "diminishing 1/m": (cbn_jax.diminishing_batch_norm(cbn_jax.diminishing(1.0)), 2),
}
# Methods whose normalized values are drawn -> the titles.
NORMALIZED = {
    "batch of 2": "batch_norm, batch size 2",
    "small_batch_norm 2": "small_batch_norm, batch size 2",
    "batch of 32": "batch_norm, batch size 32",
}
COMPANIONS = 3  # other examples in a batch, in the picture of corrected inference


@dataclasses.dataclass(frozen=True)
class Config:
    """Options of the pictures."""

    runs: int = 400
    """Number of independent runs for each range."""
    steps: int = 120
    """Number of steps in which the weights turn."""
    inputs: int = 16
    """Input features of the layer."""
    seed: int = 0
    """Seed of all random draws."""
    output: Annotated[Path, tyro.conf.arg(metavar="FOLDER")] = Path("results/ideas")
    """Folder for results.json, table.md and the pictures."""


def main(config: Config, console: Console) -> dict:
    """Runs every method, writes the results and draws them."""
    with console.status("running every method"):
        found = {
            **_followed(config),
            "normalized": _normalized(config),
            "response": _response(config),
            "gradient": _gradient(config),
            "assessment": _assessment(config),
            "means": _means(config),
        }
    return study.publish(config, found, console, markdown, **FIGURES)


def _followed(config: Config) -> dict:
    """The true standard deviation at every step, and the estimate of each method."""
    _, truth = _turning(config)
    levels = jnp.array([0.1, 0.5, 0.9])
    quantiles = {
        name: _rounded(jnp.quantile(_runs(config, *method, _deviation), levels, axis=0))
        for name, method in FOLLOWED.items()
    }
    return {"truth": _rounded(truth), "estimated": quantiles}


def _normalized(config: Config) -> dict:
    """Histograms of the normalized values, from the step at which the window is full."""
    edges = np.linspace(-3, 3, 61)
    counts = {
        name: np.histogram(_runs(config, *FOLLOWED[name], _values)[:, WINDOW:], edges)[0]
        for name in NORMALIZED
    }
    return {"edges": _rounded(edges), **{name: c.tolist() for name, c in counts.items()}}


def _turning(config: Config) -> tuple[jax.Array, jax.Array]:
    """Weights at every step, and the true standard deviation of the layer's output."""
    turn = 0.9 * jnp.pi * jnp.sin(jnp.pi * jnp.arange(config.steps) / 60) ** 2 / 2
    weights = jnp.zeros((config.steps, config.inputs, 1))
    weights = weights.at[:, 0, 0].set(jnp.cos(turn)).at[:, -1, 0].set(jnp.sin(turn))
    return weights, jnp.sqrt((_spectrum(config)[:, None] * weights**2).sum((1, 2)))


def _spectrum(config: Config) -> jax.Array:
    """Variances of the inputs."""
    return jnp.geomspace(9.0, 0.1, config.inputs)


def _runs(config: Config, estimator: cbn_jax.Estimator, size: int, read: Any) -> jax.Array:
    """A quantity of every step, in many independent runs."""
    weights, _ = _turning(config)
    keys = jax.random.split(jax.random.key(config.seed), config.runs)

    def step(state, at):
        theta, key = at
        z = jax.random.normal(key, (size, config.inputs)) * jnp.sqrt(_spectrum(config))
        x, source = cbn_jax.run_layer(cbn_jax.dense, theta, z)
        statistics, state = estimator.train(state, x, source)
        return state, read(x, statistics)

    def run(key):
        state = estimator.init(1, cbn_jax.dense, weights[0])
        return jax.lax.scan(step, state, (weights, jax.random.split(key, config.steps)))

    return jax.jit(jax.vmap(run))(keys)[1]


def _deviation(x: jax.Array, statistics: cbn_jax.Statistics) -> jax.Array:
    return 1 / statistics.inv_std[0]


def _values(x: jax.Array, statistics: cbn_jax.Statistics) -> jax.Array:
    return cbn_jax.normalize(x, statistics)[:, 0]


def _response(config: Config) -> dict:
    """Output for an example in training and in inference, over its input."""
    x = jnp.linspace(-4, 4, 81)
    estimator = cbn_jax.batch_norm()
    state = cbn_jax.from_batch_stats(jnp.zeros(1), jnp.ones(1))
    corrected = cbn_jax.corrected_inference(estimator, examples=1 + COMPANIONS)
    drawn = jax.random.normal(jax.random.key(config.seed), (10 * config.runs, COMPANIONS))

    def training(x, others):
        batch = jnp.append(x, others)[:, None]
        statistics, _ = estimator.train(estimator.init(1), batch)
        return cbn_jax.normalize(batch, statistics)[0, 0]

    answers = jax.vmap(jax.vmap(training, (None, 0)), (0, None))(x, drawn)

    def inference(estimator):
        column = x[:, None]
        return cbn_jax.normalize(column, estimator.infer(state, column))[:, 0]

    return {
        "x": _rounded(x),
        "training": _rounded(jnp.quantile(answers, jnp.array([0.1, 0.5, 0.9]), axis=1)),
        "ordinary": _rounded(inference(estimator)),
        "corrected": _rounded(inference(corrected)),
    }


def _gradient(config: Config) -> dict:
    """The gradient of a dense kernel behind a ReLU, before and after."""
    kernel, z, target = (
        jax.random.normal(jax.random.fold_in(jax.random.key(config.seed), i), shape)
        for i, shape in enumerate([(12, 16), (32, 12), (32, 16)])
    )

    def loss(kernel):
        return jnp.square(jax.nn.relu((1 + z) @ kernel / 4) - target).mean()

    gradient = jax.grad(loss)(kernel)
    after, _ = centralize().update(gradient, ())
    return {"before": _rounded(gradient), "after": _rounded(after)}


def _assessment(config: Config) -> dict:
    """Training batches of four digits: the two extremes, and all in a histogram."""
    digits: Any = load_digits()
    images = digits.images.astype(np.float32) / 16
    order = np.random.default_rng(config.seed).permutation(len(images))
    batches = images[order[: len(images) // 4 * 4]].reshape(-1, 4, 8, 8, 1)
    found = assess(batches, "examples")
    counts, edges = np.histogram(found.values, bins=40)
    return {
        "extremes": {
            "least": _rounded(batches[found.values.argmin(), ..., 0]),
            "most": _rounded(batches[found.values.argmax(), ..., 0]),
        },
        "threshold": found.threshold,
        "counts": counts.tolist(),
        "edges": _rounded(edges),
    }


def _means(config: Config) -> dict:
    """The mean subtracted from each value of a batch, for three weights of the group."""
    key = jax.random.key(config.seed)
    keys = jax.random.split(key, 3)
    x = (
        jax.random.normal(keys[0], (6, 1))
        + jax.random.normal(keys[1], (1, 8))
        + 0.5 * jax.random.normal(keys[2], (6, 8))
    )

    def mean(mix):
        estimator = cbn_jax.group_batch_norm(mix, num_groups=2, order="parallel")
        statistics, _ = estimator.train(estimator.init(8), x)
        return jnp.broadcast_to(statistics.mean, x.shape)

    return {"x": _rounded(x), **{str(w): _rounded(mean(w)) for w in (0.0, 0.5, 1.0)}}


def _rounded(values: Any) -> list:
    return np.round(np.asarray(values, np.float64), 4).tolist()


def markdown(results: dict) -> str:
    """The error of each method."""
    truth = np.array(results["truth"])
    rows = []
    for name, quantiles in results["estimated"].items():
        low, middle, high = np.log(np.array(quantiles) / truth)[:, WINDOW:]
        rows.append((name, f"{abs(middle).mean():.2f}", f"{(high - low).mean():.2f}"))
    config = results["config"]
    return (
        report.markdown_table(("method", "error", "range"), rows)
        + "\nBoth are logs of the ratio of the estimated to the true deviation, means over "
        f"the steps from {WINDOW} on. Error: distance of the median of {config['runs']} "
        "runs from 0. Range: from the 10th to the 90th percentile of the runs. "
        f"{study.measured_on(results)}\n"
    )


def caption(results: dict) -> str:
    """What moves in the pictures of statistics that follow the weights."""
    return (
        "The weights of one feature turn away and back, so its true standard deviation "
        "(dashed) falls and rises. Line: median of the estimates in "
        f"{results['config']['runs']} runs. Band: 10th to 90th percentile."
    )


# Each method has one color in all pictures.
_COLORS = {
    "batch": 0,
    "cross_iteration_batch_norm-uncompensated": 1,
    "cross_iteration_batch_norm": 1,
    "small_batch_norm": 2,
    "streaming_batch_norm": 2,
    "diminishing": 4,
    "replay_batch_norm": 5,
}


def _following(*names: str, titles: tuple[str, ...] = ()) -> Callable[[dict, Path], None]:
    """One panel per method: the true value and the estimates."""

    @report.drawn
    def figure(results: dict) -> Any:
        made = matplotlib.figure.Figure((1 + 3.1 * len(names), 2.9))
        axes = made.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axis, name, title in zip(axes, names, titles or names, strict=True):
            low, middle, high = results["estimated"][name]
            steps = np.arange(1, len(middle) + 1)
            color = report.COLORS[_COLORS[name.split()[0]]]
            axis.fill_between(steps, low, high, color=color, alpha=0.25, lw=0)
            axis.plot(steps, middle, color=color, label="estimated: median, 10 to 90 %")
            axis.plot(steps, results["truth"], "k--", lw=1.2, label="true")
            axis.set(title=title, xlabel="step")
        axes[0].set_ylabel("standard deviation of a feature")
        axes[0].set_ylim(bottom=0)
        report.legend_below(made)
        return made

    return figure


@report.drawn
def _draw_normalized(results: dict) -> Any:
    found = results["normalized"]
    made = matplotlib.figure.Figure((9.3, 2.6))
    axes = made.subplots(1, len(NORMALIZED), sharey=True)
    edges = np.array(found["edges"])
    for axis, (name, title) in zip(axes, NORMALIZED.items(), strict=True):
        color = report.COLORS[_COLORS[name.split()[0]]]
        share = 100 * np.array(found[name]) / sum(found[name])
        axis.bar(edges[:-1], share, np.diff(edges), align="edge", color=color)
        axis.set(title=title, xlabel="normalized value")
    axes[0].set_ylabel("share of values, %")
    return made


@report.drawn
def _draw_response(results: dict) -> Any:
    found = results["response"]
    made = matplotlib.figure.Figure((5.2, 3.4))
    axis = made.subplots()
    low, middle, high = found["training"]
    axis.fill_between(found["x"], low, high, color=report.COLORS[6], alpha=0.3, lw=0)
    axis.plot(found["x"], middle, color=report.COLORS[6], label="in training")
    for name, index, style in (("ordinary", 0, "--"), ("corrected", 2, "-")):
        label = f"{name} inference"
        axis.plot(found["x"], found[name], style, color=report.COLORS[index], label=label)
    axis.set_xlabel("value of an example, true standard deviations")
    axis.set_ylabel("normalized")
    axis.set_title(f"batch size {1 + COMPANIONS}; training: median, 10 to 90 %")
    axis.legend()
    return made


@report.drawn
def _draw_gradient(results: dict) -> Any:
    found = results["gradient"]
    made = matplotlib.figure.Figure((7.2, 3.2))
    axes = made.subplots(2, 2, sharex=True, height_ratios=[3, 1])
    most = np.abs(found["before"]).max()
    for column, name in zip(axes.T, ("before", "after"), strict=True):
        gradient = np.array(found[name])
        column[0].imshow(gradient, "PuOr", aspect="auto", vmin=-most, vmax=most)
        column[0].set_title(f"gradient of a kernel, {name}")
        column[0].grid(visible=False)
        column[1].bar(np.arange(gradient.shape[1]), gradient.mean(0), color="0.3")
        column[1].set_xlabel("filter")
        column[1].set_ylim(axes[1][0].get_ylim())
    axes[0][0].set_ylabel("input")
    axes[1][0].set_ylabel("mean")
    made.colorbar(axes[0][0].images[0], ax=axes[0], shrink=0.9)
    return made


@report.drawn
def _draw_assessment(results: dict) -> Any:
    found = results["assessment"]
    made = matplotlib.figure.Figure((8.6, 2.8))
    halves: Any = made.subfigures(1, 2, width_ratios=[1, 1.2])
    left, right = halves
    rows = left.subplots(2, 4)
    for row, (name, images) in zip(rows, found["extremes"].items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image, "gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    left.suptitle("the least and the most heterogeneous batch")
    edges = np.array(found["edges"])
    above = edges[:-1] > found["threshold"]
    axis = right.subplots()
    for chosen, index, label in ((above, 0, "normalized"), (~above, 1, "left as they are")):
        bars = edges[:-1][chosen], np.array(found["counts"])[chosen]
        look = {"color": report.COLORS[index], "label": label, "align": "edge"}
        axis.bar(*bars, np.diff(edges)[chosen], **look)
    axis.axvline(found["threshold"], color="black", lw=1, ls="--", label="threshold")
    axis.set(xlabel="heterogeneity of a batch of four", ylabel="training batches")
    report.legend_below(right)
    return made


@report.drawn
def _draw_means(results: dict) -> Any:
    found = results["means"]
    titles = {
        "x": "values of a batch",
        "1.0": "w = 1: means of groups",
        "0.5": "w = 0.5: mixed",
        "0.0": "w = 0: means of the batch",
    }
    made = matplotlib.figure.Figure((9.6, 2.5))
    most = np.abs(found["x"]).max()
    axes = made.subplots(1, 4, sharey=True)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        axis.imshow(found[name], "PuOr", vmin=-most, vmax=most)
        axis.axvline(3.5, color="black", lw=1)
        axis.set(title=title, xlabel="feature, two groups", xticks=[], yticks=[])
        axis.grid(visible=False)
    axes[0].set_ylabel("example")
    made.colorbar(axes[0].images[0], ax=axes, shrink=0.8)
    return made


# Name of the file -> the function that draws it from the results.
FIGURES = {
    "normalized": _draw_normalized,
    "batch_norm": _following("batch of 2", "batch of 8", "batch of 32"),
    "small_batch": _following(
        "small_batch_norm 1",
        "small_batch_norm 2",
        "small_batch_norm 8",
        titles=("batch size 1", "batch size 2", "batch size 8"),
    ),
    "cross_iteration": _following(
        "batch of 2",
        "cross_iteration_batch_norm-uncompensated",
        "cross_iteration_batch_norm",
        titles=("one batch of 2", "16 batches as they are", "16 batches, compensated"),
    ),
    "streaming": _following(
        "cross_iteration_batch_norm",
        "streaming_batch_norm",
        titles=("compensated to first order", "moved in every step"),
    ),
    "replay": _following(
        "cross_iteration_batch_norm",
        "replay_batch_norm",
        titles=("compensated to first order", "inputs seen again"),
    ),
    "diminishing": _following(
        "diminishing 0.25",
        "diminishing 0.05",
        "diminishing 1/m",
        titles=("α = 0.25", "α = 0.05", "α = 1/m"),
    ),
    "corrected_inference": _draw_response,
    "centralize": _draw_gradient,
    "adaptive": _draw_assessment,
    "group_batch": _draw_means,
}


if __name__ == "__main__":
    study.cli(Config, main)
