# SPDX-License-Identifier: Apache-2.0
"""Data sets by name: embedded, from packages, your own, or from tensorflow-datasets.

``digits`` is embedded (scikit-learn includes it). ``fashion_mnist`` is read from its four
IDX files if they are on the machine. ``packaged.py`` has the data of other packages. A
folder or a file of arrays is read directly. Any other name is that of a tensorflow-datasets
data set, which is read without TensorFlow.
"""

import functools
import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import tensorflow_datasets as tfds
    from sklearn.datasets import load_digits

from benchmarks.lib import own, packaged
from benchmarks.lib.dataset import Dataset, part

# Data of other packages.
PACKAGED: dict[str, Callable[[], Dataset]] = {
    "emoji_google": functools.partial(packaged.emoji, "google"),
    "emoji_twitter": functools.partial(packaged.emoji, "twitter"),
    "solar_cells": packaged.solar_cells,
    "earth_west": functools.partial(packaged.earth, "west"),
    "earth_east": functools.partial(packaged.earth, "east"),
    "brain": packaged.brain,
}
KNOWN = ("digits", "fashion_mnist", *PACKAGED)
IDX_FOLDERS = (
    Path("data/fashion-mnist"),
    Path("/usr/share/datasets/fashion-mnist"),  # Debian: apt install dataset-fashion-mnist
)


def load(name: str, data_dir: Path | None = None, examples: int | None = None) -> Dataset:
    """Loads a data set by name, preparing it on first use.

    Args:
      name: one of ``KNOWN``; a folder with a folder of images for each class; a file
        ``*.npz`` with images and labels; or an image classification set of
        tensorflow-datasets. The last needs splits ``train`` and ``test`` and images of one
        size.
      data_dir: folder for prepared data; None for tensorflow-datasets' own default.
      examples: largest number of images of each split; None for all.

    Returns:
      The data set in memory.

    Raises:
      ValueError: the name is unknown, its package is not installed, or the set is not one
        of image classification.
    """
    if name in PACKAGED:
        return part(PACKAGED[name](), examples)
    if name.endswith(".npz") or Path(name).is_dir():
        return part(own.load(Path(name)), examples)
    return _prepared(name, data_dir, examples)


def classified(
    name: str, data_dir: Path | None = None, examples: int | None = None
) -> Dataset:
    """``load`` for data with one label per example.

    Raises:
      ValueError: as ``load``; every position has a label.
    """
    dataset = load(name, data_dir, examples)
    if dataset.train_labels.ndim > 1:
        raise ValueError(
            f"dataset {name!r} has a label for every position, expected one for each "
            "image; train on it with python -m benchmarks.studies.norm_batch --tasks "
            "earth brain."
        )
    return dataset


def _prepared(name: str, data_dir: Path | None, examples: int | None) -> Dataset:
    """A data set from tensorflow-datasets."""
    tfds.disable_progress_bar()
    builder = _builder(name, data_dir)
    builder.download_and_prepare(file_format="array_record")
    features: Any = builder.info.features
    if not {"image", "label"} <= set(features) or not {"train", "test"} <= set(
        builder.info.splits
    ):
        raise ValueError(
            f"dataset {name!r} has features {sorted(features)} and splits "
            f"{sorted(builder.info.splits)}, expected image and label, train and test; "
            "choose an image classification set such as mnist or cifar10."
        )
    train, test = (_arrays(builder, split, examples) for split in ("train", "test"))
    return Dataset(
        name, *train, *test, classes=features["label"].num_classes, train_groups=train[1]
    )


def _builder(name: str, data_dir: Path | None) -> tfds.core.DatasetBuilder:
    if name == "digits":
        return Digits(data_dir=data_dir)
    if name == "fashion_mnist" and _idx_folder():
        return FashionMnistIdx(data_dir=data_dir)
    try:
        return tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise ValueError(
            f"dataset {name!r} is unknown; known are {', '.join(KNOWN)}, a folder with a "
            "folder of images for each class, a file of arrays such as images.npz, and the "
            "image classification sets of tensorflow-datasets, such as mnist or cifar10."
        ) from error


def _arrays(builder, split: str, most: int | None) -> tuple[np.ndarray, np.ndarray]:
    source = builder.as_data_source(split=split)
    examples = [source[i] for i in range(len(source))[:most]]
    images = np.stack([example["image"] for example in examples])
    labels = np.array([example["label"] for example in examples], np.int32)
    return images.astype(np.float32) / np.float32(images.max()), labels


class _Images(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Gray images as plain tensors, which are read and written without TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")
    SIDE: int
    CLASSES = 10

    def _info(self) -> tfds.core.DatasetInfo:
        shape = (self.SIDE, self.SIDE, 1)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Tensor(shape=shape, dtype=np.uint8),
                    "label": tfds.features.ClassLabel(num_classes=self.CLASSES),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split: str) -> Iterator:
        for i, (image, label) in enumerate(zip(*self._read(split), strict=True)):
            yield i, {"image": image[..., None], "label": int(label)}

    def _read(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError


class Digits(_Images):
    """Scikit-learn's 1,797 handwritten digits, 8x8; the last 360 are for testing."""

    name = "digits"
    SIDE = 8

    def _read(self, split):
        digits: Any = load_digits()
        part = slice(1437) if split == "train" else slice(1437, None)
        return digits.images[part].astype(np.uint8), digits.target[part]


class FashionMnistIdx(_Images):
    """Fashion-MNIST, 70,000 images of 28x28, from its four IDX files."""

    name = "fashion_mnist_idx"
    SIDE = 28

    def _read(self, split):
        folder, prefix = _idx_folder(), "train" if split == "train" else "t10k"
        if folder is None:
            raise ValueError(
                f"Fashion-MNIST's four IDX files are in none of {IDX_FOLDERS}."
            )
        return (
            _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"),
            _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz"),
        )


def _idx_folder() -> Path | None:
    return next((f for f in IDX_FOLDERS if len(list(f.glob("*-ubyte.gz"))) == 4), None)


def _read_idx(path: Path) -> np.ndarray:
    """The IDX format: two zeros, a type, the rank, big-endian sizes, then the bytes."""
    data = gzip.decompress(path.read_bytes())
    rank = data[3]
    shape = np.frombuffer(data, ">u4", count=rank, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)
