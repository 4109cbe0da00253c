# SPDX-License-Identifier: Apache-2.0
"""Training in replicas: norm batches that are normalized separately, in one step."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import cbn_jax
from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import optax
    from flax import linen as nn

    from cbn_jax.optax import with_backward_statistics


class State(NamedTuple):
    """The state of a run; ``batch_stats`` has a first axis of replicas."""

    params: Any
    batch_stats: Any
    opt_state: Any


class Trainer(NamedTuple):
    """The pure functions of all runs that differ only in rate and seed.

    Attributes:
      init: ``(key, rate) -> state``.
      step: ``(state, images, labels, rows) -> (state, loss)``. ``rows`` is
        ``[replicas, norm batch]``. It donates the state.
      remember: ``(params, images, batch_stats, rows) -> batch_stats`` of one replica, after
        one norm batch.
      classes: ``(state, images) -> classes``, with the mean state of all replicas.
      confusion: ``(state, images, labels) -> [classes, classes]``, how often each class
        (row) was predicted for each (column).
    """

    init: Any
    step: Any
    remember: Any
    classes: Any
    confusion: Any


def make_trainer(
    model: nn.Module, shape: tuple[int, ...], classes: int, replicas: int, optimizer: Any
) -> Trainer:
    """A trainer on images of one shape; the peak rate is in the optimizer's state."""
    optimizer = with_backward_statistics(optimizer)

    def init(key, rate):
        variables = model.init(key, jnp.ones((2, *shape)), train=False)
        params, stats = variables["params"], variables.get("batch_stats", {})
        stats = jax.tree.map(lambda leaf: jnp.repeat(leaf[None], replicas, 0), stats)
        opt_state: Any = optimizer.init(params)
        opt_state.hyperparams["rate"] = rate
        return State(params, stats, opt_state)

    def step(state, images, labels, rows):
        def replica(params, stats, rows):
            variables = {"params": params, "batch_stats": stats}
            logits, updates = model.apply(
                variables, images[rows], train=True, mutable=["batch_stats"]
            )
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows])
            return losses.mean(), updates.get("batch_stats", {})

        def loss_fn(params):
            losses, stats = _each(replica, params, state.batch_stats, rows)
            return losses.mean(), stats

        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), gradients = gradient(state.params)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return State(optax.apply_updates(state.params, updates), stats, opt_state), loss

    def remember(params, images, stats, rows):
        variables = {"params": params, "batch_stats": stats}
        _, updates = model.apply(
            variables, images[rows], train=True, mutable=["batch_stats"]
        )
        return updates["batch_stats"]

    def predict(state, images):
        stats = jax.tree.map(lambda leaf: leaf.mean(0), state.batch_stats)
        variables = {"params": state.params, "batch_stats": stats}
        logits: Any = model.apply(variables, images, train=False)
        return logits.argmax(-1)

    def confusion(state, images, labels):
        found = predict(state, images)
        pairs = classes * labels.reshape(-1) + found.reshape(-1)
        counts = jnp.zeros(classes**2, int).at[pairs].add(1)
        return counts.reshape(classes, classes)

    step = jax.jit(step, donate_argnums=0)
    return Trainer(jax.jit(init), step, *map(jax.jit, (remember, predict, confusion)))


def _each(replica: Any, params: Any, stats: Any, rows: jax.Array) -> Any:
    """Runs every replica; a single one without ``vmap``, which would cost time."""
    if len(rows) > 1:
        return jax.vmap(replica, (None, 0, 0))(params, stats, rows)
    one = replica(params, jax.tree.map(lambda leaf: leaf[0], stats), rows[0])
    return jax.tree.map(lambda leaf: leaf[None], one)


def recomputed(
    trainer: Trainer, state: State, images: jax.Array, rows: np.ndarray
) -> State:
    """The state with statistics for inference of norm batches under the last weights.

    ``rows`` is ``[norm batches, norm batch]``.
    """
    update = functools.partial(trainer.remember, state.params, images)
    one = jax.tree.map(lambda leaf: leaf[0], state.batch_stats)
    stats = cbn_jax.population.recompute(update, one, rows)
    return state._replace(batch_stats=jax.tree.map(lambda leaf: leaf[None], stats))


def make_optimizer(name: str, steps: int, batch_size: int) -> Any:
    """SGD with momentum or Adam, with a cosine schedule and a peak rate in its state."""
    # Adam's averages cover as many examples at every batch size.
    b2 = cbn_jax.rescale_decay(0.98, batch_size)

    def make(rate):
        scaled = {"sgd": optax.trace(0.9), "adam": optax.scale_by_adam(b2=b2)}[name]
        schedule = optax.cosine_decay_schedule(1.0, steps)
        return optax.chain(scaled, optax.scale_by_schedule(schedule), optax.scale(-rate))

    return optax.inject_hyperparams(make)(rate=0.0)


def counted(
    trainer: Trainer, state: State, images: np.ndarray, labels: np.ndarray, part: int = 500
) -> np.ndarray:
    """Sums confusions over all examples in parts, of which the last may be smaller."""
    slices = [slice(i, i + part) for i in range(0, len(images), part)]
    found = [trainer.confusion(state, images[each], labels[each]) for each in slices]
    return np.sum(jax.device_get(found), axis=0)
