import hashlib
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from normlab.data import DataError, load
from normlab.data.fashion import CLASSES, DEBIAN, EMBEDDED, STEMS
from normlab.data.idx import write_idx
from normlab.data.make_fashion_mini import main
from normlab.data.make_fashion_mini import make as make_mini


@pytest.fixture(scope="module")
def mini():
    return load("fashion-mini")


def complete_source():
    """The folder of the whole Fashion-MNIST on this machine, or None."""
    named = os.environ.get("NORMLAB_DATA_DIR")
    for folder in ([Path(named), Path(named) / "fashion-mnist"] if named else []) + [DEBIAN]:
        if (folder / "train-images-idx3-ubyte.gz").is_file():
            return folder
    return None


@pytest.fixture
def real_data():
    source = complete_source()
    if source is None:
        pytest.skip(f"no Fashion-MNIST in NORMLAB_DATA_DIR or {DEBIAN}")
    return source


def test_shapes_and_balance(mini):
    assert mini.train_images.shape == (12_000, 1, 28, 28)
    assert mini.test_images.shape == (2_000, 1, 28, 28)
    assert mini.train_labels.bincount().tolist() == [1200] * 10
    assert mini.test_labels.bincount().tolist() == [200] * 10
    assert mini.classes == CLASSES


def test_content_is_the_recorded_one(mini):
    assert mini.fingerprint() == "e35a3951db6f2f79"
    # Independent of ImageData: the plain bytes of the training images.
    digest = hashlib.sha256(mini.train_images.numpy().tobytes()).hexdigest()
    assert digest == TRAIN_SHA256


TRAIN_SHA256 = "13e619eeda219042c38e7dfde755199f21508068fbc3f3eb290bc254c26acaec"


def test_size_and_licence():
    files = sorted(EMBEDDED.iterdir())
    assert sum(f.stat().st_size for f in files) <= 6_000_000
    assert {f.name for f in files} == {"LICENSE", *(f"{stem}.xz" for stem in STEMS.values())}
    licence = (EMBEDDED / "LICENSE").read_text(encoding="utf-8")
    assert "MIT" in licence
    assert "Zalando SE" in licence
    assert "WITHOUT WARRANTY OF ANY KIND" in licence


def test_rebuilt_from_the_source(real_data, tmp_path, monkeypatch):
    # Compared unpacked: packing takes seconds, and another liblzma may pack differently.
    monkeypatch.setattr("normlab.data.idx.lzma.compress", lambda content, *_, **__: content)
    made = make_mini(real_data, tmp_path)
    assert len(made) == 5
    for path in made:
        shipped = (EMBEDDED / path.name).read_bytes()
        if path.suffix == ".xz":
            shipped = lzma.decompress(shipped)
        assert path.read_bytes() == shipped, path.name


def test_whole_set(real_data):
    data = load("fashion-mnist", real_data)
    assert data.train_labels.bincount().tolist() == [6000] * 10
    assert data.test_labels.bincount().tolist() == [1000] * 10
    mean, std = data.statistics()
    # Published by the authors of many training scripts to four digits.
    assert mean.item() == pytest.approx(0.2860, abs=5e-5)
    assert std.item() == pytest.approx(0.3530, abs=5e-5)


def write_set(folder, train_labels, test_labels=None, suffix=".gz"):
    folder.mkdir(parents=True, exist_ok=True)
    chance = np.random.default_rng(0)
    test_labels = np.arange(10, dtype=np.uint8) if test_labels is None else test_labels
    for part, labels in (("train", train_labels), ("test", test_labels)):
        images = chance.integers(0, 256, (len(labels), 2, 2), dtype=np.uint8)
        write_idx(folder / (STEMS[part, "images"] + suffix), images)
        write_idx(folder / (STEMS[part, "labels"] + suffix), labels.astype(np.uint8))
    return folder


@pytest.mark.parametrize("where", [".", "fashion-mnist", "FashionMNIST/raw"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_found_in_usual_places(tmp_path, where, suffix):
    write_set(tmp_path / where, np.array([4, 0, 9]), suffix=suffix)
    data = load("fashion-mnist", tmp_path)
    assert data.train_labels.tolist() == [4, 0, 9]
    assert data.train_images.shape == (3, 1, 2, 2)
    assert data.train_images.dtype == torch.uint8


def test_named_by_the_environment(tmp_path, monkeypatch):
    write_set(tmp_path, np.array([4, 0, 9]))
    monkeypatch.setenv("NORMLAB_DATA_DIR", str(tmp_path))
    assert load("fashion-mnist").train_labels.tolist() == [4, 0, 9]


def test_wrong_directory_lists_what_was_searched(tmp_path):
    (tmp_path / "holiday.txt").touch()
    with pytest.raises(DataError, match=r"train-images-idx3-ubyte.*\.gz.*holiday\.txt"):
        load("fashion-mnist", tmp_path)


def test_digits_are_not_taken_for_clothes(tmp_path):
    uneven = np.arange(60_000) % 10
    uneven[0] = 1
    write_set(tmp_path, uneven, suffix="")
    with pytest.raises(DataError, match="MNIST digits"):
        load("fashion-mnist", tmp_path)


def test_lengths_must_agree(tmp_path):
    write_set(tmp_path, np.array([4, 0, 9]))
    write_idx(tmp_path / (STEMS["train", "labels"] + ".gz"), np.array([1, 2], dtype=np.uint8))
    with pytest.raises(DataError, match="2 labels and 3 images"):
        load("fashion-mnist", tmp_path)


def test_label_out_of_range(tmp_path):
    write_set(tmp_path, np.array([4, 10, 9]))
    with pytest.raises(DataError, match=r"labels from 0 to 9.*from 4 to 10"):
        load("fashion-mnist", tmp_path)


def test_source_with_too_few_of_a_class(tmp_path):
    source = write_set(tmp_path / "source", np.arange(20) % 10)
    with pytest.raises(DataError, match="1200 samples of each"):
        make_mini(source, tmp_path / "made")


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("normlab.data.make_fashion_mini.PER_CLASS", {"train": 2, "test": 1})
    # Class by class in reverse, so that order within the file matters.
    source = write_set(tmp_path / "source", np.repeat(np.arange(10)[::-1], 3))
    main([str(source), str(tmp_path / "made")])
    assert "train-images-idx3-ubyte.xz" in capsys.readouterr().out
    whole, part = load("fashion-mnist", source), load("fashion-mini", tmp_path / "made")
    keep = [i for i in range(30) if i % 3 < 2]
    assert torch.equal(part.train_images, whole.train_images[keep])
    assert torch.equal(part.train_labels, whole.train_labels[keep])


def test_command_line_without_source(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path / "nowhere"), str(tmp_path / "made")])
    assert caught.value.code == 1
    assert "no such directory" in capsys.readouterr().err


def test_import_is_light():
    code = "import sys, normlab.data; print([m for m in ('PIL', 'scipy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
