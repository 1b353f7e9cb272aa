import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from normlab.data import DataError, load

BOTH = pytest.mark.parametrize("classes", [10, 100])
LAYOUTS = pytest.mark.parametrize("pickled", [False, True], ids=["binary", "python"])


def check(data, parts, names):
    for part, images, labels in (
        ("train", data.train_images, data.train_labels),
        ("test", data.test_images, data.test_labels),
    ):
        pixels, expected = parts[part]
        assert torch.equal(images, torch.from_numpy(pixels.reshape(-1, 3, 32, 32)))
        assert labels.tolist() == expected.tolist()
    assert data.classes == names


@BOTH
@LAYOUTS
@pytest.mark.parametrize("where", ["plain", "parent", "archive", "archive in folder"])
def test_every_layout(tmp_path, make, classes, pickled, where):
    files, parts, names = make.cifar(classes, pickled)
    version = "python" if pickled else "binary"
    if where == "plain":
        place = make.folder(tmp_path, files)
    elif where == "parent":
        ten = "cifar-10-batches-py" if pickled else "cifar-10-batches-bin"
        make.folder(tmp_path / (ten if classes == 10 else f"cifar-100-{version}"), files)
        place = tmp_path
    else:
        path = make.archive(tmp_path / f"cifar-{classes}-{version}.tar.gz", files)
        place = path if where == "archive" else tmp_path
    check(load(f"cifar{classes}", place), parts, names)
    if "archive" in where:
        left = [p.name for p in tmp_path.rglob("*")]
        assert left == [path.name], "an archive must not be unpacked to disk"


def test_python_2_files(tmp_path, make):
    files, parts, names = make.cifar(10, True)
    for name, part in (("data_batch_1", "train"), ("test_batch", "test")):
        files[name] = make.python2_pickle(*parts[part])
    check(load("cifar10", make.folder(tmp_path, files)), parts, names)


def test_batches_are_joined_in_order(tmp_path, make):
    files, parts, names = make.cifar(10, False, count=20)
    rows = files["data_batch_1.bin"]
    for i in range(5):
        files[f"data_batch_{i + 1}.bin"] = rows[i * 4 * 3073 : (i + 1) * 4 * 3073]
    check(load("cifar10", make.folder(tmp_path, files)), parts, names)


def test_title_tells_of_missing_training_files(tmp_path, make):
    files, _, _ = make.cifar(10, False, count=20)
    assert load("cifar10", make.folder(tmp_path, files)).title == (
        "CIFAR-10 (20 of 50,000 training images)"
    )


def test_default_class_names(tmp_path, make):
    files, _, _ = make.cifar(10, False)
    del files["batches.meta.txt"]
    assert load("cifar10", make.folder(tmp_path, files)).classes[0] == "airplane"


def test_gap_in_batches(tmp_path, make):
    files, _, _ = make.cifar(10, False)
    files["data_batch_3.bin"] = files["data_batch_1.bin"]
    with pytest.raises(DataError, match=r"no data_batch_2\.bin"):
        load("cifar10", make.folder(tmp_path, files))


@LAYOUTS
@BOTH
def test_missing_test_file(tmp_path, make, classes, pickled):
    files, _, _ = make.cifar(classes, pickled)
    (name,) = (n for n in files if n.startswith("test"))
    del files[name]
    with pytest.raises(DataError, match=f"found no {name}"):
        load(f"cifar{classes}", make.folder(tmp_path, files))


def test_wrong_directory_lists_what_was_searched(tmp_path):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(DataError) as caught:
        load("cifar10", tmp_path)
    for name in ("data_batch_1.bin", "data_batch_5", "cifar-10-python.tar.gz", "holiday/"):
        assert name in str(caught.value)


@pytest.mark.parametrize("cut", [1, 3072, 3073 * 20 - 1])
def test_truncated_binary_names_the_file(tmp_path, make, cut):
    files, _, _ = make.cifar(10, False)
    files["data_batch_1.bin"] = files["data_batch_1.bin"][:cut]
    with pytest.raises(DataError, match=rf"3073 bytes in data_batch_1\.bin.*{cut} bytes"):
        load("cifar10", make.folder(tmp_path, files))


