# SPDX-License-Identifier: Apache-2.0
"""One training loop for every benchmark: a jitted step called from Python."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import optax
    from flax import linen as nn

    from cbn_jax.optax import centralize, with_backward_statistics

from benchmarks.lib.checkpoints import Checkpoints
from benchmarks.lib.data import Dataset

Pairing = Literal["independent", "one class"]  # the examples of a batch
Optimizer = Callable[[float, int], optax.GradientTransformation]


class TrainState(NamedTuple):
    """The state of a run."""

    params: Any
    batch_stats: Any
    opt_state: Any


class Progress(NamedTuple):
    """The progress of a run after some of its steps."""

    step: int
    loss: float  # mean over the steps since the last report
    accuracy: float  # on the test images


class Trainer(NamedTuple):
    """The pure functions of a run; ``step`` is jitted and donates the state."""

    init: Callable[[jax.Array], TrainState]
    step: Callable[..., tuple[TrainState, jax.Array]]
    evaluate: Callable[[TrainState, jax.Array, jax.Array], jax.Array]


def _sgd(learning_rate: float, steps: int) -> optax.GradientTransformation:
    """SGD with momentum 0.9 and a cosine schedule."""
    return optax.sgd(optax.cosine_decay_schedule(learning_rate, steps), momentum=0.9)


def _adam(*after_scaling: optax.GradientTransformation) -> Optimizer:
    def make(learning_rate, steps):
        schedule = optax.cosine_decay_schedule(learning_rate, steps)
        scale = optax.scale_by_learning_rate(schedule)
        return optax.chain(optax.scale_by_adam(), *after_scaling, scale)

    return make


# Peak learning rate and number of steps -> optimizer.
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": _sgd,
    "sgd_centralized": lambda rate, steps: optax.chain(centralize(), _sgd(rate, steps)),
    "adam": _adam(),
    "adam_centralized": _adam(centralize()),
    "adagrad": lambda rate, steps: optax.adagrad(rate),
}


def make_trainer(
    model: nn.Module, image_shape: tuple[int, ...], optimizer: optax.GradientTransformation
) -> Trainer:
    """The pure functions that train a model."""
    optimizer = with_backward_statistics(optimizer)

    def init(key: jax.Array) -> TrainState:
        variables = model.init(key, jnp.ones((2, *image_shape)), train=False)
        params = variables["params"]
        return TrainState(params, variables.get("batch_stats", {}), optimizer.init(params))

    def step(state, images, labels, rows):
        """A step that selects rows on the device, so that the host sends only indices."""

        def loss_fn(params):
            logits, updates = model.apply(
                {"params": params, "batch_stats": state.batch_stats},
                images[rows],
                train=True,
                mutable=["batch_stats"],
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
            return losses.mean(), updates.get("batch_stats", {})

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, batch_stats), gradients = gradient(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, batch_stats, opt_state), loss

    def evaluate(state, images, labels):
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        logits: Any = model.apply(variables, images, train=False)
        return jnp.mean(logits.argmax(-1) == labels)

    return Trainer(jax.jit(init), jax.jit(step, donate_argnums=0), jax.jit(evaluate))


def batches(examples: int, batch_size: int, epochs: int, seed: int) -> Iterator[np.ndarray]:
    """Rows of every step; each epoch reshuffles and drops an incomplete batch."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(examples).astype(np.int32)
        yield from order[: examples - examples % batch_size].reshape(-1, batch_size)


def batches_of_one_class(
    labels: np.ndarray, batch_size: int, epochs: int, seed: int
) -> Iterator[np.ndarray]:
    """Rows of every step, each of one class; incomplete batches of a class are dropped."""
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        rows = []
        for label in np.unique(labels):
            own = rng.permutation(np.flatnonzero(labels == label)).astype(np.int32)
            rows.extend(own[: len(own) - len(own) % batch_size].reshape(-1, batch_size))
        yield from rng.permutation(np.stack(rows))


def rows_of(
    dataset: Dataset, pairing: Pairing, batch_size: int, epochs: int, seed: int
) -> list[np.ndarray]:
    """Rows of every step of a run."""
    count_steps(dataset, batch_size, epochs)
    if pairing == "one class":
        labels = dataset.train_labels
        return list(batches_of_one_class(labels, batch_size, epochs, seed))
    return list(batches(len(dataset.train_labels), batch_size, epochs, seed))


def count_steps(dataset: Dataset, batch_size: int, epochs: int) -> int:
    """Number of steps of a run."""
    steps = len(dataset.train_labels) // batch_size * epochs
    if steps == 0:
        raise ValueError(
            f"batch size {batch_size} and {epochs} epochs on {len(dataset.train_labels)} "
            "examples give no step, expected at least one; take a smaller --batch-size."
        )
    return steps


def train(
    trainer: Trainer, dataset: Dataset, rows: Iterable[np.ndarray], state: TrainState
) -> Iterator[tuple[TrainState, jax.Array]]:
    """State and loss after each step; a state, even the first, is valid until the next."""
    arrays = jax.device_put((dataset.train_images, dataset.train_labels))
    for chosen in rows:
        state, loss = trainer.step(state, *arrays, chosen)
        yield state, loss


def run(
    trainer: Trainer,
    dataset: Dataset,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    pairing: Pairing = "independent",
    reports: int = 20,
    checkpoints: Checkpoints | None = None,
) -> Iterator[Progress]:
    """Trains, and reports at evenly spaced steps, including the last one.

    With checkpoints, every fifth report is saved together with the state and the earlier
    reports. Saved steps are not run again.
    """
    rows = rows_of(dataset, pairing, batch_size, epochs, seed)
    steps, losses = len(rows), []
    marks = set(np.linspace(0, steps, reports + 1).round().astype(int)[1:].tolist())
    test = jax.device_put((dataset.test_images, dataset.test_labels))
    start, curve = trainer.init(jax.random.key(seed)), []
    if checkpoints is not None:
        start, saved = checkpoints.restore(start)
        curve = list(itertools.starmap(Progress, saved))
        yield from curve
    done = curve[-1].step if curve else 0
    rest = train(trainer, dataset, rows[done:], start)
    for step, (state, loss) in enumerate(rest, done + 1):
        losses.append(loss)
        if step in marks:
            accuracy = trainer.evaluate(state, *test)
            mean = float(np.mean(jax.device_get(losses)))
            curve.append(Progress(step, mean, float(accuracy)))
            if checkpoints is not None and (len(curve) % 5 == 0 or step == steps):
                checkpoints.save(step, state, curve)
            yield curve[-1]
            losses = []
