# SPDX-License-Identifier: Apache-2.0
"""Tasks of the study of norm batches: data, a network for it, and a measure."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from benchmarks.lib import data
from benchmarks.lib.dataset import Dataset, one_in, some

VALIDATION = 8  # one in 8 training examples is for choosing the rate


class Task(NamedTuple):
    """Real data and the training of a network on it.

    Attributes:
      dataset: name of the data set.
      network: name of the network.
      epochs: number of passes over the training examples.
      width: width of the network.
      halved: whether images are first averaged to half their size.
      dense: whether every position has a label. The measure is then the mean intersection
        over union, otherwise the accuracy.
      before: a task on which ``nn.BatchNorm`` has trained the network with 32 examples per
        step. The methods fine-tune that network. Empty if they train from scratch.
      labels: the range of classes to use, first and end (excluded).
      examples: largest number of training examples.
      groups: groups of group norm, at least two channels each.
    """

    dataset: str
    network: str
    epochs: int
    width: int
    halved: bool = False
    dense: bool = False
    before: str = ""
    labels: tuple[int, int] | None = None
    examples: int | None = None
    groups: int = 8

    @property
    def new_classes(self) -> bool:
        """Whether the network was trained on other classes."""
        return bool(self.before) and self.labels != TASKS[self.before].labels


TASKS = {
    "digits": Task("digits", "mlp", 4, 128),
    "digits_first": Task("digits", "mlp", 1, 128, labels=(0, 5)),
    "digits_new_classes": Task(
        "digits", "mlp", 1, 128, before="digits_first", labels=(5, 10)
    ),
    "gray_mlp": Task("fashion_mnist", "mlp", 1, 256, halved=True),
    "gray_resnet": Task("fashion_mnist", "resnet20", 1, 16, halved=True),
    "gray_first": Task("fashion_mnist", "resnet20", 2, 16, halved=True, labels=(0, 5)),
    "gray_new_classes": Task(
        "fashion_mnist",
        "resnet20",
        1,
        16,
        halved=True,
        before="gray_first",
        labels=(5, 10),
        examples=2000,
    ),
    "emoji": Task("emoji_google", "resnet20", 12, 16, halved=True),
    "emoji_new_domain": Task(
        "emoji_twitter", "resnet20", 1, 16, halved=True, before="emoji"
    ),
    "emoji_new_domain_few": Task(
        "emoji_twitter", "resnet20", 4, 16, halved=True, before="emoji", examples=200
    ),
    "cells": Task("solar_cells", "cnn", 10, 16, halved=True),
    "earth": Task("earth_west", "unet", 8, 16, dense=True),
    "earth_new_domain": Task("earth_east", "unet", 2, 16, dense=True, before="earth"),
    # Eight groups of eight channels would be instance norm.
    "brain": Task("brain", "unet", 2, 8, dense=True, groups=2),
}


class Parts(NamedTuple):
    """Examples for training, for choosing rates and for testing."""

    train: Dataset
    validation: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def load(task: Task, examples: int | None = None) -> Parts:
    """The data of a task, at most ``examples`` in each split."""
    dataset = data.load(task.dataset, examples=examples)
    if task.labels is not None:
        dataset = _of_classes(dataset, *task.labels)
    images, test = dataset.train_images, dataset.test_images
    if task.halved:
        images, test = _halved(images), _halved(test)
    chosen = one_in(len(images), VALIDATION)
    kept = np.flatnonzero(~chosen)
    kept = kept[some(len(kept), task.examples)]
    train = dataset._replace(
        train_images=images[kept],
        train_labels=dataset.train_labels[kept],
        train_groups=dataset.train_groups[kept],
        test_images=test,
    )
    validation = images[chosen], dataset.train_labels[chosen]
    return Parts(train, validation, (test, dataset.test_labels))


def _of_classes(dataset: Dataset, low: int, high: int) -> Dataset:
    """The examples of some classes, renumbered from 0."""
    train, test = (
        (labels >= low) & (labels < high)
        for labels in (dataset.train_labels, dataset.test_labels)
    )
    return dataset._replace(
        train_images=dataset.train_images[train],
        train_labels=dataset.train_labels[train] - low,
        train_groups=dataset.train_groups[train],
        test_images=dataset.test_images[test],
        test_labels=dataset.test_labels[test] - low,
        classes=high - low,
    )


def _halved(images: np.ndarray) -> np.ndarray:
    """Means over squares of two by two."""
    n, height, width, channels = images.shape
    return images.reshape(n, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def batches(
    groups: np.ndarray | None, count: int, shape: tuple[int, int], epochs: int, seed: int
) -> Iterator[np.ndarray]:
    """Rows of every step, ``[replicas, norm batch]``; each epoch has a new order.

    Args:
      groups: the groups of examples that are alike, to fill each norm batch from one group.
        None for independent examples.
      count: number of examples.
      shape: number of replicas and norm batch size.
      epochs: number of passes over the examples.
      seed: seed of the order.
    """
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(count).astype(np.int32)
        if groups is None:
            rows = _whole(order, shape[1])
        else:
            alike = [order[groups[order] == group] for group in np.unique(groups)]
            rows = np.concatenate([_whole(each, shape[1]) for each in alike])
            rows = rng.permutation(rows)
        yield from _whole(rows, shape[0])


def _whole(rows: np.ndarray, size: int) -> np.ndarray:
    """Rows in parts of equal size, without an incomplete part."""
    return rows[: len(rows) - len(rows) % size].reshape(-1, size, *rows.shape[1:])


def score(counts: np.ndarray, dense: bool) -> float:
    """Accuracy, or the mean intersection over union."""
    right = np.diag(counts)
    if not dense:
        return float(right.sum() / counts.sum())
    union = counts.sum(0) + counts.sum(1) - right
    there = union > 0
    return float((right[there] / union[there]).mean())
