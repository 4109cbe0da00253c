# SPDX-License-Identifier: Apache-2.0
"""Your own images: a folder for each class, or arrays in a file."""

from pathlib import Path

import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    from PIL import Image

from benchmarks.lib.dataset import Dataset, one_in, split

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


def load(path: Path) -> Dataset:
    """Images and labels; a fifth of them is for testing.

    Args:
      path: a folder with a folder of images for each class, all of one size; or a file
        ``*.npz`` with ``images``, ``[N, H, W, C]`` or ``[N, H, W]`` uint8, and ``labels``,
        ``[N]`` whole numbers from 0.

    Raises:
      ValueError: the files are not of this form.
    """
    images, labels = _from_folder(path) if path.is_dir() else _from_arrays(path)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{path} has images of shape {images.shape} and dtype {images.dtype} and "
            f"labels of shape {labels.shape}, expected [N, H, W, C] uint8 and [N]."
        )
    tested = one_in(len(images))
    return split(path.stem, images, labels, tested, int(labels.max()) + 1)


def _from_folder(path: Path) -> tuple[np.ndarray, np.ndarray]:
    names = sorted(each.name for each in path.iterdir() if each.is_dir())
    found = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((path / name).iterdir())
        if file.suffix.lower() in ENDINGS
    ]
    if not found:
        raise ValueError(
            f"{path} has no images, expected a folder for each class with files that end "
            f"in {', '.join(ENDINGS)}."
        )
    images = [np.asarray(Image.open(file).convert("RGB")) for file, _ in found]
    sizes = sorted({image.shape[:2] for image in images})
    if len(sizes) > 1:
        raise ValueError(
            f"{path} has images of the sizes {', '.join(map(str, sizes[:4]))}, expected "
            "one size; resize them first."
        )
    return np.stack(images), np.array([label for _, label in found])


def _from_arrays(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.is_file():
        raise ValueError(f"{path} is not to be found, expected a file with arrays.")
    with np.load(path) as arrays:
        if not {"images", "labels"} <= set(arrays):
            raise ValueError(
                f"{path} has the arrays {', '.join(arrays)}, expected images and labels."
            )
        return arrays["images"], arrays["labels"]