@BOTH
def test_label_out_of_range(tmp_path, make, classes):
    for pickled in (False, True):
        files, parts, _ = make.cifar(classes, pickled)
        name = next(iter(files))
        if pickled:
            batch = pickle.loads(files[name])
            key = b"labels" if classes == 10 else b"fine_labels"
            batch[key][3] = classes
            files[name] = pickle.dumps(batch)
        else:
            width = len(files[name]) // len(parts["train"][1])
            content = bytearray(files[name])
            content[3 * width + width - 3073] = classes
            files[name] = bytes(content)
        with pytest.raises(DataError, match=f"0 to {classes - 1}.*found {classes} in row 3"):
            load(f"cifar{classes}", make.folder(tmp_path / str(pickled), files))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({b"data": None}, "'data'.*NoneType"),
        ({b"data": np.zeros((20, 5), np.uint8)}, "3072 pixels"),
        ({b"data": np.zeros((20, 3072), np.float32)}, "float32"),
        ({b"labels": [0.5] * 20}, "list of integers"),
        ({b"labels": [1] * 19}, "20 labels.*19"),
        ({b"labels": [1 << 70] * 20}, "small labels"),
        ({b"labels": "abc"}, "list of integers.*str"),
    ],
)
def test_wrong_fields(tmp_path, make, change, message):
    files, _, _ = make.cifar(10, True)
    files["data_batch_1"] = pickle.dumps(pickle.loads(files["data_batch_1"]) | change)
    with pytest.raises(DataError, match=message):
        load("cifar10", make.folder(tmp_path, files))


def test_the_other_cifar(tmp_path, make):
    files, _, _ = make.cifar(100, True)
    renamed = {"data_batch_1": files["train"], "test_batch": files["test"]}
    with pytest.raises(DataError, match=r"'labels' in data_batch_1.*fine_labels"):
        load("cifar10", make.folder(tmp_path, renamed))


@pytest.mark.parametrize("names", ["a b", "a b c d e f g h i i", "a b c d e f g h i j j"])
def test_class_file_must_name_each_class_once(tmp_path, make, names):
    files, _, _ = make.cifar(10, False)
    files["batches.meta.txt"] = names.encode()
    with pytest.raises(DataError, match=r"10 different class names in batches\.meta\.txt"):
        load("cifar10", make.folder(tmp_path, files))


@pytest.mark.parametrize("meta", [5, [], {"label_names": 5}, {"label_names": ["a"] * 10}])
def test_pickled_class_file_must_name_each_class_once(tmp_path, make, meta):
    files, _, _ = make.cifar(10, True)
    files["batches.meta"] = pickle.dumps(meta)
    with pytest.raises(DataError, match=r"10 different class names in batches\.meta"):
        load("cifar10", make.folder(tmp_path, files))


@pytest.fixture
def real_data():
    named = os.environ.get("NORMLAB_DATA_DIR")
    if not named:
        pytest.skip("NORMLAB_DATA_DIR is not set")
    for folder in (named, Path(named) / "cifar-10-batches-bin", Path(named) / "cifar10"):
        if (Path(folder) / "data_batch_1.bin").is_file():
            return named
    pytest.skip("no CIFAR-10 binaries in NORMLAB_DATA_DIR")


def test_real_cifar10(real_data):
    data = load("cifar10")
    assert data.image_shape == (3, 32, 32)
    assert len(set(data.train_labels.bincount().tolist())) == 1, "CIFAR-10 is balanced"
    assert len(set(data.test_labels.bincount().tolist())) == 1
    mean, std = data.statistics()
    # The published figures; the margin admits subsets and recompressed pixels.
    assert torch.allclose(mean, torch.tensor([0.4914, 0.4822, 0.4465]), atol=5e-3)
    assert torch.allclose(std, torch.tensor([0.2470, 0.2435, 0.2616]), atol=5e-3)
