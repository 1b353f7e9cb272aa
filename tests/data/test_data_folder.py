import subprocess
import sys

import numpy as np
import pytest
import torch

from normlab.data import DataError, load

Image = pytest.importorskip("PIL.Image", reason="pillow comes with normlab[lab]")


def save(path, pixels, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(path)


@pytest.fixture
def pets(tmp_path):
    """Two classes, two training images and one test image of each, 4×6 RGB."""
    chance = np.random.default_rng(0)
    for part, count in (("train", 2), ("test", 1)):
        for animal in ("dog", "cat"):
            for i in range(count):
                pixels = chance.integers(0, 256, (4, 6, 3), dtype=np.uint8)
                save(tmp_path / part / animal / f"{i}.png", pixels)
    (tmp_path / "train" / ".hidden").mkdir()
    (tmp_path / "train" / "cat" / "Thumbs.db").touch()
    return tmp_path


def pixels_of(path):
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1)


def test_content_labels_and_classes(pets):
    data = load("folder", pets)
    assert data.classes == ("cat", "dog")
    assert data.train_labels.tolist() == [0, 0, 1, 1]
    assert data.test_labels.tolist() == [0, 1]
    assert data.image_shape == (3, 4, 6)
    assert torch.equal(data.train_images[3], pixels_of(pets / "train" / "dog" / "1.png"))
    assert torch.equal(data.test_images[0], pixels_of(pets / "test" / "cat" / "0.png"))
    assert data.title == pets.name


def test_mixed_sizes_need_size(pets):
    save(pets / "train" / "dog" / "2.png", np.zeros((9, 5, 3), np.uint8))
    with pytest.raises(DataError, match=r"4×6.*9×5 in .*2\.png; pass size="):
        load("folder", pets)
    data = load("folder", pets, size=3)
    assert data.train_images.shape == (5, 3, 3, 3)
    assert data.test_images.shape == (2, 3, 3, 3)


def test_size_keeps_the_middle(pets):
    # Left and right edge white, the middle square black: nothing of the edges may stay.
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :2] = pixels[:, 6:] = 255
    save(pets / "train" / "cat" / "a.png", pixels)
    data = load("folder", pets, size=4)
    assert data.train_images[2].eq(0).all()


def test_grey_images_have_one_channel(tmp_path):
    for part in ("train", "test"):
        save(tmp_path / part / "a" / "0.png", np.full((2, 2), 7, np.uint8))
    data = load("folder", tmp_path)
    assert data.image_shape == (1, 2, 2)
    assert data.train_images.eq(7).all()


def test_one_coloured_image_makes_all_coloured(tmp_path):
    for part in ("train", "test"):
        save(tmp_path / part / "a" / "0.png", np.full((2, 2), 7, np.uint8))
    save(tmp_path / "train" / "a" / "1.JPG", np.full((2, 2, 3), 7, np.uint8))
    assert load("folder", tmp_path).image_shape == (3, 2, 2)


def test_16_bit_is_refused(pets):
    save(pets / "train" / "cat" / "deep.png", np.full((4, 6), 60_000, np.uint16))
    with pytest.raises(DataError, match=r"8 bits per channel in .*deep\.png"):
        load("folder", pets)


@pytest.mark.parametrize("part", ["train", "test"])
def test_missing_part_shows_the_layout(pets, part):
    (pets / part).rename(pets / "val")
    with pytest.raises(DataError, match=r"train/CLASS/\*\.png .*test/CLASS.*val/"):
        load("folder", pets)


def test_unknown_test_class(pets):
    (pets / "test" / "cat").rename(pets / "test" / "cats")
    with pytest.raises(DataError, match="of cat, dog, but found cats"):
        load("folder", pets)


def test_class_without_images(pets):
    (pets / "train" / "fish").mkdir()
    (pets / "train" / "fish" / "a.gif").touch()
    with pytest.raises(DataError, match=r"\.png.*fish.*a\.gif"):
        load("folder", pets)


def test_no_classes(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(DataError, match="one folder per class"):
        load("folder", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "flipped"])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_damaged_image_names_the_file(pets, damage, suffix):
    path = pets / "train" / "cat" / f"bad{suffix}"
    save(path, np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        content = content[: len(content) - 40]
    elif damage == "flipped":
        content[2:40] = bytes(38)
    else:
        content = bytearray(b"not an image" * (damage == "text"))
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\{suffix}.*replace or remove"):
        load("folder", pets)


@pytest.mark.parametrize("size", [0, -1, 2.5, True])
def test_size_must_be_a_positive_int(pets, size):
    with pytest.raises(DataError, match="positive number of pixels"):
        load("folder", pets, size=size)


def test_without_pillow_the_extra_is_named(pets):
    code = (
        "import sys; sys.modules['PIL'] = None\n"
        "from normlab.data import DataError, load\n"
        f"try: load('folder', {str(pets)!r})\n"
        "except DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "normlab[lab]" in done.stdout
