# SPDX-License-Identifier: Apache-2.0
"""Networks trained with ``nn.BatchNorm``, for methods to fine-tune."""

import functools
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    from flax import serialization
    from flax.traverse_util import flatten_dict, unflatten_dict

    from cbn_jax.linen import from_batch_norm

from benchmarks.lib import compared, networks, replicas, report, tasks

SIZE, RATE = 32, 0.1  # batch size and rate of the training


def started(
    state: replicas.State,
    method: str,
    task: tasks.Task,
    seed: int,
    examples: int | None,
    folder: Path,
) -> replicas.State:
    """The state of a trainer with trained parameters and statistics.

    Args:
      state: the state initialized by the trainer.
      method: the method that fine-tunes.
      task: the task to fine-tune on.
      seed: seed of the training.
      examples: largest number of examples in each split.
      folder: folder for trained networks.
    """
    found: Any = kept(task.before, seed, examples, folder)
    stats = state.batch_stats
    if method not in compared.WITHOUT_AVERAGES:
        own = jax.tree.map(lambda leaf: leaf[0], stats)
        found = from_batch_norm(found, into={"params": state.params, "batch_stats": own})
        stats = jax.tree.map(
            lambda leaf, every: jnp.array(jnp.broadcast_to(leaf[None], every.shape)),
            found["batch_stats"],
            stats,
        )
    trained = flatten_dict(jax.tree.map(jnp.array, found["params"]))
    if task.new_classes:
        head = head_of(state.params)
        trained = {path: leaf for path, leaf in trained.items() if path[0] != head}
    params = unflatten_dict({**flatten_dict(state.params), **trained})
    return state._replace(params=params, batch_stats=stats)


def head_of(params: Any) -> str:
    """The name of the layer that makes the logits: the last dense layer."""
    dense = (name for name in params if name.startswith("Dense_"))
    return max(dense, key=lambda name: int(name.removeprefix("Dense_")))


@functools.lru_cache(maxsize=16)
def kept(task: str, seed: int, examples: int | None, folder: Path) -> Any:
    """Variables of a trained network, from its file if this code wrote one."""
    name = f"{task}-{examples}-{seed}-{report.source_digest()[:8]}"
    path = folder / "bases" / f"{name}.msgpack"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")  # processes may write the same
        partial.write_bytes(serialization.to_bytes(_trained(task, seed, examples)))
        partial.replace(path)
    return serialization.msgpack_restore(path.read_bytes())


def _trained(name: str, seed: int, examples: int | None) -> Any:
    """Training from scratch by SGD, in steps of 32."""
    task = tasks.TASKS[name]
    train = tasks.load(task, examples).train
    count = len(train.train_labels)
    rows = list(tasks.batches(None, count, (1, min(SIZE, count)), int(task.epochs), seed))
    trainer = _trainer(task, train.train_images.shape[1:], train.classes, len(rows))
    state = trainer.init(jax.random.key(seed), jnp.float32(RATE))
    data = jax.device_put((train.train_images, train.train_labels))
    for chosen in rows:
        state, _ = trainer.step(state, *data, chosen)
    stats = jax.tree.map(lambda leaf: leaf[0], state.batch_stats)
    return jax.device_get({"params": state.params, "batch_stats": stats})


@functools.lru_cache(maxsize=2)
def _trainer(
    task: tasks.Task, shape: tuple[int, ...], classes: int, steps: int
) -> replicas.Trainer:
    model = networks.NETWORKS[task.network](
        norm=compared.flax_batch_norm, classes=classes, width=task.width
    )
    optimizer = replicas.make_optimizer("sgd", steps, SIZE)
    return replicas.make_trainer(model, shape, classes, 1, optimizer)
