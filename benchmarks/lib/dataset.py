# SPDX-License-Identifier: Apache-2.0
"""Examples in memory, and their split."""

from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Examples for training and for testing.

    Attributes:
      name: name of the data set.
      train_images: ``[N, *space, C]`` float32 in [0, 1].
      train_labels: int32, ``[N]``, or ``[N, *space]`` if every position has a label.
      test_images: test images, like those for training.
      test_labels: test labels, like those for training.
      classes: number of classes.
      train_groups: ``[N]``, the same number for examples that are alike, such as those of
        one class or neighbors on a map.
    """

    name: str
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    train_groups: np.ndarray


def split(
    name: str,
    images: np.ndarray,
    labels: np.ndarray,
    tested: np.ndarray,
    classes: int,
    groups: np.ndarray | None = None,
) -> Dataset:
    """A data set of 8-bit images in which equal images occur once.

    Args:
      name: name of the data set.
      images: ``[N, *space, C]`` uint8.
      labels: ``[N]`` or ``[N, *space]``.
      tested: ``[N]``, True for the examples for testing.
      classes: number of classes.
      groups: ``[N]``, the groups of examples that are alike; the labels if not given.
    """
    groups = labels if groups is None else groups
    _, first = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    once = np.zeros(len(images), bool)
    once[first] = True
    train, test = once & ~tested, once & tested
    images = images.astype(np.float32) / np.float32(255)
    labels = labels.astype(np.int32)
    return Dataset(
        name,
        images[train],
        labels[train],
        images[test],
        labels[test],
        classes,
        groups[train],
    )


def one_in(count: int, share: int = 5) -> np.ndarray:
    """True for a random one in ``share`` of ``count`` examples, the same in every call."""
    return np.random.default_rng(0).permutation(count) % share == 0


def some(count: int, most: int | None) -> np.ndarray:
    """Indices of random examples, at most ``most``, in their order; always the same.

    The first examples of sorted data would all be of one class.
    """
    return np.sort(np.random.default_rng(0).permutation(count)[:most])


def part(dataset: Dataset, most: int | None) -> Dataset:
    """Random examples of each split, at most ``most``."""
    train, test = (
        some(len(labels), most) for labels in (dataset.train_labels, dataset.test_labels)
    )
    return dataset._replace(
        train_images=dataset.train_images[train],
        train_labels=dataset.train_labels[train],
        train_groups=dataset.train_groups[train],
        test_images=dataset.test_images[test],
        test_labels=dataset.test_labels[test],
    )
